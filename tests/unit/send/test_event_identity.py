"""The identifiers of events: no event moves an email address from one profile to another."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlsplit

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.klaviyo_account import AccountClient
from tests.support.sender import Sender
from worker.errors import EndpointRefused, Rejected, RequestBlocked, Transient, WorkerError
from worker.model import Operation, OperationKind
from worker.send.event_identity import EventIdentities
from worker.transform.order_events import event_operation

if TYPE_CHECKING:
    from worker.klaviyo.client import Body
    from worker.model import Json

_FILTER = re.compile(r"any\((external_id|email),(\[.*\])\)")


class Klaviyo:
    """A fake account. `errors`: what a filter with this value raises; "*": any filter."""

    def __init__(self, *profiles: Json) -> None:
        self.profiles = list(profiles)
        self.errors: dict[str, WorkerError] = {}
        self.filters: list[tuple[str, list[str]]] = []

    def call(self, method: str, path: str, body: Body = None, *, idempotent: bool = True) -> Json:
        assert (method, body, idempotent) == ("GET", None, True)
        query = parse_qs(urlsplit(path).query)
        assert query["fields[profile]"] == ["external_id,email"]
        match = _FILTER.fullmatch(query["filter"][0])
        assert match
        name, values = match[1], orjson.loads(match[2])
        self.filters.append((name, values))
        for value in (*values, "*"):
            if value in self.errors:
                raise self.errors[value]
        found = [each for each in self.profiles if str(each.get(name)).lower() in {value.lower() for value in values}]
        return {"data": [{"id": str(id(each)), "attributes": each} for each in found]}

    def requests_sent(self) -> int:
        return len(self.filters)


def event(unique_id: str = "o", **profile: str) -> Operation:
    fields: dict[str, Any] = {"metric": "Placed Order", "time": "2026-11-01T10:00:00Z", "value": None, "properties": {}}
    return event_operation(unique_id=unique_id, profile=profile, **fields)


def sent_with(identities: EventIdentities, *operations: Operation) -> list[Json]:
    """Return the identifiers with which the events would be sent."""
    profiles = []
    for identified in identities.identify(operations):
        assert identified.error is None
        assert identified.operation.resource is not None
        profiles.append(identified.operation.resource["attributes"]["profile"]["data"]["attributes"])
    return profiles


@st.composite
def histories(draw: st.DrawFn) -> list[tuple[str, str]]:
    """Draw events as pairs of customer and email address. "": a guest."""
    emails = st.sampled_from(["a@example.com", "b@example.com", "c@example.com"])
    return draw(st.lists(st.tuples(st.sampled_from(["", "ada", "bob", "eve"]), emails), max_size=8))


@settings(max_examples=int(os.environ.get("EVENT_HISTORIES", "40")), deadline=None)
@given(histories(), histories(), st.sampled_from([1, 3]))
def test_no_event_moves_an_identifier(
    before: list[tuple[str, str]], history: list[tuple[str, str]], batch: int
) -> None:
    """Whatever events arrive, a profile keeps the address and the id that it has. Each customer has one profile."""
    client = AccountClient()
    owners: dict[str, str] = {}
    for customer, email in before:  # what customers' own messages have written
        if customer and customer not in owners.values() and email not in owners:
            owners[email] = customer
            client.profile(external_id=customer, email=email)
    kept: dict[str, Json] = {}
    sender = Sender(client, 1, bulk_threshold=1)
    for start in range(0, len(history), batch):
        people = [{"external_id": who, "email": email} for who, email in history[start : start + batch]]
        events = [event(f"{start}-{n}", **{k: v for k, v in person.items() if v}) for n, person in enumerate(people)]
        assert set(sender.send(events)) <= {None}
        profiles = client.account.profiles
        for profile in profiles:
            attributes = {name: profile["attributes"].get(name) for name in ("email", "external_id")}
            for name, value in kept.get(profile["id"], {}).items():
                assert value in (None, attributes[name]), (name, value)
            kept[profile["id"]] = attributes
        ids = [
            profile["attributes"].get("external_id") for profile in profiles if profile["attributes"].get("external_id")
        ]
        assert len(set(ids)) == len(ids)
    assert {profile["id"] for profile in client.account.profiles} == kept.keys() or not history


ADA = {"external_id": "ada", "email": "ada@example.com"}


def test_new_customer_is_sent_with_both() -> None:
    """An order can arrive before the message about its customer. Its confirmation needs the address."""
    assert sent_with(EventIdentities(Klaviyo()), event(**ADA)) == [ADA]


def test_guest_who_registered_is_sent_with_both() -> None:
    """Klaviyo adds the id to the profile with the address, as for the customer's own message."""
    assert sent_with(EventIdentities(Klaviyo({"email": "Ada@example.com"})), event(**ADA)) == [ADA]


@pytest.mark.parametrize("email", ["ada@example.com", "ada.new@example.com", None])
def test_known_customer_is_sent_with_the_id_alone(email: str | None) -> None:
    """The address that was read from commercetools can be older than the one in Klaviyo. One reading is enough."""
    klaviyo = Klaviyo({"external_id": "ada", "email": email})
    identities = EventIdentities(klaviyo)
    assert sent_with(identities, event(**ADA)) == [{"external_id": "ada"}]
    assert sent_with(identities, event("later", **ADA)) == [{"external_id": "ada"}]
    assert klaviyo.filters == [("external_id", ["ada"])]


def test_address_of_another_customer_is_not_sent() -> None:
    """Two stores can have a customer with the same address."""
    klaviyo = Klaviyo({"external_id": "other", "email": "ADA@example.com"})
    assert sent_with(EventIdentities(klaviyo), event(**ADA)) == [{"external_id": "ada"}]


def test_address_is_sent_for_one_customer_only() -> None:
    """Klaviyo shows a new profile late, so the worker remembers what it sent. It compares without regard to case."""
    identities = EventIdentities(Klaviyo())
    bob = {"external_id": "bob", "email": "Ada@Example.com"}
    assert sent_with(identities, event(**ADA), event("p", **bob)) == [ADA, {"external_id": "bob"}]
    assert sent_with(identities, event(**bob)) == [{"external_id": "bob"}]
    assert sent_with(identities, event(**ADA)) == [ADA]


def test_customer_is_sent_with_one_address_only() -> None:
    """Orders of a customer who is gone have the addresses of their time."""
    identities = EventIdentities(Klaviyo())
    later = {"external_id": "ada", "email": "ada.old@example.com"}
    assert sent_with(identities, event(**ADA), event("p", **later)) == [ADA, {"external_id": "ada"}]
    assert sent_with(identities, event(**later)) == [{"external_id": "ada"}]


def test_address_that_a_customers_own_message_wrote_is_remembered() -> None:
    """Klaviyo shows the profile late. No event gives its address to another customer, or an old address to it."""
    klaviyo = AccountClient()
    klaviyo.account.find_profiles = lambda *_: []  # type: ignore[method-assign]
    profile = {"type": "profile", "attributes": {"external_id": "ada", "email": "Ada@example.com"}}
    sender = Sender(klaviyo, 4)
    assert sender.send([Operation(OperationKind.UPSERT_PROFILE, "ada", profile)]) == [None]
    bob = {"external_id": "bob", "email": "ada@example.com"}
    later = {"external_id": "ada", "email": "ada.old@example.com"}
    assert sender.send([event("b", **bob), event("a", **ADA), event("c", **later)]) == [None] * 3
    sent = [body["data"]["attributes"]["profile"]["data"]["attributes"] for n, body in klaviyo.calls if "events" in n]
    assert sorted(sent, key=str) == [ADA, {"external_id": "ada"}, {"external_id": "bob"}]


def test_other_operations_need_no_reading() -> None:
    """Guests are known by their address alone, and customers without an address by their id alone."""
    klaviyo = Klaviyo()
    operations = [
        event(email="guest@example.com"),
        event(external_id="ada"),
        Operation(OperationKind.DELETE_PROFILE, "ada"),
    ]
    identified = EventIdentities(klaviyo).identify(operations)
    assert [each.operation for each in identified] == operations
    assert klaviyo.filters == []


def test_batch_shares_its_readings() -> None:
    """100 customers need a reading by id; those without a profile one more by address. Each request counts once."""
    klaviyo = Klaviyo(*({"external_id": str(n)} for n in range(150)))
    people = [{"external_id": str(n), "email": f"{n}@example.com"} for n in range(200)]
    events = [event(f"{n}-{line}", **person) for n, person in enumerate(people) for line in range(3)]
    identified = EventIdentities(klaviyo).identify(events)
    assert [len(values) for _, values in klaviyo.filters] == [100, 100, 50]
    assert [each.requests for each in identified[:3]] == [1, 0, 0]
    assert [each.requests for each in identified[-3:]] == [2, 0, 0]


@pytest.mark.parametrize("error", [Transient("503"), RequestBlocked("403")])
def test_event_waits_if_the_person_cannot_be_read(error: WorkerError) -> None:
    """Events of others are sent."""
    klaviyo = Klaviyo({"external_id": "bob"})
    klaviyo.errors["ada@example.com"] = error
    bob = {"external_id": "bob", "email": "bob@example.com"}
    first, second = EventIdentities(klaviyo).identify([event(**ADA), event("p", **bob)])
    assert first.error is error
    assert second.error is None
    klaviyo.errors = {"*": error}
    assert [each.error for each in EventIdentities(klaviyo).identify([event(**ADA), event("p", **bob)])] == [error] * 2


def test_filter_that_klaviyo_rejects_does_not_stop_the_event() -> None:
    """Klaviyo judges the address when it receives the event."""
    klaviyo = Klaviyo()
    klaviyo.errors["ada@example.com"] = Rejected("400", 400)
    assert sent_with(EventIdentities(klaviyo), event(**ADA)) == [ADA]


def test_without_the_scope_both_are_sent() -> None:
    """Events do not wait for the scope profiles:read. Each batch asks once."""
    klaviyo = Klaviyo({"external_id": "other", "email": "ada@example.com"})
    klaviyo.errors["*"] = EndpointRefused("403")
    assert sent_with(EventIdentities(klaviyo), event(**ADA)) == [ADA]
    assert len(klaviyo.filters) == 1
