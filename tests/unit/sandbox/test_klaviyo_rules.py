"""The Klaviyo emulator enforces Klaviyo's documented rules."""

from __future__ import annotations

from copy import deepcopy
from typing import Any
from urllib.parse import urlencode

import orjson
import pytest
import urllib3
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.sandbox.conftest import HEADERS, Caller
from worker.sandbox import Fault, Sandbox
from worker.sandbox.http import ApiRequest
from worker.sandbox.klaviyo.account import PREFIX, Account
from worker.sandbox.klaviyo.api import KEY, KlaviyoApi


def event(**attributes: Any) -> dict[str, Any]:
    metric = {"data": {"type": "metric", "attributes": {"name": "Placed Order"}}}
    profile = {"data": {"type": "profile", "attributes": {"email": "ada@example.com"}}}
    base = {"properties": {}, "metric": metric, "profile": profile, "unique_id": "1"}
    return {"data": {"type": "event", "attributes": base | attributes}}


def metric_named(name: Any) -> dict[str, Any]:
    return {"data": {"type": "metric", "attributes": {"name": name}}}


def profile(**attributes: Any) -> dict[str, Any]:
    return {"data": {"type": "profile", "attributes": attributes}}


def nested(depth: int) -> Any:
    return {"a": nested(depth - 1)} if depth else 1


def pointer(document: Any) -> str:
    found = document["errors"][0]["source"].get("pointer", "")
    assert isinstance(found, str)
    return found


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Authorization": ""}, 401),
        ({"Authorization": "Klaviyo-API-Key pk_other"}, 401),
        ({"Authorization": f"Bearer {KEY}"}, 401),
        ({"revision": ""}, 400),
        ({"revision": "latest"}, 400),
        ({"Content-Type": "text/plain"}, 415),
    ],
)
def test_headers_are_required(headers: dict[str, str], status: int, call: Caller) -> None:
    """Every request needs a key, a revision and a media type."""
    assert call("POST", "/api/events", event(), **headers)[0] == status


def test_event_is_accepted_with_an_empty_response(call: Caller, sandbox: Sandbox) -> None:
    """The status is 202, and the profile is created."""
    body = event(value=1.5, value_currency="EUR", time="2026-11-01T00:00:00Z")
    assert call("POST", "/api/events", body) == (202, None)
    assert [(e["metric"], e["value"], e["email"]) for e in sandbox.account.events] == [
        ("Placed Order", 1.5, "ada@example.com")
    ]
    assert len(sandbox.account.profiles) == 1


@pytest.mark.parametrize(
    ("attributes", "where"),
    [
        ({"uniqueId": "1"}, "uniqueId"),
        ({"properties": None}, "properties"),
        ({"properties": {f"p{n}": n for n in range(401)}}, "properties"),
        ({"properties": {"list": list(range(4_001))}}, "properties"),
        ({"properties": {"text": "x" * 100_001}}, "properties"),
        ({"properties": nested(11)}, "properties"),
        ({"metric": None}, "metric"),
        ({"metric": metric_named("")}, "metric"),
        ({"metric": metric_named("x" * 128)}, "metric"),
        ({"profile": None}, "profile"),
        ({"profile": profile()}, "profile"),
        ({"profile": profile(first_name="Ada")}, "profile"),
        ({"profile": profile(email="ada@example.com", phone_number="030 1")}, "phone_number"),
        ({"value": "1.5"}, "value"),
        ({"value": True}, "value"),
        ({"value_currency": "euro"}, "value_currency"),
        ({"unique_id": 1}, "unique_id"),
        ({"time": "yesterday"}, "time"),
        ({"time": "2026-11-01T00:00:00"}, "time"),
        ({"time": "2026-13-01T00:00:00Z"}, "time"),
        ({"profile": profile(email="ada@example.com", shoe_size=38)}, "shoe_size"),
        ({"time": "1989-12-31T00:00:00Z"}, "time"),
        ({"time": "2199-01-01T00:00:00Z"}, "time"),
    ],
)
def test_invalid_event_is_refused_with_a_pointer(
    attributes: dict[str, Any], where: str, call: Caller, sandbox: Sandbox
) -> None:
    """Names, types and limits are Klaviyo's."""
    status, document = call("POST", "/api/events", event(**attributes))
    assert status == 400
    assert where in pointer(document)
    assert sandbox.account.events == []


def test_values_at_the_limits_are_accepted(call: Caller) -> None:
    """The limits are 400 properties, 4,000 items, 100 KB and ten levels."""
    properties: dict[str, Any] = {f"p{n}": n for n in range(397)}
    properties |= {"list": list(range(4_000)), "text": "x" * 100_000, "deep": nested(9)}
    assert call("POST", "/api/events", event(properties=properties))[0] == 202


def test_bodies_have_a_maximum_size(call: Caller) -> None:
    """The maximum is 5 MB for events and 100 KB for a profile."""
    assert call("POST", "/api/events", b'"' + b"x" * 5_000_000 + b'"')[0] == 413
    assert call("POST", "/api/profile-import", b'"' + b"x" * 100_000 + b'"')[0] == 413
    assert call("POST", "/api/events", b"{")[0] == 400


def test_event_updates_its_profile(call: Caller, sandbox: Sandbox) -> None:
    """No import is needed before an event. An identifier of another profile is ignored."""
    who = profile(email="ada@example.com", external_id="x", first_name="Ada", anonymous_id="a")
    call("POST", "/api/events", event(profile=who))
    call("POST", "/api/events", event(profile=profile(external_id="x", last_name="Byron"), unique_id="2"))
    (found,) = sandbox.account.profiles
    assert (
        found["attributes"].items() >= {"first_name": "Ada", "last_name": "Byron", "email": "ada@example.com"}.items()
    )
    call("POST", "/api/profile-import", profile(email="grace@example.com"))
    call("POST", "/api/events", event(profile=profile(email="grace@example.com", external_id="x"), unique_id="3"))
    assert [each["attributes"].get("external_id") for each in sandbox.account.profiles] == ["x", None]


def test_event_is_recorded_once_per_profile_metric_and_id(call: Caller, sandbox: Sandbox) -> None:
    """Repeats have the same response. Without unique_id, the time in seconds is the id."""
    other = profile(email="grace@example.com")
    for attributes in ({}, {}, {"unique_id": "2"}, {"profile": other}, {"metric": metric_named("Other")}):
        assert call("POST", "/api/events", event(**attributes))[0] == 202
    assert len(sandbox.account.events) == 4
    for time in ("2026-01-01T00:00:00.1Z", "2026-01-01T00:00:00.9Z", "2026-01-01T00:00:01Z"):
        call("POST", "/api/events", event(unique_id=None, time=time))
    assert len(sandbox.account.events) == 6
    assert sandbox.account.repeated_events == 2


def bulk(*ids: str, **attributes: Any) -> dict[str, Any]:
    events = []
    for entry_id in ids:
        entry = event(unique_id=entry_id, **attributes)["data"]
        events.append({**entry, "attributes": {k: v for k, v in entry["attributes"].items() if k != "profile"}})
    who = {"data": {"type": "profile", "attributes": {"email": "ada@example.com"}}}
    entries = [{"type": "event-bulk-create", "attributes": {"profile": who, "events": {"data": events}}}]
    return {"data": {"type": "event-bulk-create-job", "attributes": {"events-bulk-create": {"data": entries}}}}


BULK = "/api/event-bulk-create-jobs"


def test_bulk_call_is_all_or_nothing(call: Caller, sandbox: Sandbox) -> None:
    """One invalid event, a repeated id or too many events refuse the whole call."""
    bad = bulk("1", "2")
    entries = bad["data"]["attributes"]["events-bulk-create"]["data"][0]["attributes"]["events"]["data"]
    entries[1]["attributes"]["value"] = "text"
    status, document = call("POST", BULK, bad)
    assert (status, "/data/0/attributes/events/data/1/" in pointer(document)) == (400, True)
    assert call("POST", BULK, bulk("1", "1"))[0] == 400
    assert call("POST", BULK, bulk(*(str(n) for n in range(1_001))))[0] == 400
    assert call("POST", BULK, {"data": {"type": "event-bulk-create-job", "attributes": {}}})[0] == 400
    assert sandbox.account.events == []
    assert call("POST", BULK, bulk(*(str(n) for n in range(1_000)))) == (202, None)
    assert len(sandbox.account.events) == 1_000


def test_invalid_profile_in_a_bulk_call_has_a_pointer(call: Caller, sandbox: Sandbox) -> None:
    """The pointer names the entry, as Klaviyo's does. Nothing is recorded."""
    several = bulk("0")
    entries = several["data"]["attributes"]["events-bulk-create"]["data"]
    entries += [bulk(str(number))["data"]["attributes"]["events-bulk-create"]["data"][0] for number in range(1, 10)]
    entries[7]["attributes"]["profile"]["data"]["attributes"]["phone_number"] = "123"
    status, document = call("POST", BULK, several)
    assert status == 400
    assert pointer(document) == (
        "/data/attributes/events-bulk-create/data/7/attributes/profile/data/attributes/phone_number"
    )
    assert sandbox.account.events == []


def test_profile_is_given_once_per_bulk_entry(call: Caller, sandbox: Sandbox) -> None:
    """Events in an entry have no profile of their own. Two entries can have the same profile."""
    inside = bulk("1")
    first = inside["data"]["attributes"]["events-bulk-create"]["data"][0]["attributes"]
    first["events"]["data"][0]["attributes"]["profile"] = first["profile"]
    status, document = call("POST", BULK, inside)
    assert (status, pointer(document)[-8:]) == (400, "/profile")
    other = bulk("1")["data"]["attributes"]["events-bulk-create"]["data"][0]
    other["attributes"]["profile"]["data"]["attributes"]["external_id"] = "x"
    twice = bulk("1")
    twice["data"]["attributes"]["events-bulk-create"]["data"].append(other)
    assert call("POST", BULK, twice)[0] == 400
    assert sandbox.account.profiles == []
    without = bulk("1", "2")
    for each in without["data"]["attributes"]["events-bulk-create"]["data"][0]["attributes"]["events"]["data"]:
        del each["attributes"]["unique_id"]
    assert call("POST", BULK, without)[0] == 202


def test_rejected_repeat_records_nothing() -> None:
    """No event or profile is created, whether the first event was sent alone or in bulk."""
    with Sandbox(account=Account("refuse")) as sandbox:
        call = Caller(sandbox)
        call("POST", "/api/events", event(unique_id="1"))
        mixed = bulk("1")
        new = bulk("2")["data"]["attributes"]["events-bulk-create"]["data"][0]
        new["attributes"]["profile"]["data"]["attributes"] = {"email": "grace@example.com"}
        mixed["data"]["attributes"]["events-bulk-create"]["data"].insert(0, new)
        assert call("POST", BULK, mixed)[0] == 400
        assert (len(sandbox.account.events), len(sandbox.account.profiles)) == (1, 1)


@pytest.mark.parametrize(
    ("repeats", "status", "events"), [("ignore", 202, 2), ("refuse", 400, 1), ("drop", 202, 1), ("duplicate", 202, 3)]
)
def test_repeats_of_earlier_calls_are_configurable(repeats: str, status: int, events: int) -> None:
    """Klaviyo does not document its behaviour, so the emulator has four."""
    with Sandbox(account=Account(repeats)) as sandbox:
        call = Caller(sandbox)
        call("POST", BULK, bulk("1"))
        assert call("POST", BULK, bulk("1", "2"))[0] == status
        assert len(sandbox.account.events) == events
        call("POST", "/api/events", event(unique_id="1"))
        assert len(sandbox.account.events) == events


def test_events_are_filtered_sorted_and_paged(call: Caller, sandbox: Sandbox) -> None:
    """Unknown filters and sorts are rejected."""
    for number, hour in enumerate((12, 10, 11)):
        call("POST", "/api/events", event(unique_id=str(number), time=f"2026-11-01T{hour}:00:00Z"))
    call("POST", "/api/events", event(unique_id="9", profile=profile(email="bob@example.com")))
    ada = sandbox.account.find_profiles("email", "ada@example.com")[0]["id"]
    query = f'/api/events?filter=equals(profile_id,"{ada}")&sort='
    for sort, hours in {"-datetime": [12, 11, 10], "timestamp": [10, 11, 12]}.items():
        found = call("GET", f"{query}{sort}")[1]["data"]
        assert [each["attributes"]["datetime"] for each in found] == [f"2026-11-01T{h}:00:00+00:00" for h in hours]
    page = call("GET", f"{query}datetime&page%5Bsize%5D=2")[1]
    assert len(page["data"]) == 2
    assert "cursor" in page["links"]["next"]
    assert len(call("GET", "/api/events?page%5Bsize%5D=1000")[1]["data"]) == 4
    for bad in (f"{query}value", "/api/events?page%5Bsize%5D=1001", '/api/events?filter=equals(metric_id,"1")'):
        assert call("GET", bad)[0] == 400


def test_backfill_is_marked_on_an_event_or_on_its_entry(call: Caller, sandbox: Sandbox) -> None:
    """The mark is true, false or absent, and is recorded."""
    assert call("POST", "/api/events", event(backfill=True))[0] == 202
    assert call("POST", "/api/events", event(unique_id="2"))[0] == 202
    assert call("POST", "/api/events", event(backfill="yes"))[0] == 400
    marked = bulk("3")
    marked["data"]["attributes"]["events-bulk-create"]["data"][0]["attributes"]["backfill"] = True
    assert call("POST", BULK, marked)[0] == 202
    assert [each["backfill"] for each in sandbox.account.events] == [True, None, True]


def test_events_of_a_bulk_call_are_readable_later() -> None:
    """They take as long as jobs. Single events are readable immediately."""
    account = Account(job_seconds=3600)
    single, bulk = event()["data"]["attributes"], event(unique_id="2")["data"]
    profile_of_bulk = bulk["attributes"].pop("profile")
    account.create_event(single)
    entry = {"profile": profile_of_bulk, "events": {"data": [bulk]}}
    account.create_events([{"type": "event-bulk-create", "attributes": entry}])
    assert len(account.events) == 2
    assert [each["unique_id"] for each in account.visible_events()] == ["1"]


@pytest.mark.parametrize(
    ("attributes", "where"),
    [
        ({}, "/data"),
        ({"first_name": "Ada"}, "/data"),
        ({"email": "nonsense"}, "email"),
        ({"email": "x" * 100 + "@example.com"}, "email"),
        ({"phone_number": "+49 30 901820"}, "phone_number"),
        ({"phone_number": "+4912"}, "phone_number"),
        ({"external_id": "x" * 256}, "external_id"),
        ({"email": "ada@example.com", "firstName": "Ada"}, "firstName"),
        ({"email": "ada@example.com", "title": 5}, "title"),
        ({"anonymous_id": "x"}, "anonymous_id"),
        ({"email": "ada@example.com", "location": {"street": "x"}}, "location"),
    ],
)
def test_invalid_profile_is_rejected(attributes: dict[str, Any], where: str, call: Caller) -> None:
    """The cases cover identifiers, names and types."""
    status, document = call("POST", "/api/profile-import", profile(**attributes))
    assert status == 400
    assert where in pointer(document)


def test_profile_is_created_then_partially_updated(call: Caller, sandbox: Sandbox) -> None:
    """Absent attributes stay, null clears, and properties are merged."""
    first = profile(email="ada@example.com", title="Dr", first_name="Ada", properties={"a": 1, "b": 2})
    second = profile(email="ada@example.com", title=None, properties={"b": 3})
    assert [call("POST", "/api/profile-import", body)[0] for body in (first, second)] == [201, 200]
    attributes = sandbox.account.profiles[0]["attributes"]
    assert (attributes["title"], attributes["first_name"]) == (None, "Ada")
    assert attributes["properties"] == {"a": 1, "b": 3}


def test_identifiers_of_two_profiles_are_a_conflict(call: Caller) -> None:
    """The response names the other profile. An update by id conflicts as well."""
    ids = [
        call("POST", "/api/profile-import", profile(**{name: value}))[1]["data"]["id"]
        for name, value in (("email", "ada@example.com"), ("external_id", "x"))
    ]
    both = profile(email="ada@example.com", external_id="x")
    status, document = call("POST", "/api/profile-import", both)
    assert (status, document["errors"][0]["code"]) == (409, "duplicate_profile")
    assert document["errors"][0]["meta"]["duplicate_profile_id"] == ids[1]
    both["data"]["id"] = ids[0]
    assert call("PATCH", f"/api/profiles/{ids[0]}", both)[0] == 409
    assert call("PATCH", f"/api/profiles/{ids[1]}", both)[0] == 400
    assert call("PATCH", "/api/profiles/NONE", {"data": both["data"] | {"id": "NONE"}})[0] == 404


def test_profile_is_created_once(call: Caller, sandbox: Sandbox) -> None:
    """Creating does not update, and the conflict names the existing profile."""
    created = call("POST", "/api/profiles", profile(email="ada@example.com", phone_number="+4930901820"))
    assert created[0] == 201
    status, document = call("POST", "/api/profiles", profile(phone_number="+4930901820"))
    assert (status, document["errors"][0]["meta"]["duplicate_profile_id"]) == (409, created[1]["data"]["id"])
    assert call("POST", "/api/profiles", profile(first_name="Ada"))[0] == 400
    assert len(sandbox.account.profiles) == 1


def test_released_identifier_can_be_reused(call: Caller) -> None:
    """A changed or cleared identifier matches no profile."""
    ada = call("POST", "/api/profiles", profile(email="ada@example.com", external_id="x"))[1]["data"]["id"]
    change = profile(email="countess@example.com", external_id=None)
    change["data"]["id"] = ada
    assert call("PATCH", f"/api/profiles/{ada}", change)[0] == 200
    for attributes in ({"email": "ada@example.com"}, {"external_id": "x"}):
        assert call("POST", "/api/profiles", profile(**attributes))[0] == 201
    assert call("POST", "/api/profile-import", profile(email="countess@example.com"))[1]["data"]["id"] == ada


def test_profiles_are_found_by_id_and_identifier(call: Caller) -> None:
    """Other filters are rejected."""
    made = [call("POST", "/api/profiles", profile(email=f"p{n}@example.com"))[1]["data"] for n in range(21)]
    assert call("GET", f"/api/profiles/{made[3]['id']}") == (200, {"data": made[3]})
    assert call("GET", "/api/profiles/none")[0] == 404
    query = "/api/profiles?filter=any%28email%2C%5B%22p1%40example.com%22%2C%22p2%40example.com%22%5D%29"
    assert call("GET", query)[1]["data"] == made[1:3]
    assert len(call("GET", "/api/profiles")[1]["data"]) == 20
    for bad in ("filter=equals(colour,%22red%22)", "filter=email", "page%5Bsize%5D=101", "page%5Bcursor%5D=x"):
        assert call("GET", f"/api/profiles?{bad}")[0] == 400


def test_deletion_requires_exactly_one_identifier(call: Caller, sandbox: Sandbox) -> None:
    """An external_id is not accepted."""
    created = call("POST", "/api/profile-import", profile(email="ada@example.com", external_id="x"))[1]["data"]
    found = call("GET", "/api/profiles?filter=equals%28external_id%2C%22x%22%29")[1]["data"]
    assert [entry["id"] for entry in found] == [created["id"]]

    def deletion(**who: Any) -> dict[str, Any]:
        data = {"type": "profile", "attributes": {}} | who
        return {"data": {"type": "data-privacy-deletion-job", "attributes": {"profile": {"data": data}}}}

    path = "/api/data-privacy-deletion-jobs"
    assert call("POST", path, deletion())[0] == 400
    assert call("POST", path, deletion(attributes={"external_id": "x"}))[0] == 400
    assert call("POST", path, deletion(id=created["id"], attributes={"email": "ada@example.com"}))[0] == 400
    assert call("POST", path, deletion(id=created["id"])) == (202, None)
    assert sandbox.account.profiles == []


ITEM = {"external_id": "p", "title": "T", "description": "", "url": "None"}
VARIANT = ITEM | {"external_id": "s", "sku": "s", "inventory_quantity": 1, "price": 2}


def entry(kind: str, attributes: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"data": {"type": f"catalog-{kind}", "attributes": attributes, **more}}


def of_item(item: str) -> dict[str, Any]:
    return {"relationships": {"item": {"data": {"type": "catalog-item", "id": PREFIX + item}}}}


def test_catalog_entries_are_not_upserted(call: Caller) -> None:
    """Creating an existing entry and updating a missing one are rejected."""
    path = f"/api/catalog-items/{PREFIX}p"
    update = entry("item", {"title": "New"}, id=PREFIX + "p")
    assert call("PATCH", path, update)[0] == 404
    assert call("POST", "/api/catalog-items", entry("item", ITEM))[0] == 201
    assert call("POST", "/api/catalog-items", entry("item", ITEM))[0] == 409
    assert call("PATCH", path, update)[1]["data"]["attributes"]["title"] == "New"
    assert call("PATCH", path.replace("$", "%24").replace(":", "%3A"), update)[0] == 200
    assert call("PATCH", path, entry("item", {"title": "New"}, id=PREFIX + "other"))[0] == 400
    assert call("PATCH", path, entry("item", {"external_id": "p"}, id=PREFIX + "p"))[0] == 400
    assert call("GET", path)[0] == 200
    assert [call("DELETE", path)[0] for _ in range(2)] == [204, 404]
    assert call("GET", "/api/catalog-items/p")[0] == 404


@pytest.mark.parametrize(
    ("kind", "attributes"),
    [
        ("item", {k: v for k, v in ITEM.items() if k != "title"}),
        ("item", ITEM | {"sku": "s"}),
        ("item", ITEM | {"price": "5"}),
        ("item", ITEM | {"integration_type": "$shopify"}),
        ("item", ITEM | {"catalog_type": "summer"}),
        ("item", ITEM | {"custom_metadata": {"deep": {}}}),
        ("item", ITEM | {"custom_metadata": {"text": "x" * 100_000}}),
        ("variant", {k: v for k, v in VARIANT.items() if k != "sku"}),
        ("variant", VARIANT | {"inventory_policy": 3}),
        ("category", {"external_id": "c"}),
    ],
)
def test_invalid_catalog_entry_is_rejected(kind: str, attributes: dict[str, Any], call: Caller) -> None:
    """Attributes are missing, unknown, of the wrong type, nested or too large."""
    path = {"item": "items", "variant": "variants", "category": "categories"}[kind]
    assert call("POST", f"/api/catalog-{path}", entry(kind, attributes, **of_item("p")))[0] == 400


def test_references_of_entries_must_exist(call: Caller) -> None:
    """An item has categories and a variant has an item, which cannot change."""
    categories = {"categories": {"data": [{"type": "catalog-category", "id": PREFIX + "c"}]}}
    assert call("POST", "/api/catalog-items", entry("item", ITEM, relationships=categories))[0] == 404
    call("POST", "/api/catalog-categories", entry("category", {"external_id": "c", "name": "C"}))
    assert call("POST", "/api/catalog-variants", entry("variant", VARIANT, **of_item("p")))[0] == 404
    assert call("POST", "/api/catalog-items", entry("item", ITEM, relationships=categories))[0] == 201
    assert call("POST", "/api/catalog-variants", entry("variant", VARIANT, **of_item("p")))[0] == 201
    update = entry("variant", {"price": 3}, id=PREFIX + "s", **of_item("p"))
    assert call("PATCH", f"/api/catalog-variants/{PREFIX}s", update)[0] == 400


@pytest.mark.parametrize(
    "relationships",
    [
        {"categories": {}},
        {"categories": {"data": [{"type": "catalog-item", "id": PREFIX + "c"}]}},
        {"categories": {"data": [{"type": "catalog-category"}]}},
        {"categories": {"data": "c"}},
        {"colours": {"data": []}},
    ],
)
def test_malformed_relationship_is_rejected(relationships: dict[str, Any], call: Caller, sandbox: Sandbox) -> None:
    """It needs type and id under a known name. Nothing is created."""
    status, document = call("POST", "/api/catalog-items", entry("item", ITEM, relationships=relationships))
    assert (status, "/data/relationships/" in pointer(document)) == (400, True)
    assert sandbox.account.items == {}


def test_variant_has_exactly_one_item(call: Caller) -> None:
    """No item and a list of items are rejected."""
    call("POST", "/api/catalog-items", entry("item", ITEM))
    listed = {"relationships": {"item": {"data": [of_item("p")["relationships"]["item"]["data"]]}}}
    for more in ({}, listed):
        assert call("POST", "/api/catalog-variants", entry("variant", VARIANT, **more))[0] == 400


def test_deletion_includes_dependent_entries(call: Caller, sandbox: Sandbox) -> None:
    """An item is deleted with its variants, and a category is removed from its items."""
    call("POST", "/api/catalog-categories", entry("category", {"external_id": "c", "name": "C"}))
    categories = {"categories": {"data": [{"type": "catalog-category", "id": PREFIX + "c"}]}}
    for name in ("p", "q"):
        item = entry("item", ITEM | {"external_id": name}, relationships=categories)
        call("POST", "/api/catalog-items", item)
        call("POST", "/api/catalog-variants", entry("variant", VARIANT | {"external_id": f"s-{name}"}, **of_item(name)))
    assert call("DELETE", f"/api/catalog-items/{PREFIX}p")[0] == 204
    assert call("DELETE", f"/api/catalog-categories/{PREFIX}c")[0] == 204
    assert list(sandbox.account.variants) == ["s-q"]
    assert call("GET", f"/api/catalog-items/{PREFIX}q/categories")[1]["data"] == []


def test_catalog_lists_can_be_filtered(call: Caller) -> None:
    """An entry does not show its relationships. A filter or a path of its own shows the related entries."""
    for name in "abc":
        call("POST", "/api/catalog-items", entry("item", ITEM | {"external_id": name}))
        call("POST", "/api/catalog-variants", entry("variant", VARIANT | {"external_id": f"s{name}"}, **of_item(name)))

    def found(path: str, text: str) -> list[str]:
        listed = call("GET", f"/api/{path}?{urlencode({'filter': text})}")[1]["data"]
        return [each["id"].removeprefix(PREFIX) for each in listed]

    assert found("catalog-variants", f'equals(item.id,"{PREFIX}b")') == ["sb"]
    assert found("catalog-items", f'any(ids,["{PREFIX}a","{PREFIX}c","{PREFIX}d"])') == ["a", "c"]
    assert call("GET", "/api/catalog-items?filter=equals(item.id,%22x%22)")[0] == 400
    assert "relationships" not in call("GET", f"/api/catalog-variants/{PREFIX}sa")[1]["data"]
    assert found(f"catalog-items/{PREFIX}a/variants", f'any(ids,["{PREFIX}sa","{PREFIX}sb"])') == ["sa"]
    assert found(f"catalog-items/{PREFIX}a/relationships/variants", 'equals(sku,"s")') == ["sa"]
    assert found("catalog-items", 'contains(title,"x")') == []


def test_items_can_include_their_variants(call: Caller) -> None:
    """The items name their variants, which follow in full. Other resources include nothing."""
    for name in "ab":
        call("POST", "/api/catalog-items", entry("item", ITEM | {"external_id": name}))
        call("POST", "/api/catalog-variants", entry("variant", VARIANT | {"external_id": f"s{name}"}, **of_item(name)))
    query = "include=variants&fields%5Bcatalog-variant%5D=price&fields%5Bcatalog-item%5D=title"
    document = call("GET", f"/api/catalog-items?{query}")[1]
    named = [each["relationships"]["variants"]["data"] for each in document["data"]]
    assert named == [[{"type": "catalog-variant", "id": f"{PREFIX}s{name}"}] for name in "ab"]
    assert [set(each["attributes"]) for each in document["included"]] == [{"price"}] * 2
    alone = call("GET", f"/api/catalog-items/{PREFIX}a?include=variants")[1]
    assert alone["data"]["relationships"]["variants"]["data"] == named[0]
    assert call("GET", "/api/catalog-items?include=categories")[0] == 400
    assert call("GET", "/api/catalog-variants?include=item")[0] == 400


def test_categories_and_items_can_be_found_by_each_other(call: Caller) -> None:
    """The relationship is between an item and its categories."""
    call("POST", "/api/catalog-categories", entry("category", {"external_id": "c", "name": "C"}))
    related = {"categories": {"data": [{"type": "catalog-category", "id": PREFIX + "c"}]}}
    call("POST", "/api/catalog-items", entry("item", ITEM, relationships=related))
    call("POST", "/api/catalog-items", entry("item", ITEM | {"external_id": "q"}))
    in_category = urlencode({"filter": f'equals(category.id,"{PREFIX}c")'})
    of_item = urlencode({"filter": f'equals(item.id,"{PREFIX}p")'})
    for path in (f"catalog-items?{in_category}", f"catalog-categories/{PREFIX}c/items"):
        assert [each["id"] for each in call("GET", f"/api/{path}")[1]["data"]] == [PREFIX + "p"]
    for path in (f"catalog-categories?{of_item}", f"catalog-items/{PREFIX}p/categories"):
        assert [each["id"] for each in call("GET", f"/api/{path}")[1]["data"]] == [PREFIX + "c"]


def test_link_to_the_next_page_keeps_the_filter(call: Caller) -> None:
    """A client that follows the links reads each match once."""
    for name in "pq":
        call("POST", "/api/catalog-items", entry("item", ITEM | {"external_id": name}))
        for number in range(3):
            variant = entry("variant", VARIANT | {"external_id": f"{name}{number}"}, **of_item(name))
            call("POST", "/api/catalog-variants", variant)
    query = urlencode({"filter": f'equals(item.id,"{PREFIX}q")', "page[size]": 2})
    first = call("GET", f"/api/catalog-variants?{query}")[1]
    second = call("GET", "/api/" + first["links"]["next"].partition("/api/")[2])[1]
    assert [each["id"] for each in first["data"] + second["data"]] == [f"{PREFIX}q{n}" for n in range(3)]
    assert second["links"]["next"] is None


def test_variants_of_an_item_are_paged(call: Caller) -> None:
    """A page has at most 100 variants and a link to the next page."""
    call("POST", "/api/catalog-items", entry("item", ITEM))
    for number in range(5):
        variant = deepcopy(VARIANT) | {"external_id": f"s {number}"}
        call("POST", "/api/catalog-variants", entry("variant", variant, **of_item("p")))
    path = f"/api/catalog-items/{PREFIX}p/variants?page%5Bsize%5D=2"
    seen = []
    while path:
        page = call("GET", path)[1]
        seen += [variant["id"] for variant in page["data"]]
        path = (page["links"]["next"] or "").partition("/api/")[2]
        path = f"/api/{path}" if path else ""
    assert seen == [f"{PREFIX}s {number}" for number in range(5)]
    assert call("GET", f"/api/catalog-items/{PREFIX}none/variants")[0] == 404


def test_endpoints_have_their_own_rate_limits() -> None:
    """Profiles have 75 requests a second, and the 76th response has Retry-After."""
    with Sandbox(rate_limits=True) as limited:
        call = Caller(limited)
        statuses = [call("POST", "/api/profile-import", profile(email="ada@example.com"))[0] for _ in range(200)]
        assert statuses.count(429) > 0
        assert statuses.index(429) >= 75
        assert call("POST", "/api/events", event())[0] == 202


def test_rate_limit_headers() -> None:
    """All responses have the headers of the long window, except a 429, which has only Retry-After."""
    with Sandbox(rate_limits=True) as limited:
        url = f"{limited.klaviyo.url}/api/data-privacy-deletion-jobs"
        responses = [urllib3.request("POST", url, body=b"{}", headers=HEADERS, retries=False) for _ in range(20)]
        assert (responses[0].status, responses[0].headers["RateLimit-Limit"]) == (400, "3, 3;w=1, 60;w=60")
        left = [int(response.headers["RateLimit-Remaining"]) for response in responses if response.status == 400]
        assert left[0] == 59
        assert len(set(left)) > 1
        assert 0 < int(responses[0].headers["RateLimit-Reset"]) <= 60
        refused = next(response for response in responses if response.status == 429)
        assert refused.json()["errors"][0]["code"] == "throttled"
        assert refused.headers["Retry-After"] == "1"
        assert not any(name.startswith("RateLimit") for name in refused.headers)


@pytest.mark.parametrize(
    ("request_line", "steady"),
    [
        ("POST /api/events", 3_500),
        ("POST /api/event-bulk-create-jobs", 150),
        ("POST /api/profile-import", 750),
        ("PATCH /api/profiles/x", 750),
        ("GET /api/profile-bulk-import-jobs/x/import-errors", 150),
        ("POST /api/data-privacy-deletion-jobs", 60),
        ("POST /api/catalog-items", 750),
        ("DELETE /api/catalog-items/x", 750),
        ("GET /api/catalog-items/x/variants", 3_500),
        ("GET /api/catalog-variant-bulk-update-jobs/x", 750),
        ("GET /api/catalog-variant-bulk-delete-jobs/x", 3_500),
        ("GET /api/catalog-category-bulk-create-jobs", 3_500),
        ("POST /api/catalog-category-bulk-create-jobs", 750),
    ],
)
def test_every_endpoint_has_a_rate_limit_tier(request_line: str, steady: int) -> None:
    """The tiers are Klaviyo's documented ones."""
    method, path = request_line.split(" ")
    with Sandbox(rate_limits=True) as limited:
        response = urllib3.request(method, limited.klaviyo.url + path, headers=HEADERS, retries=False)
    assert response.headers["RateLimit-Limit"].endswith(f", {steady};w=60")


@pytest.mark.parametrize(("factor", "steady", "burst"), [(10.0, 600, 30), (0.1, 6, 1)])
def test_rate_limits_can_be_multiplied(factor: float, steady: int, burst: int) -> None:
    """The factor applies to the headers and to the enforced limits."""
    klaviyo = KlaviyoApi(Account(), rate_limits=factor)
    path = "/api/data-privacy-deletion-jobs"
    responses = [klaviyo.handle(ApiRequest("POST", path, {}, HEADERS, b"{}", path)) for _ in range(2 * burst + 1)]
    assert responses[0].headers["RateLimit-Limit"] == f"{burst}, {burst};w=1, {steady};w=60"
    assert responses[0].headers["RateLimit-Remaining"] == str(steady - 1)
    statuses = [response.status for response in responses]
    assert burst <= statuses.count(400) <= 2 * burst  # a new second can start in between


def test_rate_limit_can_be_one_number() -> None:
    """Klaviyo documents the header as the number of the long window."""
    klaviyo = KlaviyoApi(Account(), rate_limits=1.0, lists_windows=False)
    request = ApiRequest("GET", "/api/events", {}, HEADERS, b"", "/api/events")
    assert klaviyo.handle(request).headers["RateLimit-Limit"] == "3500"


def test_unknown_paths_are_not_found(call: Caller) -> None:
    """The response is 404."""
    assert call("POST", "/api/nonsense", {})[0] == 404


def test_state_and_faults_over_http(call: Caller, sandbox: Sandbox) -> None:
    """A test in another process can read the state and inject faults."""
    call("POST", "/_sandbox/faults", [{"status": 500, "times": 1, "match": "POST /api/events", "contains": "ada"}])
    assert [call("POST", "/api/events", event())[0] for _ in range(2)] == [500, 202]
    call("POST", "/_sandbox/faults", [{"times": None}])
    call("DELETE", "/_sandbox/faults")
    assert call("GET", "/_sandbox/state")[1]["events"][0]["metric"] == "Placed Order"
    assert [line["status"] for line in call("GET", "/_sandbox/requests")[1]] == [500, 202]
    assert call("GET", "/_sandbox/nonsense")[0] == 404
    sandbox.klaviyo.faults.add(Fault(probability=0.0))
    assert call("POST", "/api/events", event())[0] == 202


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
VALID = {
    "/api/events": event(),
    BULK: bulk("1", "2"),
    "/api/profile-import": profile(email="ada@example.com", location={"city": "London"}, properties={"a": 1}),
    "/api/catalog-items": entry("item", ITEM, relationships={"categories": {"data": []}}),
    "/api/catalog-variants": entry("variant", VARIANT, **of_item("p")),
    "/api/data-privacy-deletion-jobs": {
        "data": {
            "type": "data-privacy-deletion-job",
            "attributes": {"profile": {"data": {"type": "profile", "attributes": {"email": "ada@example.com"}}}},
        }
    },
    "/api/profile-bulk-import-jobs": {
        "data": {
            "type": "profile-bulk-import-job",
            "attributes": {"profiles": {"data": [{"type": "profile", "attributes": {"external_id": "x"}}]}},
        }
    },
    "/api/catalog-item-bulk-update-jobs": {
        "data": {
            "type": "catalog-item-bulk-update-job",
            "attributes": {"items": {"data": [{"type": "catalog-item", "id": PREFIX + "p", "attributes": {}}]}},
        }
    },
}


def spots(document: Any) -> list[tuple[Any, Any]]:
    """Return every (container, key) in a document."""
    if not isinstance(document, dict | list):
        return []
    keys = list(document) if isinstance(document, dict) else list(range(len(document)))
    return [(document, key) for key in keys] + [spot for key in keys for spot in spots(document[key])]


@given(st.data())
def test_any_body_has_a_valid_response(data: st.DataObject) -> None:
    """Any JSON in the place of any value leads to success or a rejection, never to a failure of the emulator."""
    path = data.draw(st.sampled_from(sorted(VALID)))
    body = deepcopy(VALID[path])
    container, key = data.draw(st.sampled_from(spots(body)))
    container[key] = data.draw(JSON)
    klaviyo = KlaviyoApi(Account(), rate_limits=False)
    response = klaviyo.handle(ApiRequest("POST", path, {}, HEADERS, orjson.dumps(body), path))
    assert response.status in {200, 201, 202, 400, 404}
