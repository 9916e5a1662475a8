"""The HTTP port on real sockets."""

from __future__ import annotations

import base64
import http.client
import json
import logging
import socket
import time
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import requests
from prometheus_client.parser import text_string_to_metric_families

from tests.support.company_proxy import Authority
from tests.support.worker_state import FakeWorkerState
from worker.health import server as health
from worker.health.access import ALL_INTERFACES, Access
from worker.health.server import HealthServer
from worker.telemetry.metrics import Metrics

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    Serve = Callable[..., HealthServer]

PATHS = ("/livez", "/readyz", "/metrics")


class Response(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Start servers that show a state, and stop them after the test."""
    servers: list[HealthServer] = []

    def start(host: str = "127.0.0.1", access: Access | None = None, **state: Any) -> HealthServer:
        worker_state = FakeWorkerState(**state)
        metrics = Metrics("embedded")
        metrics.observe_worker(worker_state)
        server = HealthServer(access or Access(host), 0, metrics, worker_state)
        server.start()
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.stop()


def request(server: HealthServer, path: str, method: str = "GET", host: str = "127.0.0.1", **headers: str) -> Response:
    connection = http.client.HTTPConnection(host, server.port, timeout=60)
    try:
        connection.request(method, path, headers=headers)
        response = connection.getresponse()
        return Response(response.status, dict(response.getheaders()), response.read())
    finally:
        connection.close()


def connect(server: HealthServer, sent: bytes = b"") -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=60)
    connection.sendall(sent)
    return connection


def is_closed(connection: socket.socket, more: bytes = b"") -> bool:
    """Return whether the server has closed the connection without a response."""
    try:
        connection.sendall(more)
        return connection.recv(1) == b""
    except TimeoutError:
        return False
    except ConnectionError:
        return True


def test_worker_is_alive_while_its_loop_runs(serve: Serve) -> None:
    """Kubernetes must not restart the pods during an outage."""
    down = {"klaviyo": "503 to POST /api/events", "commercetools": "no answer"}
    server = serve(outage_reasons=down, parked_reason="Klaviyo answered 401", is_stopping=True)
    response = request(server, "/livez")
    assert (response.status, json.loads(response.body)) == (200, {"status": "ok"})
    assert response.headers["Content-Type"] == "application/json"


def test_stalled_worker_is_not_alive(serve: Serve) -> None:
    """Kubernetes then restarts the worker."""
    response = request(serve(stall_reason="events-1 has ended"), "/livez")
    assert (response.status, json.loads(response.body)) == (503, {"status": "stalled", "reason": "events-1 has ended"})


def test_worker_is_ready_if_it_is_not_parked(serve: Serve) -> None:
    """The body has everything that can affect the worker."""
    response = request(serve(), "/readyz")
    assert response.status == 200
    assert json.loads(response.body) == {
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
        ({"stall_reason": "events-1 has ended"}, 200, {"ready": True}),
    ],
)
def test_only_a_parked_worker_is_not_ready(
    serve: Serve, state: dict[str, Any], status: int, shown: dict[str, Any]
) -> None:
    """An operator must fix the cause of parking. An outage ends by itself."""
    response = request(serve(**state), "/readyz")
    assert response.status == status
    assert json.loads(response.body).items() >= shown.items()


def test_metrics_are_served_in_the_text_format(serve: Serve) -> None:
    """Gauges have the current values of the worker."""
    response = request(serve(in_flight=9), "/metrics")
    assert (response.status, response.headers["Content-Type"]) == (200, "text/plain; version=0.0.4; charset=utf-8")
    values = {family.name: family.samples for family in text_string_to_metric_families(response.body.decode())}
    assert values["klaviyo_worker_messages_in_flight"][0].value == 9


def test_failing_gauge_is_left_out_of_a_scrape(serve: Serve) -> None:
    """The other metrics help to find the cause."""
    response = request(serve(backlog=RuntimeError()), "/metrics")
    assert response.status == 200
    assert b"klaviyo_worker_lanes 4.0" in response.body
    assert b"queue_backlog" not in response.body


@pytest.mark.parametrize("path", PATHS)
def test_head_has_the_headers_of_get_without_the_body(serve: Serve, path: str) -> None:
    """Values of the process change between two scrapes and can have a different number of digits."""
    server = serve()
    got = request(server, path)
    assert int(got.headers["Content-Length"]) == len(got.body) > 0
    with connect(server, f"HEAD {path} HTTP/1.1\r\n\r\n".encode()) as connection:
        head, _, body = connection.makefile("rb").read().partition(b"\r\n\r\n")
    assert b" 200 OK\r\n" in head
    length = int(head.partition(b"Content-Length: ")[2].split()[0])
    assert abs(length - len(got.body)) <= (50 if path == "/metrics" else 0)
    assert body == b""


@pytest.mark.parametrize("path", PATHS)
def test_query_is_ignored(serve: Serve, path: str) -> None:
    """Some probes add `?verbose`."""
    assert request(serve(), f"{path}?verbose").status == 200


@pytest.mark.parametrize("path", ["/", "/metrics/", "/livez/x", "/LIVEZ", "/..%2f"])
def test_other_paths_are_not_found(serve: Serve, path: str) -> None:
    """Without a status there is no page at `/` either."""
    response = request(serve(), path)
    assert (response.status, response.body) == (404, b"Not Found\n")


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "BREW"])
def test_methods_other_than_get_and_head_are_rejected(serve: Serve, method: str) -> None:
    """The response names the allowed methods."""
    response = request(serve(), "/readyz", method)
    assert (response.status, response.headers["Allow"], response.body) == (405, "GET, HEAD", b"Method Not Allowed\n")


@pytest.mark.parametrize("sent", [b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n", b"GET /<b>x</b> HTTP/x\r\n\r\n"])
def test_invalid_http_is_rejected_without_quoting_it(serve: Serve, sent: bytes) -> None:
    """The request could contain HTML."""
    with connect(serve(), sent) as connection:
        response = connection.makefile("rb").read()
    assert b"Bad" in response
    assert b"<" not in response


@pytest.mark.parametrize("path", [*PATHS, "/nothing"])
def test_responses_do_not_name_the_server(serve: Serve, path: str) -> None:
    """A version would help an attacker."""
    response = request(serve(), path)
    assert "Server" not in response.headers
    assert b"Python" not in response.body


def test_slow_clients_do_not_block_others(serve: Serve) -> None:
    """Each connection has a separate thread, because probes time out after a second."""
    server = serve()
    with connect(server), connect(server, b"GET /livez HTTP/1.1\r\nHost:"):
        assert all(request(server, path).status == 200 for path in PATHS)


@pytest.mark.parametrize("more", [b"", b"x"])
def test_slow_client_is_dropped_after_the_timeout(serve: Serve, monkeypatch: pytest.MonkeyPatch, more: bytes) -> None:
    """Sending single bytes does not extend the timeout."""
    monkeypatch.setattr(health, "TIMEOUT", 0.5)
    deadline = time.monotonic() + 60
    with connect(serve(), b"GET /livez HTTP/1.1\r\nX: ") as connection:
        connection.settimeout(0.1)
        while not is_closed(connection, more):
            assert time.monotonic() < deadline


def test_oldest_connection_is_dropped_if_there_are_too_many(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """New clients get a response."""
    monkeypatch.setattr(health, "MAX_CONNECTIONS", 3)
    monkeypatch.setattr(health, "TIMEOUT", 600.0)
    server = serve()
    idle = [connect(server) for _ in range(5)]
    assert request(server, "/livez").status == 200
    assert [is_closed(connection) for connection in idle[:3]] == [True] * 3
    for connection in idle:
        connection.close()


def test_unexpected_error_is_logged_and_fails_the_probe(
    serve: Serve, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """The port stays open. No traceback is printed, because it could quote personal data."""
    server = serve(stall_reason=ValueError("grete@mail.example"))
    with caplog.at_level(logging.INFO, "klaviyo_worker"), pytest.raises(ConnectionError):
        request(server, "/livez")
    assert request(server, "/readyz").status == 200
    assert [(record.getMessage(), vars(record)["error"]) for record in caplog.records] == [
        ("health_request_failed", "ValueError")
    ]
    assert "grete" not in "".join(capfd.readouterr())


def test_requests_are_not_logged(
    serve: Serve, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """Clients that disconnect before the response are not logged either."""
    server = serve()
    connect(server, b"GET /metrics HTTP/1.1\r\n\r\n").close()
    for path in (*PATHS, "/nothing"):
        request(server, path)
    request(server, "/livez", "POST")
    assert caplog.records == []
    assert capfd.readouterr() == ("", "")


def test_port_in_use_is_an_error(serve: Serve) -> None:
    """Otherwise the health of one worker would be shown for another on the same machine."""
    server = HealthServer(Access(), serve().port, Metrics("embedded"), FakeWorkerState())
    with pytest.raises(OSError, match="in use"):
        server.start()
    server.stop()


def test_stop_closes_the_port_and_open_connections(serve: Serve) -> None:
    """`stop` is idempotent."""
    server = serve()
    with connect(server) as connection:
        request(server, "/livez")  # when it returns, the earlier connection has been accepted
        server.stop()
        assert is_closed(connection)
    server.stop()
    with pytest.raises(ConnectionRefusedError):
        connect(server)


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="no IPv6 here")
def test_all_interfaces_include_ipv6(serve: Serve) -> None:
    """Some clusters have only IPv6."""
    server = serve(ALL_INTERFACES)
    assert [request(server, "/livez", host=host).status for host in ("::1", "127.0.0.1")] == [200, 200]


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_only_the_given_address_is_served(host: str, serve: Serve) -> None:
    """Other machines have no access by default."""
    server = serve(host)
    assert request(server, "/livez", host=host).status == 200
    with pytest.raises(OSError, match=r"refused|assign|unreachable"):
        request(server, "/livez", host="127.0.0.2")


def test_address_of_another_machine_is_an_error() -> None:
    """The worker logs the error and runs without the port."""
    server = HealthServer(Access("192.0.2.1"), 0, Metrics("embedded"), FakeWorkerState())
    with pytest.raises(OSError, match=r"assign"):
        server.start()
    server.stop()


def test_all_interfaces_work_without_ipv6(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some systems disable IPv6."""
    monkeypatch.setattr(socket, "has_dualstack_ipv6", lambda: False)
    server = serve(ALL_INTERFACES)
    assert request(server, "/livez").status == 200
    with pytest.raises(OSError, match=r"refused|assign|unreachable"):
        request(server, "/livez", host="::1")


@pytest.mark.parametrize(
    ("listens_on", "name", "status"),
    [
        ("127.0.0.1", "localhost:9090", 200),
        ("127.0.0.1", "127.0.0.1", 200),
        ("127.0.0.1", "[::1]:9090", 200),
        ("localhost", "LOCALHOST", 200),
        ("127.0.0.1", "attacker.example:9090", 421),
        ("127.0.0.1", "localhost.attacker.example", 421),
        ("127.0.0.1", "[", 421),
        ("127.0.0.1", "", 421),
        (ALL_INTERFACES, "worker.namespace.svc:9090", 200),
    ],
)
def test_only_names_of_this_machine_are_served(serve: Serve, listens_on: str, name: str, status: int) -> None:
    """A website can give its domain the address 127.0.0.1, and then read the port in the browser of an operator."""
    assert request(serve(listens_on), "/metrics", Host=name).status == status


def test_request_without_a_name_is_served(serve: Serve) -> None:
    """Every browser sends a name."""
    with connect(serve(), b"GET /livez HTTP/1.0\r\n\r\n") as connection:
        assert b" 200 " in connection.recv(1_000)


BASIC = "Basic " + base64.b64encode("prometheus:pässword:7".encode()).decode()


@pytest.mark.parametrize(
    "authorization",
    ["", "Basic", "Basic ***", "Bearer x", BASIC[:-1], BASIC.replace("Basic", "Digest"), "Basic " + "eDp5" * 9],
)
def test_password_protects_all_but_the_status_of_probes(serve: Serve, authorization: str) -> None:
    """Orchestrators send no password. The user name is free."""
    server = serve(access=Access(password="pässword:7"), parked_reason="Klaviyo answered 401")
    refused = request(server, "/metrics", Authorization=authorization)
    assert (refused.status, refused.headers["WWW-Authenticate"]) == (401, 'Basic realm="klaviyo-worker"')
    assert request(server, "/", Authorization=authorization).status == 401
    assert request(server, "/livez", Authorization=authorization)[::2] == (200, b"")
    assert request(server, "/readyz", Authorization=authorization)[::2] == (503, b"")
    assert request(server, "/metrics", Authorization=BASIC).status == 200
    assert b"401" in request(server, "/readyz", Authorization=BASIC).body
    assert "pässword" not in repr(Access(password="pässword:7"))


def test_port_with_tls(serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client without TLS, or one that is silent, concerns only its connection. The files are read again."""
    monkeypatch.setattr(health, "TIMEOUT", 0.5)
    authority = Authority(tmp_path)
    certificate = authority.certificate("localhost")
    server = serve(access=Access(certificate=certificate, key=certificate))
    url = f"https://localhost:{server.port}/livez"
    assert requests.get(url, verify=str(authority.bundle), timeout=60).json() == {"status": "ok"}
    with connect(server) as silent, connect(server, b"GET /livez HTTP/1.1\r\n\r\n") as plain:
        assert is_closed(silent)
        assert b"ok" not in plain.recv(1_000)
    contents = certificate.read_bytes()
    certificate.write_bytes(b"")
    with connect(server) as refused:
        assert is_closed(refused)
    certificate.write_bytes(contents)
    assert requests.get(url, verify=str(authority.bundle), timeout=60).status_code == 200
