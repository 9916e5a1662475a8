"""The sandbox refuses what Klaviyo refuses: a stand-in that takes anything proves nothing."""

from __future__ import annotations

from copy import deepcopy
from typing import TYPE_CHECKING, Any

import orjson
import pytest
import urllib3

from worker.sandbox import Fault, Sandbox
from worker.sandbox.account import PREFIX, Account
from worker.sandbox.klaviyo import KEY

if TYPE_CHECKING:
    from collections.abc import Iterator

HEADERS = {
    "Authorization": f"Klaviyo-API-Key {KEY}",
    "revision": "2026-07-15",
    "Content-Type": "application/vnd.api+json",
}


class Caller:
    """Speaks plain HTTP to the Klaviyo stand-in."""

    def __init__(self, sandbox: Sandbox) -> None:
        self._url = sandbox.klaviyo.url
        self._pool = urllib3.PoolManager(retries=False, timeout=5)

    def __call__(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
        content = None if body is None else body if isinstance(body, bytes) else orjson.dumps(body)
        merged = {name: value for name, value in (HEADERS | headers).items() if value}
        answer = self._pool.request(method, self._url + path, body=content, headers=merged)
        return answer.status, orjson.loads(answer.data) if answer.data else None


@pytest.fixture
def sandbox() -> Iterator[Sandbox]:
    with Sandbox() as running:
        yield running


@pytest.fixture
def call(sandbox: Sandbox) -> Caller:
    return Caller(sandbox)


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
    """Key, revision and media type, on every call."""
    assert call("POST", "/api/events", event(), **headers)[0] == status


def test_an_event_is_taken_with_an_empty_answer(call: Caller, sandbox: Sandbox) -> None:
    """202, and the profile comes to be."""
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
        ({"time": "1989-12-31T00:00:00Z"}, "time"),
        ({"time": "2199-01-01T00:00:00Z"}, "time"),
    ],
)
def test_a_bad_event_is_refused_with_its_pointer(
    attributes: dict[str, Any], where: str, call: Caller, sandbox: Sandbox
) -> None:
    """Names, types and limits are Klaviyo's."""
    status, document = call("POST", "/api/events", event(**attributes))
    assert status == 400
    assert where in pointer(document)
    assert sandbox.account.events == []


def test_what_is_at_the_limit_is_taken(call: Caller) -> None:
    """400 properties, 4,000 items, 100 KB, ten levels."""
    properties: dict[str, Any] = {f"p{n}": n for n in range(397)}
    properties |= {"list": list(range(4_000)), "text": "x" * 100_000, "deep": nested(9)}
    assert call("POST", "/api/events", event(properties=properties))[0] == 202


def test_bodies_have_a_size(call: Caller) -> None:
    """5 MB for events, 100 KB for a profile."""
    assert call("POST", "/api/events", b'"' + b"x" * 5_000_000 + b'"')[0] == 413
    assert call("POST", "/api/profile-import", b'"' + b"x" * 100_000 + b'"')[0] == 413
    assert call("POST", "/api/events", b"{")[0] == 400


def test_an_event_counts_once_per_profile_metric_and_id(call: Caller, sandbox: Sandbox) -> None:
    """Repeats are answered like the first; without an id the second of the time counts."""
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


def test_a_bulk_call_is_all_or_nothing(call: Caller, sandbox: Sandbox) -> None:
    """One bad event, a repeated id or too many refuse the whole call."""
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


@pytest.mark.parametrize(("repeats", "status", "events"), [("within", 202, 2), ("ever", 400, 1), ("drop", 202, 1)])
def test_ids_of_earlier_calls_are_an_open_question(repeats: str, status: int, events: int) -> None:
    """Klaviyo does not say; the sandbox plays each answer."""
    with Sandbox(account=Account(repeats)) as sandbox:
        call = Caller(sandbox)
        call("POST", BULK, bulk("1"))
        assert call("POST", BULK, bulk("1", "2"))[0] == status
        assert len(sandbox.account.events) == events


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
        ({"email": "ada@example.com", "location": {"street": "x"}}, "location"),
    ],
)
def test_a_bad_profile_is_refused(attributes: dict[str, Any], where: str, call: Caller) -> None:
    """Identifiers, names and types."""
    status, document = call("POST", "/api/profile-import", profile(**attributes))
    assert status == 400
    assert where in pointer(document)


def test_a_profile_is_created_then_updated_in_part(call: Caller, sandbox: Sandbox) -> None:
    """Absent keeps, null clears, properties merge."""
    first = profile(email="ada@example.com", title="Dr", first_name="Ada", properties={"a": 1, "b": 2})
    second = profile(email="ada@example.com", title=None, properties={"b": 3})
    assert [call("POST", "/api/profile-import", body)[0] for body in (first, second)] == [201, 200]
    attributes = sandbox.account.profiles[0]["attributes"]
    assert (attributes["title"], attributes["first_name"]) == (None, "Ada")
    assert attributes["properties"] == {"a": 1, "b": 3}


def test_identifiers_of_two_profiles_are_a_conflict(call: Caller) -> None:
    """The answer names the other profile; writing to it by id conflicts as well."""
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


def test_a_deletion_takes_exactly_one_identifier(call: Caller, sandbox: Sandbox) -> None:
    """And no external_id."""
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


def test_catalog_entries_are_created_once_and_updated_only_when_there(call: Caller) -> None:
    """Creating is no upsert, and neither is updating."""
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
def test_a_bad_catalog_entry_is_refused(kind: str, attributes: dict[str, Any], call: Caller) -> None:
    """Required, unknown, mistyped, too deep, too large."""
    path = {"item": "items", "variant": "variants", "category": "categories"}[kind]
    assert call("POST", f"/api/catalog-{path}", entry(kind, attributes, **of_item("p")))[0] == 400


def test_what_entries_refer_to_must_exist(call: Caller) -> None:
    """An item's categories, a variant's item; a variant never changes its item."""
    categories = {"categories": {"data": [{"type": "catalog-category", "id": PREFIX + "c"}]}}
    assert call("POST", "/api/catalog-items", entry("item", ITEM, relationships=categories))[0] == 404
    call("POST", "/api/catalog-categories", entry("category", {"external_id": "c", "name": "C"}))
    assert call("POST", "/api/catalog-variants", entry("variant", VARIANT, **of_item("p")))[0] == 404
    assert call("POST", "/api/catalog-items", entry("item", ITEM, relationships=categories))[0] == 201
    assert call("POST", "/api/catalog-variants", entry("variant", VARIANT, **of_item("p")))[0] == 201
    update = entry("variant", {"price": 3}, id=PREFIX + "s", **of_item("p"))
    assert call("PATCH", f"/api/catalog-variants/{PREFIX}s", update)[0] == 400


def test_variants_of_an_item_come_in_pages(call: Caller) -> None:
    """A hundred at the most, and a link to the next."""
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


def test_rate_limits_are_two_windows(sandbox: Sandbox) -> None:
    """75 a second for profiles; the 76th is told when to come back."""
    with Sandbox(rate_limits=True) as limited:
        call = Caller(limited)
        statuses = [call("POST", "/api/profile-import", profile(email="ada@example.com"))[0] for _ in range(200)]
        assert statuses.count(429) > 0
        assert statuses.index(429) >= 75
        assert call("POST", "/api/events", event())[0] == 202


def test_unknown_paths_are_not_found(call: Caller) -> None:
    """Nothing is answered that was not built."""
    assert call("POST", "/api/nonsense", {})[0] == 404


def test_state_and_faults_are_there_for_other_processes(call: Caller, sandbox: Sandbox) -> None:
    """A test that runs the sandbox elsewhere can look and can break things."""
    call("POST", "/_sandbox/faults", [{"status": 500, "times": 1, "match": "POST /api/events", "where": "ada"}])
    assert [call("POST", "/api/events", event())[0] for _ in range(2)] == [500, 202]
    call("POST", "/_sandbox/faults", [{"times": None}])
    call("DELETE", "/_sandbox/faults")
    assert call("GET", "/_sandbox/state")[1]["events"][0]["metric"] == "Placed Order"
    assert [line["status"] for line in call("GET", "/_sandbox/requests")[1]] == [500, 202]
    assert call("GET", "/_sandbox/nonsense")[0] == 404
    sandbox.klaviyo.faults.add(Fault(probability=0.0))
    assert call("POST", "/api/events", event())[0] == 202
