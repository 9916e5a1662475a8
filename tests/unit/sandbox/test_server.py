"""The servers behave like servers, and break in exactly the way they are told to."""

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

    from worker.sandbox.server import ApiResponse


def connect(sandbox: Sandbox) -> http.client.HTTPConnection:
    return http.client.HTTPConnection(sandbox.klaviyo.url.removeprefix("http://"), timeout=5)


def post(connection: http.client.HTTPConnection, body: Any) -> http.client.HTTPResponse:
    connection.request("POST", "/api/events", orjson.dumps(body), HEADERS)
    return connection.getresponse()


def test_a_connection_serves_many_requests_without_delay(sandbox: Sandbox) -> None:
    """An answer in two segments would cost 40 ms each time: here, 4 s."""
    connection = connect(sandbox)
    began = time.monotonic()
    for number in range(100):
        answer = post(connection, event(unique_id=str(number)))
        assert (answer.status, answer.read()) == (202, b"")
    assert time.monotonic() - began < 2
    connection.request("HEAD", "/api/profiles", headers=HEADERS)
    assert connection.getresponse().read() == b""
    assert post(connection, event()).status == 202
    connection.close()


def raw_answer(sandbox: Sandbox, body: bytes, extra: str = "") -> bytes:
    """Post to /api/events over a bare socket; return all bytes up to the close. Raises ConnectionResetError."""
    host, port = sandbox.klaviyo.url.removeprefix("http://").split(":")
    headers = "".join(f"{name}: {value}\r\n" for name, value in HEADERS.items())
    with socket.create_connection((host, int(port)), timeout=5) as connection:
        head = f"POST /api/events HTTP/1.1\r\n{headers}{extra or f'Content-Length: {len(body)}'}\r\n\r\n"
        connection.sendall(head.encode() + body)
        received = b""
        while chunk := connection.recv(65_536):
            received += chunk
        return received


def test_a_chunked_body_is_refused_rather_than_misread(sandbox: Sandbox) -> None:
    """The stand-in reads bodies by their length only."""
    assert b" 411 " in raw_answer(sandbox, b"", "Transfer-Encoding: chunked").splitlines()[0]
    assert not sandbox.klaviyo.requests


@pytest.mark.parametrize(("action", "effects"), [("reset", 0), ("lose_response", 1), ("truncate", 1)])
def test_a_reset_is_a_reset(action: str, effects: int, sandbox: Sandbox) -> None:
    """RST, not a polite close; `after` and `truncate` leave their effect behind."""
    sandbox.klaviyo.faults.add(Fault(action=action))
    with pytest.raises(ConnectionResetError):
        raw_answer(sandbox, orjson.dumps(event()))
    assert len(sandbox.account.events) == effects
    assert [request.status for request in sandbox.klaviyo.requests] == [202 if effects else 0]


@pytest.mark.parametrize("body", [event(), event(value="text")], ids=["empty answer", "long answer"])
def test_a_truncated_answer_is_never_complete(body: Any, sandbox: Sandbox, call: Caller) -> None:
    """Not even one without a body: its head is cut."""
    sandbox.klaviyo.faults.add(Fault(action="truncate"))
    with pytest.raises(urllib3.exceptions.HTTPError):
        call("POST", "/api/events", body)


def test_a_hanging_request_is_closed_without_effect(sandbox: Sandbox, call: Caller) -> None:
    """The client waits, then learns nothing."""
    sandbox.klaviyo.faults.add(Fault(action="hang", seconds=0.1))
    began = time.monotonic()
    with pytest.raises(urllib3.exceptions.HTTPError):
        call("POST", "/api/events", event())
    assert time.monotonic() - began >= 0.1
    assert sandbox.account.events == []


def test_slow_and_latency_only_delay(sandbox: Sandbox, call: Caller) -> None:
    """The latency can be changed while the server runs."""
    sandbox.klaviyo.faults.add(Fault(action="slow", seconds=0.1))
    sandbox.klaviyo.latency = 0.1
    began = time.monotonic()
    assert call("POST", "/api/events", event())[0] == 202
    assert 0.2 <= time.monotonic() - began < 2


def test_faults_hit_what_they_match_as_often_as_they_say(sandbox: Sandbox, call: Caller) -> None:
    """Prefix of method and path, text in the body, times."""
    sandbox.klaviyo.faults.add(Fault(status=503, times=2, match="POST /api/events", contains=b"ada@"))
    assert call("POST", "/api/profile-import", profile(email="ada@example.com"))[0] == 201
    other = profile(email="grace@example.com")
    bodies = [event(), event(profile=other), event(), event()]
    assert [call("POST", "/api/events", body)[0] for body in bodies] == [503, 202, 503, 202]
    sandbox.klaviyo.faults.add(Fault(status=500, times=None))
    assert [call("POST", "/api/events", event())[0] for _ in range(3)] == [500] * 3
    sandbox.klaviyo.faults.clear()
    assert call("POST", "/api/events", event())[0] == 202


def test_a_fault_answers_in_the_words_of_its_service(sandbox: Sandbox) -> None:
    """Unless it brings its own."""
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


def test_chance_is_repeatable() -> None:
    """The same seed breaks the same requests."""
    runs = []
    for seed in (1, 1, 2):
        with Sandbox(seed=seed) as sandbox:
            call = Caller(sandbox)
            sandbox.klaviyo.faults.add(Fault(times=None, probability=0.5))
            runs.append([call("POST", "/api/events", event())[0] for _ in range(40)])
    assert runs[0] == runs[1] != runs[2]
    assert {202, 503} == set(runs[0])


def test_an_unknown_action_is_a_mistake_at_once() -> None:
    """A fault that does nothing would make a test prove nothing."""
    with pytest.raises(ValueError, match="explode"):
        Fault(action="explode")


def test_an_outage_refuses_connections_and_ends_on_the_same_port(sandbox: Sandbox, call: Caller) -> None:
    """Open connections die with the server; what the account held is still there."""
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


def test_the_request_log_holds_what_a_test_asks_for(sandbox: Sandbox, call: Caller) -> None:
    """Method, path, decoded query, status, size, time."""
    before = time.time()
    call("POST", "/api/events", event())
    call("GET", "/api/profiles?filter=equals%28email%2C%22ada%40example.com%22%29")
    first, second = sandbox.klaviyo.requests
    assert (first.method, first.path, first.status) == ("POST", "/api/events", 202)
    assert first.body_size == len(orjson.dumps(event()))
    assert before <= first.at <= time.time()
    assert second.query == {"filter": ['equals(email,"ada@example.com")']}


def test_another_process_sees_state_and_counts(sandbox: Sandbox, call: Caller) -> None:
    """By method, path without ids, and status; asking does not count."""
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


def test_counts_are_there_without_everything_that_is_counted(sandbox: Sandbox, call: Caller) -> None:
    """An event that comes twice is accepted twice and there once."""
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
def test_a_malformed_fault_from_outside_is_refused(body: bytes, call: Caller, sandbox: Sandbox) -> None:
    """And nothing of it is in force."""
    assert call("POST", "/_sandbox/faults", body)[0] == 400
    assert call("POST", "/api/events", event())[0] == 202


def test_a_failing_handler_is_a_500_that_shows_in_the_log(sandbox: Sandbox, call: Caller) -> None:
    """A mistake in the stand-in must not look like a broken connection."""

    def broken(_: object) -> ApiResponse:
        raise KeyError("mistake")

    sandbox.klaviyo.handle = broken
    assert call("POST", "/api/events", event())[0] == 500
    assert [request.status for request in sandbox.klaviyo.requests] == [500]


def test_windows_are_fixed_and_say_when_they_end() -> None:
    """Two at a time: what the short one refuses does not count in the long one."""
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
    """Run `python -m worker.sandbox` and yield what it says to export."""
    command = [sys.executable, "-m", "worker.sandbox", "--commercetools-port", "0", "--klaviyo-port", "0", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ) as running:
        try:
            assert running.stdout is not None
            words = [shlex.split(running.stdout.readline()) for _ in range(7)]
            assert {first for first, _ in words} == {"export"}
            yield running, dict(word.split("=", 1) for _, word in words)
        finally:
            running.send_signal(signal.SIGTERM)


def test_it_runs_on_its_own_until_interrupted() -> None:
    """`python -m worker.sandbox` prints what to export, serves, and ends at SIGTERM with 0."""
    with process() as (running, exported):
        assert orjson.loads(exported["CT_API_CLIENT"]).keys() == {"clientId", "secret"}
        assert urllib3.request("GET", exported["KLAVIYO_API_URL"] + "/_sandbox/state").status == 200
        assert "RateLimit-Limit" not in urllib3.request("GET", exported["KLAVIYO_API_URL"] + "/api/x").headers
    assert running.returncode == 0


def test_its_options_reach_shop_and_account() -> None:
    """Copies, limits, repeats, slow jobs."""
    options = ("--copies", "3", "--rate-limits", "10", "--bulk-repeats", "duplicate", "--job-seconds", "60")
    with process(*options) as (_, exported):
        url = exported["KLAVIYO_API_URL"]

        def post(path: str, body: Any) -> urllib3.BaseHTTPResponse:
            return urllib3.request("POST", url + path, body=orjson.dumps(body), headers=HEADERS)

        assert post("/api/events", event()).headers["RateLimit-Limit"] == "35000"
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
