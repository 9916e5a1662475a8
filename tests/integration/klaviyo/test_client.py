"""The Klaviyo client: authentication, retries, and the error for each response."""

from __future__ import annotations

import time
from threading import Event
from typing import TYPE_CHECKING
from urllib.parse import quote

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import Scripted
from tests.integration.conftest import klaviyo_for, settings_for
from worker.errors import KlaviyoMisconfigured, Rejected, Throttled, Transient
from worker.klaviyo.client import Klaviyo, endpoint_of
from worker.sandbox import Fault
from worker.transform.catalog import catalog_id

if TYPE_CHECKING:
    from worker.model import Json
    from worker.sandbox import Sandbox

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


@pytest.mark.parametrize(
    "header",
    [
        "soon",
        "Wed, 21 Oct 2015 07:28:00 GMT",
        "Wed, 21 Oct 2015 07:28:00 -0000 GMT",
        f"Wed, 21 Oct {10**20} 07:28:00 GMT",
        "-5",
        "nan",
        "inf",
        "99 GMT",
    ],
)
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


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        (Fault(status=401), "KLAVIYO_AUTH_KEY"),
        (Fault(status=403), "scopes"),
        (Fault(status=410), "KLAVIYO_API_URL"),
        (Fault(status=405), "KLAVIYO_API_URL"),
        (Fault(status=302, headers={"Location": "https://example.com"}), "KLAVIYO_API_URL"),
        (Fault(status=404, body=b"<html>"), "KLAVIYO_API_URL"),
    ],
    ids=["401", "403", "410", "405", "302", "not Klaviyo"],
)
def test_status_that_concerns_no_record_is_misconfigured(fault: Fault, expected: str, sandbox: Sandbox) -> None:
    """The worker parks, because no record is at fault."""
    sandbox.klaviyo.faults.add(fault)
    with pytest.raises(KlaviyoMisconfigured, match=expected):
        klaviyo_for(sandbox).call("POST", "/api/events", PROFILE)


def test_success_without_json_is_transient(sandbox: Sandbox) -> None:
    """A maintenance page can have status 200."""
    sandbox.klaviyo.faults.add(Fault(status=200, times=None, body=b"<html>maintenance</html>"))
    with pytest.raises(Transient, match=r"^200 to POST .*/api/events with a body that is not JSON$"):
        klaviyo_for(sandbox, retry_timeout=0.1).call("POST", "/api/events", PROFILE)


def test_challenge_page_is_transient(sandbox: Sandbox) -> None:
    """Cloudflare occasionally answers 403 with HTML although the key is valid."""
    sandbox.klaviyo.faults.add(Fault(status=403, times=1, body=b"<html>Just a moment...</html>"))
    with pytest.raises(Transient, match="challenge"):
        klaviyo_for(sandbox, retry_timeout=0).call("POST", "/api/profile-import", PROFILE)


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
