"""The servers follow HTTP and inject exactly the requested faults."""

from __future__ import annotations

import http.client
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

import orjson
import pytest
import urllib3

from tests.unit.sandbox.conftest import HEADERS, Caller
from tests.unit.sandbox.test_klaviyo_rules import BULK, bulk, event, profile
from worker.sandbox import Fault, Sandbox
from worker.sandbox.klaviyo.rate_limits import FixedWindowLimiter, Throttled

if TYPE_CHECKING:
    from collections.abc import Iterator

    from worker.sandbox.http import ApiResponse


def connect(sandbox: Sandbox) -> http.client.HTTPConnection:
    return http.client.HTTPConnection(sandbox.klaviyo.url.removeprefix("http://"), timeout=60)


def post(connection: http.client.HTTPConnection, body: Any) -> http.client.HTTPResponse:
    connection.request("POST", "/api/events", orjson.dumps(body), HEADERS)
    return connection.getresponse()


def test_connection_serves_many_requests_without_delay(sandbox: Sandbox) -> None:
    """A response in two segments would take 40 ms per request, which is 4 s here."""
    connection = connect(sandbox)
    began = time.monotonic()
    for number in range(100):
        response = post(connection, event(unique_id=str(number)))
        assert (response.status, response.read()) == (202, b"")
    assert time.monotonic() - began < 2
    connection.request("HEAD", "/api/profiles", headers=HEADERS)
    assert connection.getresponse().read() == b""
    assert post(connection, event()).status == 202
    connection.close()


def raw_response(sandbox: Sandbox, body: bytes, extra: str = "") -> bytes:
    """Post to /api/events over a socket, and return all bytes until it is closed. Raises ConnectionResetError."""
    host, port = sandbox.klaviyo.url.removeprefix("http://").split(":")
    headers = "".join(f"{name}: {value}\r\n" for name, value in HEADERS.items())
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        head = f"POST /api/events HTTP/1.1\r\n{headers}{extra or f'Content-Length: {len(body)}'}\r\n\r\n"
        connection.sendall(head.encode() + body)
        received = b""
        while chunk := connection.recv(65_536):
            received += chunk
        return received


def test_chunked_body_is_rejected(sandbox: Sandbox) -> None:
    """The server reads bodies by their length only."""
    assert b" 411 " in raw_response(sandbox, b"", "Transfer-Encoding: chunked").splitlines()[0]
    assert not sandbox.klaviyo.requests


@pytest.mark.parametrize(("action", "effects"), [("reset", 0), ("lose_response", 1), ("truncate", 1)])
def test_reset_sends_rst(action: str, effects: int, sandbox: Sandbox) -> None:
    """The connection is reset, not closed. With `lose_response` and `truncate`, the request has its effect first."""
    sandbox.klaviyo.faults.add(Fault(action=action))
    with pytest.raises(ConnectionResetError):
        raw_response(sandbox, orjson.dumps(event()))
    assert len(sandbox.account.events) == effects
    assert [request.status for request in sandbox.klaviyo.requests] == [202 if effects else 0]


@pytest.mark.parametrize("body", [event(), event(value="text")], ids=["empty answer", "long answer"])
def test_truncated_response_is_incomplete(body: Any, sandbox: Sandbox, call: Caller) -> None:
    """If there is no body, the head is truncated."""
    sandbox.klaviyo.faults.add(Fault(action="truncate"))
    with pytest.raises(urllib3.exceptions.HTTPError):
        call("POST", "/api/events", body)


def test_hanging_request_has_no_effect(sandbox: Sandbox, call: Caller) -> None:
    """The connection is closed without a response."""
    sandbox.klaviyo.faults.add(Fault(action="hang", seconds=0.1))
    began = time.monotonic()
    with pytest.raises(urllib3.exceptions.HTTPError):
        call("POST", "/api/events", event())
    assert time.monotonic() - began >= 0.1
    assert sandbox.account.events == []


def test_slow_and_latency_only_delay(sandbox: Sandbox, call: Caller) -> None:
    """The latency can change while the server runs."""
    sandbox.klaviyo.faults.add(Fault(action="slow", seconds=0.1))
    sandbox.klaviyo.latency = 0.1
    began = time.monotonic()
    assert call("POST", "/api/events", event())[0] == 202
    assert 0.2 <= time.monotonic() - began < 2


def test_faults_match_requests_and_are_counted(sandbox: Sandbox, call: Caller) -> None:
    """A fault has a prefix of method and path, a part of the body, and a number of times."""
    sandbox.klaviyo.faults.add(Fault(status=503, times=2, match="POST /api/events", contains=b"ada@"))
    assert call("POST", "/api/profile-import", profile(email="ada@example.com"))[0] == 201
    other = profile(email="grace@example.com")
    bodies = [event(), event(profile=other), event(), event()]
    assert [call("POST", "/api/events", body)[0] for body in bodies] == [503, 202, 503, 202]
    sandbox.klaviyo.faults.add(Fault(status=500, times=None))
    assert [call("POST", "/api/events", event())[0] for _ in range(3)] == [500] * 3
    sandbox.klaviyo.faults.clear()
    assert call("POST", "/api/events", event())[0] == 202


def test_fault_has_the_error_format_of_its_service(sandbox: Sandbox) -> None:
    """A fault can also have its own body."""
    own = Fault(status=502, headers={"Content-Type": "text/html", "Retry-After": "7"}, body=b"<html>")
    sandbox.klaviyo.faults.add(Fault(status=429), own)
    sandbox.commercetools.faults.add(Fault(status=503))
    pool = urllib3.PoolManager(retries=False)
    first = pool.request("GET", sandbox.klaviyo.url + "/api/profiles").json()["errors"][0]
    assert {"id", "status", "code", "title", "detail", "source"} <= set(first)
    assert (first["status"], first["code"]) == (429, "throttled")
    second = pool.request("GET", sandbox.klaviyo.url + "/api/profiles")
    assert (second.status, second.data, second.headers["Retry-After"]) == (502, b"<html>", "7")
    third = pool.request("GET", sandbox.commercetools.url + "/sandbox-shop/orders").json()
    assert third["statusCode"] == 503
    assert third["errors"][0].keys() >= {"code", "message"}


def test_random_faults_are_reproducible() -> None:
    """The same seed affects the same requests."""
    runs = []
    for seed in (1, 1, 2):
        with Sandbox(seed=seed) as sandbox:
            call = Caller(sandbox)
            sandbox.klaviyo.faults.add(Fault(times=None, probability=0.5))
            runs.append([call("POST", "/api/events", event())[0] for _ in range(40)])
    assert runs[0] == runs[1] != runs[2]
    assert {202, 503} == set(runs[0])


def test_unknown_action_is_an_error() -> None:
    """A fault without effect would make a test useless."""
    with pytest.raises(ValueError, match="explode"):
        Fault(action="explode")


def test_stopped_server_starts_again_on_the_same_port(sandbox: Sandbox, call: Caller) -> None:
    """Open connections are closed. The account keeps its content."""
    assert call("POST", "/api/events", event())[0] == 202
    url = sandbox.klaviyo.url
    sandbox.klaviyo.stop()
    sandbox.klaviyo.stop()
    with pytest.raises(urllib3.exceptions.HTTPError):
        call("POST", "/api/events", event())
    with pytest.raises(ConnectionRefusedError):
        connect(sandbox).connect()
    sandbox.klaviyo.start()
    sandbox.klaviyo.start()
    assert sandbox.klaviyo.url == url
    assert call("POST", "/api/events", event())[0] == 202
    assert len(sandbox.account.events) == 1


def test_request_log_fields(sandbox: Sandbox, call: Caller) -> None:
    """An entry has method, path, decoded query, status, size and time."""
    before = time.time()
    call("POST", "/api/events", event())
    call("GET", "/api/profiles?filter=equals%28email%2C%22ada%40example.com%22%29")
    first, second = sandbox.klaviyo.requests
    assert (first.method, first.path, first.status) == ("POST", "/api/events", 202)
    assert first.body_size == len(orjson.dumps(event()))
    assert before <= first.at <= time.time()
    assert second.query == {"filter": ['equals(email,"ada@example.com")']}


def test_state_over_http(sandbox: Sandbox, call: Caller) -> None:
    """Requests are counted by method, path without ids, and status. Requests for the state do not count."""
    call("POST", "/api/events", event())
    call("POST", "/api/events", {})
    for name in ("one", "two"):
        call("GET", f"/api/catalog-items/$custom:::$default:::{name}/variants")
    state = call("GET", "/_sandbox/state")[1]
    assert state["requests"] == {
        "POST /api/events": {"202": 1, "400": 1},
        "GET /api/catalog-items/{id}/variants": {"404": 2},
    }
    kinds = {"profiles", "events", "items", "variants", "categories", "deletion_requests"}
    assert kinds <= state.keys()
    assert urllib3.request("GET", sandbox.commercetools.url + "/_sandbox/state").json() == {"requests": {}}


def test_counts_over_http(sandbox: Sandbox, call: Caller) -> None:
    """A repeated event is accepted twice and recorded once."""
    for body in (event(unique_id="1"), event(unique_id="1"), {}):
        call("POST", "/api/events", body)
    assert call("GET", "/_sandbox/counts")[1] == {
        "profiles": 1,
        "events": 1,
        "items": 0,
        "variants": 0,
        "categories": 0,
        "repeated_events": 1,
        "accepted_events": 2,
        "requests": {"POST /api/events": {"202": 2, "400": 1}},
    }
    assert urllib3.request("GET", sandbox.commercetools.url + "/_sandbox/counts").json() == {"requests": {}}


@pytest.mark.parametrize(
    "body", [b"{", b"[1]", b"5", b'[{"status": 500, "colour": "red"}]', b'[{"action": "explode"}]']
)
def test_malformed_fault_over_http_is_rejected(body: bytes, call: Caller, sandbox: Sandbox) -> None:
    """No fault of the request becomes active."""
    assert call("POST", "/_sandbox/faults", body)[0] == 400
    assert call("POST", "/api/events", event())[0] == 202


def test_failing_handler_is_logged_as_500(sandbox: Sandbox, call: Caller) -> None:
    """A defect of the emulator must not look like a broken connection."""

    def broken(_: object) -> ApiResponse:
        raise KeyError("mistake")

    sandbox.klaviyo.handle = broken
    assert call("POST", "/api/events", event())[0] == 500
    assert [request.status for request in sandbox.klaviyo.requests] == [500]


def test_fixed_windows_report_their_end() -> None:
    """There are two windows. A request that exceeds the short window does not count in the long window."""
    now = 120.5
    limiter = FixedWindowLimiter(lambda: now)
    limits = {1: 2, 60: 3}
    assert [limiter.acquire("x", limits) for _ in range(2)] == [(2, 60), (1, 60)]
    with pytest.raises(Throttled) as short:
        limiter.acquire("x", limits)
    assert short.value.seconds == 1
    assert limiter.acquire("other", limits) == (2, 60)
    now = 130.25
    assert limiter.acquire("x", limits) == (0, 50)
    now = 131.25
    with pytest.raises(Throttled) as long:
        limiter.acquire("x", limits)
    assert long.value.seconds == 49
    now = 180.0
    assert limiter.acquire("x", limits) == (2, 60)


@contextmanager
def process(*options: str) -> Iterator[tuple[subprocess.Popen[str], dict[str, str]]]:
    """Run `python -m worker.sandbox`, and yield the process and the variables that it prints."""
    command = [sys.executable, "-m", "worker.sandbox", "--commercetools-port", "0", "--klaviyo-port", "0", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ) as running:
        try:
            assert running.stdout is not None
            words = [shlex.split(running.stdout.readline()) for _ in range(7)]
            assert {first for first, _ in words} == {"export"}
            yield running, dict(word.split("=", 1) for _, word in words)
        finally:
            running.send_signal(signal.SIGTERM)


def test_sandbox_runs_until_interrupted() -> None:
    """`python -m worker.sandbox` prints variables, serves, and exits with 0 on SIGTERM."""
    with process() as (running, exported):
        assert orjson.loads(exported["CT_API_CLIENT"]).keys() == {"clientId", "secret"}
        assert urllib3.request("GET", exported["KLAVIYO_API_URL"] + "/_sandbox/state").status == 200
        assert "RateLimit-Limit" not in urllib3.request("GET", exported["KLAVIYO_API_URL"] + "/api/x").headers
    assert running.returncode == 0


def test_sandbox_options() -> None:
    """The options set copies, rate limits, repeats and the duration of jobs."""
    options = ("--copies", "3", "--rate-limits", "10", "--bulk-repeats", "duplicate", "--job-seconds", "60")
    with process(*options) as (_, exported):
        url = exported["KLAVIYO_API_URL"]

        def post(path: str, body: Any) -> urllib3.BaseHTTPResponse:
            return urllib3.request("POST", url + path, body=orjson.dumps(body), headers=HEADERS)

        assert post("/api/events", event()).headers["RateLimit-Limit"].endswith(", 35000;w=60")
        for _ in range(2):
            assert post(BULK, bulk("new")).status == 202
        counts = urllib3.request("GET", url + "/_sandbox/counts").json()
        assert (counts["events"], counts["repeated_events"]) == (3, 1)
        profiles = {"profiles": {"data": [{"type": "profile", "attributes": {"external_id": "x"}}]}}
        job = {"data": {"type": "profile-bulk-import-job", "attributes": profiles}}
        accepted = post("/api/profile-bulk-import-jobs", job).json()["data"]["attributes"]
        assert (accepted["status"], accepted["completed_count"]) == ("queued", 0)
        credentials = ":".join(orjson.loads(exported["CT_API_CLIENT"]).values())
        headers = urllib3.make_headers(basic_auth=credentials)
        form = {"grant_type": "client_credentials"}
        shop = exported["CT_API_URL"]
        token = urllib3.request("POST", f"{shop}/oauth/token", body=urlencode(form), headers=headers).json()
        bearer = {"Authorization": f"Bearer {token['access_token']}"}
        path = f"{shop}/{exported['CT_PROJECT_ID']}/orders"
        assert [urllib3.request("GET", f"{path}/order-{n}", headers=bearer).status for n in (3, 4)] == [200, 404]
