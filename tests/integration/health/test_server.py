"""The health port on real sockets."""

from __future__ import annotations

import http.client
import json
import logging
import socket
import time
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.support.worker_state import FakeWorkerState
from worker.health import server as health
from worker.health.server import ALL_INTERFACES, HealthServer
from worker.telemetry.metrics import Metrics

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Serve = Callable[..., HealthServer]

PATHS = ("/livez", "/readyz", "/metrics")


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Start servers that tell of a state, and stop them in the end."""
    servers: list[HealthServer] = []

    def start(host: str = "127.0.0.1", **state: Any) -> HealthServer:
        told, metrics = FakeWorkerState(**state), Metrics("embedded")
        metrics.observe_worker(told)
        server = HealthServer(host, 0, metrics, told)
        server.start()
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.stop()


def ask(server: HealthServer, path: str, method: str = "GET", host: str = "127.0.0.1") -> Answer:
    connection = http.client.HTTPConnection(host, server.port, timeout=5)
    try:
        connection.request(method, path)
        response = connection.getresponse()
        return Answer(response.status, dict(response.getheaders()), response.read())
    finally:
        connection.close()


def connect(server: HealthServer, sent: bytes = b"") -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=5)
    connection.sendall(sent)
    return connection


def is_over(connection: socket.socket, more: bytes = b"") -> bool:
    """Tell whether the other side ended the connection, without having said anything."""
    try:
        connection.sendall(more)
        return connection.recv(1) == b""
    except TimeoutError:
        return False
    except ConnectionError:
        return True


def test_a_worker_whose_loop_goes_round_is_alive(serve: Serve) -> None:
    """Whatever Klaviyo does: an outage must not restart every pod."""
    down = {"klaviyo": "503 to POST /api/events", "commercetools": "no answer"}
    server = serve(outage_reasons=down, parked_reason="Klaviyo answered 401", is_stopping=True)
    answer = ask(server, "/livez")
    assert (answer.status, json.loads(answer.body)) == (200, {"status": "ok"})
    assert answer.headers["Content-Type"] == "application/json"


def test_a_worker_that_stalls_is_not_alive(serve: Serve) -> None:
    """A restart helps, so it is asked for."""
    answer = ask(serve(is_alive=False), "/livez")
    assert (answer.status, json.loads(answer.body)) == (503, {"status": "stalled"})


def test_a_worker_that_can_work_is_ready(serve: Serve) -> None:
    """The body names everything that may be in the way."""
    answer = ask(serve(), "/readyz")
    assert answer.status == 200
    assert json.loads(answer.body) == {
        "ready": True,
        "parked": None,
        "outages": {"klaviyo": None, "commercetools": None},
        "stopping": False,
    }


@pytest.mark.parametrize(
    ("state", "status", "shown"),
    [
        ({"parked_reason": "check KLAVIYO_AUTH_KEY"}, 503, {"ready": False, "parked": "check KLAVIYO_AUTH_KEY"}),
        (
            {"outage_reasons": {"klaviyo": "503", "commercetools": ""}},
            200,
            {"ready": True, "outages": {"klaviyo": "503", "commercetools": None}},
        ),
        ({"is_stopping": True}, 200, {"ready": True, "stopping": True}),
        ({"is_alive": False}, 200, {"ready": True}),
    ],
)
def test_what_makes_a_worker_unready(serve: Serve, state: dict[str, Any], status: int, shown: dict[str, Any]) -> None:
    """Only what somebody has to mend: an outage passes by itself."""
    answer = ask(serve(**state), "/readyz")
    assert answer.status == status
    assert json.loads(answer.body).items() >= shown.items()


def test_prometheus_can_scrape(serve: Serve) -> None:
    """In its text format, with what the worker tells now."""
    answer = ask(serve(in_flight=9), "/metrics")
    assert (answer.status, answer.headers["Content-Type"]) == (200, "text/plain; version=0.0.4; charset=utf-8")
    values = {family.name: family.samples for family in text_string_to_metric_families(answer.body.decode())}
    assert values["klaviyo_worker_messages_in_flight"][0].value == 9


def test_a_scrape_survives_a_gauge_that_fails(serve: Serve) -> None:
    """The other metrics are the way to find out why."""
    answer = ask(serve(backlog=RuntimeError()), "/metrics")
    assert answer.status == 200
    assert b"klaviyo_worker_lanes 4.0" in answer.body
    assert b"queue_backlog" not in answer.body


@pytest.mark.parametrize("path", PATHS)
def test_head_works_for_probes(serve: Serve, path: str) -> None:
    """The same answer without its body; figures of the process go on meanwhile, and may have a digit more or less."""
    server = serve()
    got = ask(server, path)
    assert int(got.headers["Content-Length"]) == len(got.body) > 0
    with connect(server, f"HEAD {path} HTTP/1.1\r\n\r\n".encode()) as connection:
        head, _, body = connection.makefile("rb").read().partition(b"\r\n\r\n")
    assert b" 200 OK\r\n" in head
    length = int(head.partition(b"Content-Length: ")[2].split()[0])
    assert abs(length - len(got.body)) <= (50 if path == "/metrics" else 0)
    assert body == b""


@pytest.mark.parametrize("path", PATHS)
def test_a_query_changes_nothing(serve: Serve, path: str) -> None:
    """Some probes add `?verbose`."""
    assert ask(serve(), f"{path}?verbose").status == 200


@pytest.mark.parametrize("path", ["/", "/metrics/", "/livez/x", "/LIVEZ", "/..%2f"])
def test_there_is_nothing_else(serve: Serve, path: str) -> None:
    """No index, no listing, no page."""
    answer = ask(serve(), path)
    assert (answer.status, answer.body) == (404, b"Not Found\n")


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "BREW"])
def test_nothing_can_be_changed(serve: Serve, method: str) -> None:
    """Every method but two is refused, and those are named."""
    answer = ask(serve(), "/readyz", method)
    assert (answer.status, answer.headers["Allow"], answer.body) == (405, "GET, HEAD", b"Method Not Allowed\n")


@pytest.mark.parametrize("sent", [b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n", b"GET /<b>x</b> HTTP/x\r\n\r\n"])
def test_what_is_no_http_is_refused_shortly(serve: Serve, sent: bytes) -> None:
    """Without repeating what was sent."""
    with connect(serve(), sent) as connection:
        answer = connection.makefile("rb").read()
    assert b"Bad" in answer
    assert b"<" not in answer


@pytest.mark.parametrize("path", [*PATHS, "/nothing"])
def test_no_answer_tells_what_serves_it(serve: Serve, path: str) -> None:
    """A version is a hint for those who look for holes."""
    answer = ask(serve(), path)
    assert "Server" not in answer.headers
    assert b"Python" not in answer.body


def test_a_client_that_says_nothing_holds_up_nobody(serve: Serve) -> None:
    """Probes have a second; who dawdles has a thread of their own."""
    server = serve()
    with connect(server), connect(server, b"GET /livez HTTP/1.1\r\nHost:"):
        assert all(ask(server, path).status == 200 for path in PATHS)


@pytest.mark.parametrize("more", [b"", b"x"])
def test_a_slow_client_is_dropped_in_time(serve: Serve, monkeypatch: pytest.MonkeyPatch, more: bytes) -> None:
    """Also one that sends a byte now and then: no thread is held for ever."""
    monkeypatch.setattr(health, "TIMEOUT", 0.5)
    deadline = time.monotonic() + 10
    with connect(serve(), b"GET /livez HTTP/1.1\r\nX: ") as connection:
        connection.settimeout(0.1)
        while not is_over(connection, more):
            assert time.monotonic() < deadline


def test_too_many_clients_make_room(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """The oldest goes, and those who ask now get their answer."""
    monkeypatch.setattr(health, "MAX_CONNECTIONS", 3)
    server = serve()
    idle = [connect(server) for _ in range(5)]
    assert ask(server, "/livez").status == 200
    assert [is_over(connection) for connection in idle[:3]] == [True] * 3
    for connection in idle:
        connection.close()


def test_a_state_that_fails_is_said_and_no_success(
    serve: Serve, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """A defect fails the probe, leaves the port open, and prints no traceback with what it may quote."""
    server = serve(is_alive=ValueError("grete@mail.example"))
    with caplog.at_level(logging.INFO, "klaviyo_worker"), pytest.raises(ConnectionError):
        ask(server, "/livez")
    assert ask(server, "/readyz").status == 200
    assert [(record.getMessage(), vars(record)["error"]) for record in caplog.records] == [
        ("health_request_failed", "ValueError")
    ]
    assert "grete" not in "".join(capfd.readouterr())


def test_requests_are_not_logged(
    serve: Serve, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """Nor are clients that went away before their answer."""
    server = serve()
    connect(server, b"GET /metrics HTTP/1.1\r\n\r\n").close()
    for path in (*PATHS, "/nothing"):
        ask(server, path)
    ask(server, "/livez", "POST")
    assert caplog.records == []
    assert capfd.readouterr() == ("", "")


def test_a_port_that_is_taken_is_an_error(serve: Serve) -> None:
    """Two workers on a machine need two ports: the second one must not seem healthy by the first."""
    server = HealthServer("127.0.0.1", serve().port, Metrics("embedded"), FakeWorkerState())
    with pytest.raises(OSError, match="in use"):
        server.start()
    server.stop()


def test_stopping_closes_the_port(serve: Serve) -> None:
    """Nobody is left to answer, and who still waited is told; once more changes nothing."""
    server = serve()
    with connect(server) as waiting:
        ask(server, "/livez")  # by then the one before is let in too
        server.stop()
        assert is_over(waiting)
    server.stop()
    with pytest.raises(ConnectionRefusedError):
        connect(server)


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="no IPv6 here")
def test_all_interfaces_include_ipv6(serve: Serve) -> None:
    """Some clusters have only IPv6."""
    server = serve(ALL_INTERFACES)
    assert [ask(server, "/livez", host=host).status for host in ("::1", "127.0.0.1")] == [200, 200]


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_only_the_given_address_is_served(host: str, serve: Serve) -> None:
    """Other machines have no access by default."""
    server = serve(host)
    assert ask(server, "/livez", host=host).status == 200
    with pytest.raises(OSError, match=r"refused|assign|unreachable"):
        ask(server, "/livez", host="127.0.0.2")


def test_an_address_of_another_machine_is_an_error() -> None:
    """The worker logs it and runs without the port."""
    server = HealthServer("192.0.2.1", 0, Metrics("embedded"), FakeWorkerState())
    with pytest.raises(OSError, match=r"assign"):
        server.start()
    server.stop()


def test_a_machine_without_ipv6_will_do(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others switch it off."""
    monkeypatch.setattr(socket, "has_dualstack_ipv6", lambda: False)
    server = serve(ALL_INTERFACES)
    assert ask(server, "/livez").status == 200
    with pytest.raises(OSError, match=r"refused|assign|unreachable"):
        ask(server, "/livez", host="::1")
