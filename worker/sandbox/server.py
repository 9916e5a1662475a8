"""An HTTP/1.1 server on loopback that logs its requests and injects faults."""

from __future__ import annotations

import contextlib
import gzip
import json
import re
import socket
import struct
import time
from collections import Counter, defaultdict
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock, Thread
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlsplit

import orjson

from worker.sandbox.faults import Faults, parse_fault
from worker.sandbox.http import ApiRequest, ApiResponse

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

GZIP_FROM = 1_024  # bytes
_THIRD_SEGMENT = re.compile(r"^(/[^/]+/[^/]+)/[^/]+")
_NO_CONTENT = 204


@dataclass(frozen=True, slots=True)
class LoggedRequest:
    """An entry of the request log. `status` 0: there was no response. `at`: seconds since the epoch."""

    method: str
    path: str
    query: Mapping[str, list[str]]
    status: int
    body_size: int  # bytes
    at: float


def path_template(path: str) -> str:
    """Return a path with its id replaced: `/api/profiles/{id}`. Both services have ids in the third segment."""
    return _THIRD_SEGMENT.sub(r"\1/{id}", path)


class Server:
    """A service on its own port. It can be stopped and started again on the same port until it is closed."""

    def __init__(
        self,
        handle: Callable[[ApiRequest], ApiResponse],
        error_document: Callable[[int], Any],
        state: Callable[[], dict[str, Any]],
        counts: Callable[[], dict[str, int]],
        *,
        port: int = 0,
        latency: float = 0.0,
        seed: int = 0,
    ) -> None:
        self.handle = handle
        self.error_document = error_document  # returns the error document for a status
        self._state = state
        self._counts = counts
        self.latency = latency
        self.clock_offset = 0.0  # seconds by which the clock of the service is ahead
        self.faults = Faults(seed)
        self.requests: list[LoggedRequest] = []
        self._request_counts: dict[str, Counter[str]] = defaultdict(Counter)  # endpoint -> status -> requests
        self._lock = Lock()
        # Bound, but not listening: while the server is stopped, no other process can be given the port.
        self._reservation = socket.socket()
        self._reservation.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._reservation.bind(("127.0.0.1", port))
        self._port: int = self._reservation.getsockname()[1]
        self._http: _HTTPServer | None = None

    @property
    def url(self) -> str:
        """Return the base URL."""
        return f"http://127.0.0.1:{self._port}"

    def start(self) -> None:
        """Listen, on the same port after each stop."""
        if self._http is not None:
            return
        self._http = _HTTPServer(("127.0.0.1", self._port), _Handler)
        self._http.service = self
        Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def stop(self) -> None:
        """Refuse new connections and drop open ones."""
        if self._http is not None:
            self._http.shutdown()
            self._http.server_close()
            self._http.drop_connections()
            self._http = None

    def close(self) -> None:
        """Stop the server and release its port."""
        self.stop()
        self._reservation.close()

    def log_request(self, entry: LoggedRequest) -> None:
        """Add an entry to the request log."""
        endpoint = f"{entry.method} {path_template(entry.path)}"
        with self._lock:
            self.requests.append(entry)
            self._request_counts[endpoint][str(entry.status)] += 1

    def state(self) -> dict[str, Any]:
        """Return the content of the service, and the number of requests by "METHOD /path/{id}" and status."""
        return self._state() | self._count_requests()

    def counts(self) -> dict[str, Any]:
        """Return the number of entries in the service, and of requests by "METHOD /path/{id}" and status."""
        return self._counts() | self._count_requests()

    def _count_requests(self) -> dict[str, Any]:
        with self._lock:
            return {"requests": {endpoint: dict(statuses) for endpoint, statuses in self._request_counts.items()}}


class _HTTPServer(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128
    service: Server

    def __init__(self, *arguments: Any) -> None:
        self._connections: set[socket.socket] = set()
        super().__init__(*arguments)

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, address = super().get_request()
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._connections.add(connection)
        return connection, address

    def shutdown_request(self, request: Any) -> None:
        self._connections.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore errors: tests disconnect clients on purpose."""

    def drop_connections(self) -> None:
        for connection in list(self._connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _HTTPServer

    def log_message(self, *_: Any) -> None:
        """Write nothing. Server.requests is the log."""

    def _handle(self) -> None:
        parts = urlsplit(self.path)
        if self.headers.get("Transfer-Encoding"):
            self.send_error(411)  # chunked bodies are not supported
            self.close_connection = True
            return
        request = ApiRequest(
            self.command,
            parts.path,
            parse_qs(parts.query, keep_blank_values=True),
            self.headers,  # type: ignore[arg-type]
            self.rfile.read(int(self.headers.get("Content-Length") or 0)),
            self.path,
        )
        if parts.path.startswith("/_sandbox/"):
            self._send(_handle_control(self.server.service, request))
        else:
            self._respond(request)

    do_GET = do_POST = do_PATCH = do_PUT = do_DELETE = do_HEAD = _handle

    def _respond(self, request: ApiRequest) -> None:
        service = self.server.service
        fault = service.faults.trigger(request)
        action = fault.action if fault else ""
        if service.latency:
            time.sleep(service.latency)
        if fault and action in {"hang", "slow"}:
            time.sleep(fault.seconds)
        if action in {"reset", "hang"}:
            self._log(request, 0)
            self._reset()
            return
        if fault and action == "respond":
            self._log(request, fault.status)
            self._send(ApiResponse(fault.status, service.error_document(fault.status), fault.headers), fault.body)
            return
        try:
            response = service.handle(request)
        except Exception:
            self._log(request, 500)
            self._send(ApiResponse(500, service.error_document(500)))
            raise
        self._log(request, response.status)
        if fault and action == "lose_response":
            time.sleep(fault.seconds)
            self._reset()
        else:
            self._send(response, truncate=action == "truncate")

    def _log(self, request: ApiRequest, status: int) -> None:
        self.server.service.log_request(
            LoggedRequest(request.method, request.path, request.query, status, len(request.body), time.time())
        )

    def _send(self, response: ApiResponse, raw: bytes | None = None, *, truncate: bool = False) -> None:
        body = raw if raw is not None else b"" if response.document is None else _encode(response.document)
        headers = {"Content-Type": "application/json"} if body else {}
        headers |= response.headers
        if len(body) > GZIP_FROM and "gzip" in self.headers.get("Accept-Encoding", ""):
            body = gzip.compress(body, 1)
            headers["Content-Encoding"] = "gzip"
        if response.status != _NO_CONTENT:
            headers["Content-Length"] = str(len(body))
        date = time.time() + self.server.service.clock_offset
        phrase = self.responses.get(response.status, ("",))[0]
        lines = [f"HTTP/1.1 {response.status} {phrase}", f"Date: {self.date_time_string(date)}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        content = "\r\n".join([*lines, "\r\n"]).encode("latin-1") + (b"" if self.command == "HEAD" else body)
        self.wfile.write(content[: len(content) // 2] if truncate else content)
        if truncate:
            self._reset()

    def _reset(self) -> None:
        """Close the connection with RST, like a crashing host."""
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()


def _encode(document: Any) -> bytes:
    """Return a document as JSON. Half a surrogate pair in a text is escaped, as the services do it."""
    try:
        return orjson.dumps(document)
    except TypeError:
        return json.dumps(document).encode()


def _handle_control(service: Server, request: ApiRequest) -> ApiResponse:
    """Respond to a test in another process: state, counts, request log, faults."""
    match request.method, request.path.removeprefix("/_sandbox/"):
        case "GET", "state":
            return ApiResponse(200, service.state())
        case "GET", "counts":
            return ApiResponse(200, service.counts())
        case "GET", "requests":
            return ApiResponse(200, list(service.requests))
        case "POST", "faults":
            try:
                service.faults.add(*(parse_fault(entry) for entry in request.json()))
            except (TypeError, ValueError, AttributeError) as error:
                return ApiResponse(400, {"error": f"expected a list of faults: {error}"})
            return ApiResponse(200, {})
        case "DELETE", "faults":
            service.faults.clear()
            return ApiResponse(200, {})
    return ApiResponse(404, {"error": "expected state, counts, requests or faults"})
