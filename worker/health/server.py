"""The HTTP server for /livez, /readyz, /metrics and the status page. It is read-only."""

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

from worker.health.access import ALL_INTERFACES, Access
from worker.health.page import HEADERS, build_page
from worker.telemetry.log import log

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from worker.health.status import Status
    from worker.telemetry.metrics import Metrics
    from worker.telemetry.state import WorkerState

TIMEOUT = 10.0  # seconds; the maximum duration of a connection
MAX_CONNECTIONS = 32  # an additional connection closes the oldest one
_PROBES = frozenset({"/livez", "/readyz"})  # they answer without the password, and then only with their status
_HEADERS: Mapping[int, tuple[str, str]] = {
    HTTPStatus.METHOD_NOT_ALLOWED: ("Allow", "GET, HEAD"),
    HTTPStatus.UNAUTHORIZED: ("WWW-Authenticate", 'Basic realm="klaviyo-worker"'),
}
_POLL = 0.2  # seconds between two checks of the connections


class _Response(NamedTuple):
    status: int
    content_type: str
    body: bytes
    headers: Mapping[str, str] = {}


class HealthServer:
    """The HTTP server for probes, metrics and, if `status` is given, the status page. It runs in separate threads."""

    def __init__(
        self, access: Access, port: int, metrics: Metrics, state: WorkerState, status: Status | None = None
    ) -> None:
        self._access = access
        self._port = port
        self._metrics = metrics
        self._state = state
        self._status = status
        self._server: _Server | None = None

    @property
    def port(self) -> int:
        """Return the port. If it is 0, `start` replaces it with the port that the system chooses."""
        return self._port

    def start(self) -> None:
        """Listen on the port. Raises OSError if the address or the port cannot be used."""
        routes = {"/livez": self._livez, "/readyz": self._readyz, "/metrics": self._scrape}
        if self._status:
            routes |= _status_routes(self._status)
        self._server = _Server(self._access, self._port, routes)
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

    def _livez(self) -> _Response:
        """Return 503 if the receive loop or a lane is stalled, so that a restart helps. Outages do not count."""
        reason = self._state.stall_reason()
        return _json(not reason, {"status": "stalled", "reason": reason} if reason else {"status": "ok"})

    def _readyz(self) -> _Response:
        """Return 503 if the worker is parked. Outages do not count, because they end by themselves."""
        parked = self._state.parked_reason()
        is_ready = not parked
        document = {
            "ready": is_ready,
            "parked": parked or None,
            "outages": {service: reason or None for service, reason in self._state.outage_reasons().items()},
            "stopping": self._state.is_stopping(),
        }
        return _json(is_ready, document)

    def _scrape(self) -> _Response:
        body, content_type = self._metrics.render()
        return _Response(HTTPStatus.OK, content_type, body)


def _status_routes(status: Status) -> dict[str, Callable[[], _Response]]:
    html, policy = build_page()
    page = _Response(HTTPStatus.OK, "text/html; charset=utf-8", html, {**HEADERS, "Content-Security-Policy": policy})
    return {
        "/": lambda: page,
        "/status.json": lambda: _Response(HTTPStatus.OK, "application/json", status.render(), HEADERS),
    }


def _json(is_ok: bool, document: Mapping[str, Any]) -> _Response:
    status = HTTPStatus.OK if is_ok else HTTPStatus.SERVICE_UNAVAILABLE
    return _Response(status, "application/json", orjson.dumps(document))


def _listen_address(host: str, port: int) -> tuple[socket.AddressFamily, Any]:
    """Return the family and address to listen on. ALL_INTERFACES includes IPv6 if the system has it."""
    if host == ALL_INTERFACES and socket.has_dualstack_ipv6():
        return socket.AF_INET6, ("", port)
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    return family, address


class _Server(ThreadingTCPServer):
    """A server with one thread per connection. The number and duration of connections are limited.

    http.server.HTTPServer is not used, because it queries DNS for the machine's name before it listens.
    """

    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 32

    def __init__(self, access: Access, port: int, routes: Mapping[str, Callable[[], _Response]]) -> None:
        self.access = access
        self.routes = routes
        self._open: dict[socket.socket, float] = {}  # deadline of each connection, oldest first
        self.address_family, address = _listen_address(access.host, port)
        super().__init__(address, _Handler)

    def server_bind(self) -> None:
        if self.address_family == socket.AF_INET6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)  # also accept IPv4
        super().server_bind()

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, address = super().get_request()
        try:
            return self.access.wrap(connection), address
        except OSError as error:  # the files cannot be read
            connection.close()
            log.warning("http_port_unavailable", extra={"reason": f"no TLS: {type(error).__name__}"})
            raise

    def process_request(self, request: Any, client_address: Any) -> None:
        self._open[request] = time.monotonic() + TIMEOUT
        for connection in list(self._open)[:-MAX_CONNECTIONS]:
            self._drop(connection)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._open.pop(request, None)
        super().shutdown_request(request)

    def service_actions(self) -> None:
        """Close connections that exceed the timeout, even if the client keeps sending bytes. Called every `_POLL` s."""
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
            # The thread of the connection then closes it. With TLS, `connection.shutdown` would first drop the state
            # that the thread uses.
            socket.socket.shutdown(connection, socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ARG002
        error = sys.exception()
        if not isinstance(error, OSError):  # a client that disconnects causes an OSError
            log.error("health_request_failed", extra={"error": type(error).__name__})


class _Handler(BaseHTTPRequestHandler):
    """The handler of a connection with one request. It reads only the path and the method."""

    server: _Server
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        access, path = self.server.access, self.path.partition("?")[0]
        route = self.server.routes.get(path)
        if not access.allows_name(self.headers.get("Host")):
            self.send_error(HTTPStatus.MISDIRECTED_REQUEST)
        elif access.allows_reading(self.headers.get("Authorization")):
            self.send_error(HTTPStatus.NOT_FOUND) if route is None else self._send(route())
        elif route is not None and path in _PROBES:
            self._send(route()._replace(content_type="text/plain", body=b""))
        else:
            self.send_error(HTTPStatus.UNAUTHORIZED)

    do_HEAD = do_GET  # noqa: N815

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:  # noqa: ARG002
        """Answer a request that is invalid or has an unknown path or method with plain text."""
        status = HTTPStatus.METHOD_NOT_ALLOWED if code == HTTPStatus.NOT_IMPLEMENTED else HTTPStatus(code)
        self._send(_Response(status, "text/plain; charset=utf-8", f"{status.phrase}\n".encode()))

    def _send(self, response: _Response) -> None:
        self.send_response_only(response.status)  # omits the Server header, which contains Python's version
        self.send_header("Content-Type", response.content_type)
        self.send_header("Content-Length", str(len(response.body)))
        for name, value in response.headers.items():
            self.send_header(name, value)
        if header := _HEADERS.get(response.status):
            self.send_header(*header)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(response.body)

    def log_message(self, *_: Any) -> None:
        """Log nothing, because probes arrive every few seconds."""
