"""The Klaviyo client: authentication, retries, and the error for each response."""

from __future__ import annotations

import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import product
from threading import Event
from typing import TYPE_CHECKING
from urllib.parse import quote

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import Scripted
from tests.integration.conftest import klaviyo_for, settings_for
from worker.errors import (
    EndpointRefused,
    KlaviyoMisconfigured,
    Rejected,
    RequestBlocked,
    ResponseTooLarge,
    Throttled,
    Transient,
)
from worker.klaviyo.client import Klaviyo, endpoint_of, iter_resources
from worker.klaviyo.responses import success_of
from worker.sandbox import Fault, Sandbox
from worker.transform.catalog import catalog_id

if TYPE_CHECKING:
    from worker.model import Json
    from worker.sandbox.http import ApiRequest, ApiResponse

PROFILE: Json = {"data": {"type": "profile", "attributes": {"email": "ada@example.com"}}}


@pytest.mark.parametrize(
    ("method", "path", "endpoint"),
    [
        ("POST", "/api/events", "POST /api/events"),
        ("PATCH", "/api/profiles/01GDDKASAP8TKDDA2GRZDSVP4H", "PATCH /api/profiles/{id}"),
        ("GET", "/api/profiles?filter=equals(email,%22grete%40mail.example%22)", "GET /api/profiles"),
        ("GET", "/api/catalog-items/$custom:::$default:::ab-1/variants?x=id", "GET /api/catalog-items/{id}/variants"),
    ],
)
def test_endpoint_has_no_ids(method: str, path: str, endpoint: str) -> None:
    """Rate limits, breakers and metrics exist per endpoint. Ids would multiply them. A query can name people."""
    assert endpoint_of(method, path) == endpoint


@given(st.text(min_size=1))
def test_endpoint_has_no_sku(sku: str) -> None:
    """Merchants choose SKUs, and a shop can have a hundred thousand."""
    path = f"/api/catalog-variants/{quote(catalog_id(sku), safe='$:')}"
    assert endpoint_of("PATCH", path) == "PATCH /api/catalog-variants/{id}"


def test_call_is_authenticated(sandbox: Sandbox) -> None:
    """It has the key, the revision and the media type that Klaviyo requires."""
    response = klaviyo_for(sandbox).call("POST", "/api/profile-import", PROFILE)
    assert response["data"]["attributes"]["email"] == "ada@example.com"


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504, 520, 524])
def test_transient_status_is_retried(status: int, sandbox: Sandbox) -> None:
    """The caller does not notice a short outage."""
    sandbox.klaviyo.faults.add(Fault(status=status, times=2))
    klaviyo_for(sandbox).call("POST", "/api/profile-import", PROFILE)
    assert [request.status for request in sandbox.klaviyo.requests] == [status, status, 201]


@pytest.mark.parametrize("action", ["respond", "reset", "truncate", "lose_response"])
def test_call_that_is_not_idempotent_is_not_retried(action: str, sandbox: Sandbox) -> None:
    """After a bulk call without a response, it is unknown whether Klaviyo accepted it."""
    sandbox.klaviyo.faults.add(Fault(status=503, times=1, action=action))
    client = klaviyo_for(sandbox)
    with pytest.raises(Transient):
        client.call("POST", "/api/profile-import", PROFILE, idempotent=False)
    assert len(sandbox.klaviyo.requests) == 1
    client.call("POST", "/api/profile-import", orjson.dumps(PROFILE), idempotent=False)
    assert len(sandbox.account.profiles) == 1


def test_retry_after_is_obeyed(sandbox: Sandbox) -> None:
    """The client waits for a short delay. A long delay is in the error, so that the lane waits."""
    client = klaviyo_for(sandbox)
    sandbox.klaviyo.faults.add(Fault(status=429, times=1, headers={"Retry-After": "1"}))
    start = time.monotonic()
    client.call("POST", "/api/profile-import", PROFILE)
    assert time.monotonic() - start >= 1
    sandbox.klaviyo.faults.add(Fault(status=429, times=1, headers={"Retry-After": "600"}))
    with pytest.raises(Throttled) as error:
        client.call("POST", "/api/profile-import", PROFILE)
    assert error.value.retry_after == 600


def test_rate_limiter_gets_every_request_and_response(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """It paces the requests to each endpoint, and adjusts to the responses."""
    client = klaviyo_for(sandbox)
    acquired, updated = Scripted(), Scripted()
    monkeypatch.setattr(client._rate_limiter, "acquire", acquired)
    monkeypatch.setattr(client._rate_limiter, "update", updated)
    sandbox.klaviyo.faults.add(Fault(status=429, times=1, headers={"Retry-After": "1"}))
    client.call("POST", "/api/profile-import", PROFILE)
    assert acquired.calls == [("POST /api/profile-import",)] * 2
    assert [(endpoint, status, retry_after) for endpoint, status, _, retry_after in updated.calls] == [
        ("POST /api/profile-import", 429, 1.0),
        ("POST /api/profile-import", 201, None),
    ]


@pytest.mark.parametrize("header", ["soon", "Wed, 21 Oct 2015 07:28:00 GMT", "-5", "nan", "inf", "99 GMT"])
def test_invalid_retry_after_is_ignored(header: str, sandbox: Sandbox) -> None:
    """After a date in the past, a negative number or a word, the call is retried as usual."""
    sandbox.klaviyo.faults.add(Fault(status=503, times=1, headers={"Retry-After": header}))
    klaviyo_for(sandbox).call("POST", "/api/profile-import", PROFILE)


@pytest.mark.parametrize("action", ["reset", "truncate", "hang", "lose_response"])
def test_idempotent_call_without_a_response_is_retried(action: str, sandbox: Sandbox) -> None:
    """The write may have succeeded. Repeating it has no second effect."""
    sandbox.klaviyo.faults.add(Fault(action=action, times=1, seconds=1.0))
    klaviyo_for(sandbox, read_timeout=0.2).call("POST", "/api/profile-import", PROFILE)
    assert len(sandbox.account.profiles) == 1


def test_shutdown_ends_the_retry_delay(sandbox: Sandbox) -> None:
    """A Retry-After must not delay the shutdown."""
    stopping = Event()
    client = Klaviyo(settings_for(sandbox, retry_timeout=60), stopping)
    stopping.set()
    sandbox.klaviyo.faults.add(Fault(status=503, times=None, headers={"Retry-After": "30"}))
    start = time.monotonic()
    with pytest.raises(Transient):
        client.call("POST", "/api/profile-import", PROFILE)
    assert time.monotonic() - start < 5


def test_rejection_does_not_quote_the_record(sandbox: Sandbox) -> None:
    """The error has the code, the title and the pointer. Klaviyo's detail can quote the record."""
    bad: Json = {"data": {"type": "profile", "attributes": {"email": "ada@example.com", "ada": 1}}}
    with pytest.raises(Rejected) as error:
        klaviyo_for(sandbox).call("POST", "/api/profile-import", bad)
    assert error.value.status == 400
    assert error.value.pointer == "/data/attributes/ada"
    assert str(error.value) == (
        "Klaviyo answered 400 to POST /api/profile-import: Invalid input (invalid) at /data/attributes/ada"
    )


def test_conflict_names_the_other_profile(sandbox: Sandbox) -> None:
    """The error has the id of the profile to write to."""
    client = klaviyo_for(sandbox)
    first = client.call("POST", "/api/profile-import", PROFILE)
    other: Json = {"data": {"type": "profile", "attributes": {"external_id": "x"}}}
    client.call("POST", "/api/profile-import", other)
    both: Json = {"data": {"type": "profile", "attributes": {"external_id": "x", "email": "ada@example.com"}}}
    with pytest.raises(Rejected) as error:
        client.call("POST", "/api/profile-import", both)
    assert error.value.status == 409
    assert error.value.duplicate_id
    assert first["data"]["id"]


SCOPE_OF_EVENTS = Fault(status=403, times=None, match="POST /api/events")


@pytest.mark.parametrize(
    ("status", "todo"),
    [(401, "KLAVIYO_AUTH_KEY"), (403, "scopes"), (405, "KLAVIYO_API_URL"), (410, "KLAVIYO_API_URL")],
)
def test_refusal_of_everything_is_misconfigured(status: int, todo: str, sandbox: Sandbox) -> None:
    """Klaviyo also refuses requests that depend on no message, so the worker parks."""
    sandbox.klaviyo.faults.add(Fault(status=status, times=None))
    client = klaviyo_for(sandbox)
    with pytest.raises(KlaviyoMisconfigured, match=todo):
        client.call("POST", "/api/events", PROFILE)
    assert client.refusal_reason()
    assert client.refused_endpoints() == {}


@pytest.mark.parametrize("status", [401, 403, 405, 410])
def test_refusal_of_one_endpoint_concerns_only_that_endpoint(status: int, sandbox: Sandbox) -> None:
    """Usually a scope is missing. The other endpoints stay in use."""
    sandbox.klaviyo.faults.add(replace(SCOPE_OF_EVENTS, status=status))
    client = klaviyo_for(sandbox)
    for _ in range(2):
        with pytest.raises(EndpointRefused, match=rf"^Klaviyo answered {status} to POST /api/events: check "):
            client.call("POST", "/api/events", PROFILE)
    client.call("POST", "/api/profile-import", PROFILE)
    assert list(client.refused_endpoints()) == ["POST /api/events"]
    assert (client.refusal_reason(), client.outage_reason()) == ("", "")
    assert len([request for request in sandbox.klaviyo.requests if request.path == "/api/events"]) == 2


def test_key_with_a_single_scope_is_not_misconfigured(sandbox: Sandbox) -> None:
    """A key that can only create events is valid: an erasure that it cannot request must not stop the events."""
    for endpoint in ("POST /api/data-privacy", "GET /api/catalog-items", "POST /api/profile-import"):
        sandbox.klaviyo.faults.add(replace(SCOPE_OF_EVENTS, match=endpoint))
    with pytest.raises(EndpointRefused):
        klaviyo_for(sandbox).call("POST", "/api/data-privacy-deletion-jobs", PROFILE)


def test_refused_record_is_blocked(sandbox: Sandbox) -> None:
    """The same endpoint accepts a request that depends on no message, so it stays in use for other records."""
    sandbox.klaviyo.faults.add(Fault(status=403, times=None, contains=b"ada@example.com"))
    client = klaviyo_for(sandbox, retry_timeout=0)
    for _ in range(10):
        with pytest.raises(RequestBlocked, match=r"^Klaviyo answered 403 to POST /api/profile-import$"):
            client.call("POST", "/api/profile-import", PROFILE)
    client.call("POST", "/api/profile-import", {"data": {"type": "profile", "attributes": {"external_id": "x"}}})
    assert (client.outage_reason(), client.refused_endpoints()) == ("", {})


def test_refusal_is_undecided_while_a_neutral_request_fails(sandbox: Sandbox) -> None:
    """Nothing is parked on a guess."""
    sandbox.klaviyo.faults.add(SCOPE_OF_EVENTS, Fault(status=503, times=None, match="GET /api/catalog-items"))
    with pytest.raises(Transient, match=r"^503 to GET"):
        klaviyo_for(sandbox, retry_timeout=0).call("POST", "/api/events", PROFILE)


PAGES = [b"<html>Just a moment...</html>", b'{"message":"Forbidden"}', b'{"errors":["no"]}', b""]
CATALOG_ITEM = "/api/catalog-items/$custom:::$default:::x"
REQUESTS = [
    ("POST", "/api/events"),
    ("POST", "/api/profile-bulk-import-jobs"),
    ("PATCH", CATALOG_ITEM),
    ("DELETE", CATALOG_ITEM),
    ("GET", "/api/profiles?filter=equals(external_id,%22x%22)"),
    ("GET", f"{CATALOG_ITEM}/variants"),
]


@pytest.mark.parametrize(
    "status", [200, 201, 202, 302, 400, 401, 402, 403, 404, 405, 406, 409, 410, 413, 421, 422, 431, 451]
)
def test_response_that_is_not_klaviyos_is_transient(status: int, sandbox: Sandbox) -> None:
    """The error says what came."""
    for (method, path), body in product(REQUESTS, PAGES):
        if (status, body, path) == (202, b"", "/api/events"):
            continue  # this is Klaviyo's response
        sandbox.klaviyo.faults.clear()
        sandbox.klaviyo.faults.add(
            Fault(status=status, times=None, body=body, headers={"Content-Type": "text/html; x"})
        )
        content = "text/html" if body else "an empty body"
        with pytest.raises(Transient, match=rf"^not Klaviyo's response: {status} with {content} to ") as error:
            klaviyo_for(sandbox, retry_timeout=0).call(method, path, PROFILE if method in {"POST", "PATCH"} else None)
        assert not isinstance(error.value, RequestBlocked)


@pytest.mark.parametrize(("method", "path"), [("POST", "/api/events"), ("GET", "/api/profiles")])
def test_endless_response_is_transient(
    method: str, path: str, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker reads no more than the limit, and the next request is answered as usual."""
    monkeypatch.setattr("worker.http.transport.MAX_BODY_BYTES", 100_000)
    sandbox.klaviyo.faults.add(Fault(status=200, times=1, body=b" " * 200_000))
    client = klaviyo_for(sandbox, retry_timeout=0)
    with pytest.raises(ResponseTooLarge, match="more than 100,000 bytes"):
        client.call(method, path, PROFILE if method == "POST" else None)
    client.call("POST", "/api/profile-import", PROFILE)


def test_page_of_a_gateway_opens_the_circuit(sandbox: Sandbox) -> None:
    """It is an outage of the endpoint."""
    sandbox.klaviyo.faults.add(Fault(status=404, times=None, body=PAGES[0]))
    client = klaviyo_for(sandbox, retry_timeout=0)
    for _ in range(5):
        with pytest.raises(Transient):
            client.call("DELETE", CATALOG_ITEM)
    assert client.outage_reason().startswith("not Klaviyo's response: 404")


@pytest.mark.parametrize(
    ("method", "path", "status", "body"),
    [
        ("POST", "/api/events", 202, b'{"status":"queued"}'),
        ("POST", "/api/events", 200, b""),
        ("POST", "/api/profile-import", 201, b'{"data":null}'),
        ("POST", "/api/profile-import", 202, b'{"data":{"type":"profile","id":"1"}}'),
        ("POST", "/api/catalog-items", 200, b'{"data":{"id":"1"}}'),
        ("POST", "/api/catalog-item-bulk-create-jobs", 202, b'{"data":{}}'),
        ("PATCH", CATALOG_ITEM, 204, b""),
        ("DELETE", CATALOG_ITEM, 200, b'{"message":"ok"}'),
        ("GET", "/api/profiles", 200, b'{"data":null}'),
        ("GET", "/api/profiles", 200, b'{"data":{"id":"1"}}'),
        ("GET", "/api/profiles", 200, b'{"data":[{"type":"profile"}]}'),
        ("GET", "/api/catalog-item-bulk-create-jobs/1", 200, b'{"data":[]}'),
    ],
)
def test_success_of_another_shape_is_transient(
    method: str, path: str, status: int, body: bytes, sandbox: Sandbox
) -> None:
    """Klaviyo documents the status and the shape of each endpoint's success."""
    sandbox.klaviyo.faults.add(Fault(status=status, times=None, body=body))
    with pytest.raises(Transient, match=r"^not Klaviyo's response: "):
        klaviyo_for(sandbox, retry_timeout=0).call(method, path, PROFILE if method in {"POST", "PATCH"} else None)


@pytest.mark.parametrize("status", [400, 403, 404, 413])
@pytest.mark.parametrize(
    ("method", "path"), [("POST", "/api/events"), ("POST", "/api/catalog-items"), ("PATCH", CATALOG_ITEM)]
)
def test_page_for_one_record_is_blocked(status: int, method: str, path: str, sandbox: Sandbox) -> None:
    """A firewall refuses the data of one record. Klaviyo itself answers a neutral request to the same endpoint."""
    sandbox.klaviyo.faults.add(Fault(status=status, times=None, body=PAGES[0], contains=b"ada@example.com"))
    client = klaviyo_for(sandbox, retry_timeout=0)
    for _ in range(10):
        with pytest.raises(RequestBlocked, match="not Klaviyo's response"):
            client.call(method, path, PROFILE)
    assert client.outage_reason() == ""


def test_short_challenge_is_retried(sandbox: Sandbox) -> None:
    """Cloudflare occasionally answers 403 with HTML although the key is valid."""
    sandbox.klaviyo.faults.add(Fault(status=403, times=1, body=PAGES[0]))
    klaviyo_for(sandbox).call("POST", "/api/profile-import", PROFILE)


def test_every_endpoint_needs_a_defined_success() -> None:
    """Otherwise anything would count as one."""
    with pytest.raises(LookupError, match="PUT /api/events"):
        success_of("PUT /api/events")


def with_next_link(sandbox: Sandbox, next_url: str) -> None:
    """Replace the links to the next page in all lists."""
    handle = sandbox.klaviyo.handle

    def respond(request: ApiRequest) -> ApiResponse:
        response = handle(request)
        response.document["links"] = {"next": next_url}
        return response

    sandbox.klaviyo.handle = respond


def test_list_is_read_to_its_end(sandbox: Sandbox) -> None:
    """A page of the emulator has 20 entries."""
    for number in range(45):
        entry = {"type": "catalog-category", "attributes": {"external_id": f"c{number}", "name": "x"}}
        sandbox.account.create_entry("catalog-category", entry)
    found = list(iter_resources(klaviyo_for(sandbox), "/api/catalog-categories"))
    assert len({resource["id"] for resource in found}) == 45


@pytest.mark.parametrize(
    "next_url", ["https://a.klaviyo.com/api/catalog-variants?page=2", "/api/catalog-items?page=2", "?page=2"]
)
def test_link_to_another_list_is_not_followed(next_url: str, sandbox: Sandbox) -> None:
    """The variants of other products would count as variants of this one, and would be deleted."""
    with_next_link(sandbox, next_url)
    with pytest.raises(Transient, match=r"^Klaviyo's link to the next page of GET /api/catalog-categories names"):
        list(iter_resources(klaviyo_for(sandbox), "/api/catalog-categories"))


def test_pages_without_end_are_transient(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """A link can name its own page."""
    monkeypatch.setattr("worker.klaviyo.client.MAX_PAGES", 5)
    with_next_link(sandbox, "https://a.klaviyo.com/api/catalog-categories?page%5Bsize%5D=20")
    with pytest.raises(Transient, match="more than 5 pages"):
        list(iter_resources(klaviyo_for(sandbox), "/api/catalog-categories"))
    assert len(sandbox.klaviyo.requests) == 5


def test_connections_are_reused(sandbox: Sandbox) -> None:
    """Twenty requests need one handshake."""
    client = klaviyo_for(sandbox)
    for _ in range(20):
        client.call("POST", "/api/profile-import", PROFILE)
    (pool,) = client._transport._pool.pools._container.values()
    assert pool.num_connections == 1


def test_only_the_first_call_of_an_outage_is_retried(sandbox: Sandbox) -> None:
    """After a failed call, the next calls send one request each until Klaviyo responds again."""
    client = klaviyo_for(sandbox, retry_timeout=0.5)
    sandbox.klaviyo.faults.add(Fault(status=503, times=None))
    for _ in range(3):
        with pytest.raises(Transient):
            client.call("POST", "/api/profile-import", PROFILE)
    first = len(sandbox.klaviyo.requests) - 2
    assert first > 1
    sandbox.klaviyo.faults.clear()
    client.call("POST", "/api/profile-import", PROFILE)
    sandbox.klaviyo.faults.add(Fault(status=503, times=1))
    client.call("POST", "/api/profile-import", PROFILE)


@pytest.mark.parametrize(
    ("faults", "answers"),
    [
        ([], True),
        ([Fault(status=503, times=None, match="GET /api/catalog-items")], True),
        ([Fault(status=401, times=None)], True),
        ([Fault(status=429, times=None)], True),
        ([Fault(status=503, times=None)], False),
        ([Fault(action="reset", times=None)], False),
    ],
    ids=["works", "one endpoint fails", "refuses the worker", "throttles", "fails", "breaks connections"],
)
def test_klaviyo_is_down_only_if_no_neutral_request_is_answered(
    faults: list[Fault], answers: bool, sandbox: Sandbox
) -> None:
    """Pulling pauses then. The question has no effect in Klaviyo."""
    sandbox.klaviyo.faults.add(*faults)
    assert klaviyo_for(sandbox).answers() is answers
    assert (sandbox.account.profiles, sandbox.account.events) == ([], [])


def test_lower_limits_are_learned_without_a_429() -> None:
    """The account accepts a fraction of the documented limits. The first response reports them."""
    with Sandbox(rate_limits=0.05, latency=0.05) as sandbox, ThreadPoolExecutor(25) as threads:
        client = klaviyo_for(sandbox)
        list(threads.map(lambda _: client.call("GET", "/api/events"), range(25)))
        assert Counter(request.status for request in sandbox.klaviyo.requests) == {200: 25}
        assert client.rate_limit_status()["GET /api/events"].burst == 18
