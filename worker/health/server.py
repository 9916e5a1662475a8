"""The port for Kubernetes, Prometheus and people: GET /livez, /readyz, /metrics and /. Nothing can be changed here."""

from __future__ import annotations

import contextlib
import socket
import sys
import time
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from socketserver import ThreadingTCPServer
from threading import Thread
from typing import TYPE_CHECKING, Any, NamedTuple

import orjson

from worker.health.page import HEADERS, build_page
from worker.telemetry.log import log

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from worker.health.status import Status
    from worker.telemetry.metrics import Metrics
    from worker.telemetry.state import WorkerState

ALL_INTERFACES = "0.0.0.0"  # noqa: S104 - what a container sets
TIMEOUT = 10.0  # seconds a client has for everything
MAX_CONNECTIONS = 32  # at once; one more costs the oldest its connection
_POLL = 0.2  # seconds


class _Answer(NamedTuple):
    status: int
    content_type: str
    body: bytes
    headers: Mapping[str, str] = {}


class HealthServer:
    """Answers probes and scrapes, and people where there is a `status` to show, in threads of its own."""

    def __init__(
        self, host: str, port: int, metrics: Metrics, state: WorkerState, status: Status | None = None
    ) -> None:
        self._host = host
        self._port = port
        self._metrics = metrics
        self._state = state
        self._status = status
        self._server: _Server | None = None

    @property
    def port(self) -> int:
        """Return the port listened on: with 0, what the system chose at `start`."""
        return self._port

    def start(self) -> None:
        """Listen. Raises OSError if the address or the port cannot be used."""
        answers = {"/livez": self._livez, "/readyz": self._readyz, "/metrics": self._scrape}
        if self._status:
            answers |= _of_status(self._status)
        self._server = _Server(self._host, self._port, answers)
        self._port = self._server.server_address[1]
        Thread(target=self._server.serve_forever, args=(_POLL,), name="health", daemon=True).start()
        if self._status:
            self._status.start()

    def stop(self) -> None:
        """Close the port and drop open connections. Idempotent."""
        if self._status:
            self._status.stop()
        server, self._server = self._server, None
        if server is not None:
            server.shutdown()
            server.server_close()
            server.drop_all()

    def _livez(self) -> _Answer:
        """Say whether a restart would help: Klaviyo's outages have no part in that."""
        alive = self._state.is_alive()
        return _json(alive, {"status": "ok" if alive else "stalled"})

    def _readyz(self) -> _Answer:
        """Say whether the worker can work, and what is in the way. An outage passes without anybody's help."""
        parked = self._state.parked_reason()
        ready = not parked
        document = {
            "ready": ready,
            "parked": parked or None,
            "outages": {service: reason or None for service, reason in self._state.outage_reasons().items()},
            "stopping": self._state.is_stopping(),
        }
        return _json(ready, document)

    def _scrape(self) -> _Answer:
        body, content_type = self._metrics.render()
        return _Answer(HTTPStatus.OK, content_type, body)


def _of_status(status: Status) -> dict[str, Callable[[], _Answer]]:
    html, policy = build_page()
    shown = _Answer(HTTPStatus.OK, "text/html; charset=utf-8", html, {**HEADERS, "Content-Security-Policy": policy})
    return {
        "/": lambda: shown,
        "/status.json": lambda: _Answer(HTTPStatus.OK, "application/json", status.render(), HEADERS),
    }


def _json(good: bool, document: Mapping[str, Any]) -> _Answer:
    status = HTTPStatus.OK if good else HTTPStatus.SERVICE_UNAVAILABLE
    return _Answer(status, "application/json", orjson.dumps(document))


def _listen_address(host: str, port: int) -> tuple[socket.AddressFamily, Any]:
    """Return family and address to listen on. ALL_INTERFACES includes those of IPv6 if the system has any."""
    if host == ALL_INTERFACES and socket.has_dualstack_ipv6():
        return socket.AF_INET6, ("", port)
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    return family, address


class _Server(ThreadingTCPServer):
    """A thread for each connection, and a bound on both: a client that dawdles makes room for the next.

    Not http.server's own server, which asks DNS for this machine's name before it listens.
    """

    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 32

    def __init__(self, host: str, port: int, answers: Mapping[str, Callable[[], _Answer]]) -> None:
        self.answers = answers
        self._open: dict[socket.socket, float] = {}  # connection -> when it ends at the latest; oldest first
        self.address_family, address = _listen_address(host, port)
        super().__init__(address, _Handler)

    def server_bind(self) -> None:
        if self.address_family == socket.AF_INET6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)  # IPv4 too
        super().server_bind()

    def process_request(self, request: Any, client_address: Any) -> None:
        self._open[request] = time.monotonic() + TIMEOUT
        for connection in list(self._open)[:-MAX_CONNECTIONS]:
            self._drop(connection)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._open.pop(request, None)
        super().shutdown_request(request)

    def service_actions(self) -> None:
        """Drop who takes too long, also with a byte now and then. Called every `_POLL` seconds."""
        now = time.monotonic()
        for connection, end in list(self._open.items()):
            if end < now:
                self._drop(connection)

    def drop_all(self) -> None:
        for connection in list(self._open):
            self._drop(connection)

    def _drop(self, connection: socket.socket) -> None:
        self._open.pop(connection, None)
        with contextlib.suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)  # its thread sees the end and closes it

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ARG002
        error = sys.exception()
        if not isinstance(error, OSError):  # clients may leave as they like
            log.error("health_request_failed", extra={"error": type(error).__name__})


class _Handler(BaseHTTPRequestHandler):
    """One request per connection; only the path and GET or HEAD are looked at."""

    server: _Server
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        answer = self.server.answers.get(self.path.partition("?")[0])
        if answer is None:
            self.send_error(HTTPStatus.NOT_FOUND)
        else:
            self._send(answer())

    do_HEAD = do_GET  # noqa: N815

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:  # noqa: ARG002
        """Refuse without a page: what is no HTTP, another path, another method."""
        status = HTTPStatus.METHOD_NOT_ALLOWED if code == HTTPStatus.NOT_IMPLEMENTED else HTTPStatus(code)
        self._send(_Answer(status, "text/plain; charset=utf-8", f"{status.phrase}\n".encode()))

    def _send(self, answer: _Answer) -> None:
        self.send_response_only(answer.status)  # without the header that tells the version of Python
        self.send_header("Content-Type", answer.content_type)
        self.send_header("Content-Length", str(len(answer.body)))
        for name, value in answer.headers.items():
            self.send_header(name, value)
        if answer.status == HTTPStatus.METHOD_NOT_ALLOWED:
            self.send_header("Allow", "GET, HEAD")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body)

    def log_message(self, *_: Any) -> None:
        """Write nothing: a probe every few seconds is no news."""
