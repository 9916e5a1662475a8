"""The emulator's profiles: identifiers, nulls, merges and filters, as Klaviyo documents them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import pytest

from tests.support.klaviyo_account import AccountClient
from worker.errors import Rejected
from worker.sandbox.klaviyo.account import Account

if TYPE_CHECKING:
    from worker.model import Json

PHONE = "+442079460958"


def resource(**attributes: Any) -> Json:
    return {"data": {"type": "profile", "attributes": attributes}}


def merge(client: AccountClient, destination: str, *sources: str) -> Json:
    profiles = {"data": [{"type": "profile", "id": source} for source in sources]}
    data = {"type": "profile-merge", "id": destination, "relationships": {"profiles": profiles}}
    return client.call("POST", "/api/profile-merge", {"data": data})


def ids(client: AccountClient) -> list[str]:
    return [profile["id"] for profile in client.account.profiles]


def find(client: AccountClient, condition: str) -> list[Json]:
    found: list[Json] = client.call("GET", f"/api/profiles?filter={quote(condition)}&fields%5Bprofile%5D=email")["data"]
    return found


def test_phone_number_alone_selects_a_profile_or_conflicts() -> None:
    """Klaviyo does not document which. A match by another identifier is an update in any case."""
    selecting = AccountClient()
    selecting.profile(email="a@example.com", phone_number=PHONE)
    selecting.call("POST", "/api/profile-import", resource(email="b@example.com", phone_number=PHONE))
    assert [profile["attributes"]["email"] for profile in selecting.account.profiles] == ["b@example.com"]
    strict = AccountClient(Account(phone_match="conflict"))
    strict.profile(email="a@example.com", phone_number=PHONE)
    with pytest.raises(Rejected) as conflict:
        strict.call("POST", "/api/profile-import", resource(email="b@example.com", phone_number=PHONE))
    assert (conflict.value.status, conflict.value.duplicate_id) == (409, ids(strict)[0])
    for identifiers in ({"email": "A@example.com"}, {}):
        strict.call("POST", "/api/profile-import", resource(phone_number=PHONE, first_name="Ada", **identifiers))
    assert len(ids(strict)) == 1


def test_event_of_another_person_loses_the_phone_number() -> None:
    """An event is never rejected for its identifiers."""
    client = AccountClient(Account(phone_match="conflict"))
    client.profile(email="a@example.com", phone_number=PHONE)
    profile = resource(email="b@example.com", phone_number=PHONE)
    metric = {"data": {"type": "metric", "attributes": {"name": "Placed Order"}}}
    event = {"type": "event", "attributes": {"properties": {}, "metric": metric, "profile": profile}}
    client.call("POST", "/api/events", {"data": event})
    assert [each["attributes"].get("phone_number") for each in client.account.profiles] == [PHONE, None]


def test_null_clears_in_a_request_and_not_in_a_job() -> None:
    """The guide to bulk imports says so."""
    client = AccountClient()
    ada = client.profile(external_id="a", first_name="Ada", location={"city": "Leeds"}, properties={"x": 1})
    nulls = {"first_name": None, "location": {"city": None}, "properties": {"x": None}}
    entry = resource(external_id="a", **nulls)["data"]
    job = {"type": "profile-bulk-import-job", "attributes": {"profiles": {"data": [entry]}}}
    client.call("POST", "/api/profile-bulk-import-jobs", {"data": job})
    assert (ada["first_name"], ada["location"], ada["properties"]) == ("Ada", {"city": "Leeds"}, {"x": 1})
    client.call("PATCH", f"/api/profiles/{ids(client)[0]}", {"data": entry | {"id": ids(client)[0]}})
    assert (ada["first_name"], ada["location"], ada["properties"]) == (None, {}, {})
    client.call("POST", "/api/profile-import", resource(external_id="a", location=None))
    assert ada["location"] == {}


def test_merge_fills_the_destination_and_deletes_the_source() -> None:
    """The values of the destination stay."""
    client = AccountClient()
    ada = client.profile(email="a@example.com", first_name="Ada", properties={"x": 1})
    client.profile(email="b@example.com", first_name="B.", phone_number=PHONE, properties={"x": 2, "y": 3})
    destination, source = ids(client)
    assert merge(client, destination, source)["data"] == {"type": "profile", "id": destination}
    assert ids(client) == [destination]
    assert (ada["email"], ada["first_name"], ada["phone_number"]) == ("a@example.com", "Ada", PHONE)
    assert ada["properties"] == {"x": 1, "y": 3}
    for sources in ((), (source,), (destination,)):
        with pytest.raises(Rejected):
            merge(client, destination, *sources)


def test_merge_takes_its_time() -> None:
    """Until then, the source has its identifiers."""
    client = AccountClient(Account(merge_seconds=3_600.0))
    client.profile(email="a@example.com")
    client.profile(email="b@example.com")
    destination, source = ids(client)
    merge(client, destination, source)
    assert [each["id"] for each in find(client, 'equals(email,"b@example.com")')] == [source]


def test_filter_takes_a_hundred_values_and_compares_email_addresses_without_case() -> None:
    """Only the requested fields are returned."""
    client = AccountClient()
    client.profile(email="Ada@example.com", first_name="Ada")
    names = ["ada@EXAMPLE.com", *(f"{number}@example.com" for number in range(99))]
    (found,) = find(client, f"any(email,[{','.join(f'{chr(34)}{name}{chr(34)}' for name in names)}])")
    assert found["attributes"] == {"email": "Ada@example.com"}
    names.append("one.more@example.com")
    with pytest.raises(Rejected):
        find(client, f"any(email,[{','.join(f'{chr(34)}{name}{chr(34)}' for name in names)}])")
