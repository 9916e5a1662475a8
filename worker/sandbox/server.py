"""An HTTP/1.1 server on loopback that notes its requests, and fails, dawdles or throttles on demand."""

from __future__ import annotations

import contextlib
import gzip
import random
import re
import socket
import struct
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock, Thread
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlsplit

import orjson

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

GZIP_FROM = 1_024  # bytes
ACTIONS = frozenset({"respond", "reset", "hang", "slow", "lose_response", "truncate"})
_THIRD_SEGMENT = re.compile(r"^(/[^/]+/[^/]+)/[^/]+")
_NO_CONTENT = 204


@dataclass(frozen=True, slots=True)
class ApiRequest:
    """A request as a service sees it; `query` holds decoded values."""

    method: str
    path: str
    query: Mapping[str, list[str]]
    headers: Mapping[str, str]
    body: bytes
    target: str  # as sent, undecoded

    def json(self) -> Any:
        """Return the decoded body. Raises ValueError."""
        return orjson.loads(self.body)


@dataclass(frozen=True, slots=True)
class ApiResponse:
    """An answer: a JSON document (None: an empty body) with status and headers."""

    status: int
    document: Any = None
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class LoggedRequest:
    """A line of the request log. `status` 0: no answer was given. `at`: seconds since the epoch."""

    method: str
    path: str
    query: Mapping[str, list[str]]
    status: int
    body_size: int  # bytes
    at: float


@dataclass(frozen=True, slots=True)
class Fault:
    """A failure that the server injects into matching requests.

    `times`: how many requests fail, or None for all until the faults are cleared. `match`: a prefix of
    "METHOD /path". `contains`: bytes that the body must contain. Actions:

    - `respond`: send `status` instead of handling the request
    - `reset`: reset the connection without a response
    - `hang`: close the connection after `seconds`
    - `slow`: handle the request after `seconds`
    - `lose_response`: handle the request, then reset the connection after `seconds`
    - `truncate`: handle the request, then reset the connection halfway through the response
    """

    status: int = 503
    times: int | None = 1
    match: str = ""
    contains: bytes = b""
    action: str = "respond"
    seconds: float = 0.0
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes | None = None
    probability: float = 1.0

    def __post_init__(self) -> None:
        if self.action not in ACTIONS:
            raise ValueError(f"unknown action {self.action!r}")


def template(path: str) -> str:
    """Return a path with `{id}` in the place both services have their ids: `/api/profiles/{id}`."""
    return _THIRD_SEGMENT.sub(r"\1/{id}", path)


class Faults:
    """The faults in force, oldest first."""

    def __init__(self, seed: int = 0) -> None:
        self._random = random.Random(seed)
        self._lock = Lock()
        self._waiting: list[list[Any]] = []  # [fault, times left]
        self.triggered = 0  # requests that met a fault

    def add(self, *faults: Fault) -> None:
        """Put faults in force."""
        with self._lock:
            self._waiting += [[fault, fault.times] for fault in faults]

    def clear(self) -> None:
        """Let everything work again."""
        with self._lock:
            self._waiting.clear()

    def take(self, request: ApiRequest) -> Fault | None:
        """Return the fault this request meets, if any."""
        if not self._waiting:
            return None
        name = f"{request.method} {request.path}"
        with self._lock:
            for entry in self._waiting:
                fault, left = entry
                hit = name.startswith(fault.match) and fault.contains in request.body
                if hit and self._random.random() < fault.probability:
                    self.triggered += 1
                    if left is not None:
                        entry[1] = left - 1
                        self._waiting = [entry for entry in self._waiting if entry[1] != 0]
                    return fault  # type: ignore[no-any-return]
        return None


class Server:
    """One service on a port of its own; may be stopped and started again on the same port."""

    def __init__(
        self,
        handle: Callable[[ApiRequest], ApiResponse],
        explain: Callable[[int], Any],
        state: Callable[[], dict[str, Any]],
        counts: Callable[[], dict[str, int]],
        *,
        port: int = 0,
        latency: float = 0.0,
        seed: int = 0,
    ) -> None:
        self.handle = handle
        self.explain = explain  # status -> the error document this service would send
        self._state = state
        self._counts = counts
        self.latency = latency
        self.faults = Faults(seed)
        self.requests: list[LoggedRequest] = []
        self._counted: dict[str, Counter[str]] = defaultdict(Counter)  # endpoint -> status -> requests
        self._lock = Lock()
        self._port = port
        self._http: _HTTPServer | None = None

    @property
    def url(self) -> str:
        """Return the base URL."""
        return f"http://127.0.0.1:{self._port}"

    def start(self) -> None:
        """Listen: on the port of last time, if there was one."""
        if self._http is not None:
            return
        self._http = _HTTPServer(("127.0.0.1", self._port), _Handler)
        self._http.service = self
        self._port = self._http.server_address[1]
        Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def stop(self) -> None:
        """Refuse connections, and drop those that are open."""
        if self._http is not None:
            self._http.shutdown()
            self._http.server_close()
            self._http.drop_connections()
            self._http = None

    def note(self, request: LoggedRequest) -> None:
        """Add a line to the request log."""
        endpoint = f"{request.method} {template(request.path)}"
        with self._lock:
            self.requests.append(request)
            self._counted[endpoint][str(request.status)] += 1

    def state(self) -> dict[str, Any]:
        """Return all that the service holds, with the requests counted by "METHOD /path/{id}" and status."""
        return self._state() | self._counted_requests()

    def counts(self) -> dict[str, Any]:
        """Return how much the service holds, with the requests counted likewise."""
        return self._counts() | self._counted_requests()

    def _counted_requests(self) -> dict[str, Any]:
        with self._lock:
            return {"requests": {endpoint: dict(statuses) for endpoint, statuses in self._counted.items()}}


class _HTTPServer(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128
    service: Server

    def __init__(self, *arguments: Any) -> None:
        self._open: set[socket.socket] = set()
        super().__init__(*arguments)

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, address = super().get_request()
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._open.add(connection)
        return connection, address

    def shutdown_request(self, request: Any) -> None:
        self._open.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that go away are part of the game."""

    def drop_connections(self) -> None:
        for connection in list(self._open):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _HTTPServer

    def log_message(self, *_: Any) -> None:
        """Write nothing: requests are noted in Server.requests."""

    def _serve(self) -> None:
        parts = urlsplit(self.path)
        if self.headers.get("Transfer-Encoding"):
            self.send_error(411)  # no client of ours sends chunks
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
            self._send(_control(self.server.service, request))
        else:
            self._answer(request)

    do_GET = do_POST = do_PATCH = do_PUT = do_DELETE = do_HEAD = _serve

    def _answer(self, request: ApiRequest) -> None:
        service = self.server.service
        fault = service.faults.take(request)
        action = fault.action if fault else ""
        if service.latency:
            time.sleep(service.latency)
        if fault and action in {"hang", "slow"}:
            time.sleep(fault.seconds)
        if action in {"reset", "hang"}:
            self._note(request, 0)
            self._reset()
            return
        if fault and action == "respond":
            self._note(request, fault.status)
            self._send(ApiResponse(fault.status, service.explain(fault.status), fault.headers), fault.body)
            return
        try:
            answer = service.handle(request)
        except Exception:
            self._note(request, 500)
            self._send(ApiResponse(500, service.explain(500)))
            raise
        self._note(request, answer.status)
        if fault and action == "lose_response":
            time.sleep(fault.seconds)
            self._reset()
        else:
            self._send(answer, truncate=action == "truncate")

    def _note(self, request: ApiRequest, status: int) -> None:
        self.server.service.note(
            LoggedRequest(request.method, request.path, request.query, status, len(request.body), time.time())
        )

    def _send(self, answer: ApiResponse, raw: bytes | None = None, *, truncate: bool = False) -> None:
        body = raw if raw is not None else b"" if answer.document is None else orjson.dumps(answer.document)
        headers = {"Content-Type": "application/json"} if body else {}
        headers |= answer.headers
        if len(body) > GZIP_FROM and "gzip" in self.headers.get("Accept-Encoding", ""):
            body = gzip.compress(body, 1)
            headers["Content-Encoding"] = "gzip"
        if answer.status != _NO_CONTENT:
            headers["Content-Length"] = str(len(body))
        phrase = self.responses.get(answer.status, ("",))[0]
        lines = [f"HTTP/1.1 {answer.status} {phrase}", f"Date: {self.date_time_string()}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        content = "\r\n".join([*lines, "\r\n"]).encode("latin-1") + (b"" if self.command == "HEAD" else body)
        self.wfile.write(content[: len(content) // 2] if truncate else content)
        if truncate:
            self._reset()

    def _reset(self) -> None:
        """Close with RST, as a crashing host does."""
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()


def _control(service: Server, request: ApiRequest) -> ApiResponse:
    """Serve tests in another process: state, counts, request log, faults."""
    match request.method, request.path.removeprefix("/_sandbox/"):
        case "GET", "state":
            return ApiResponse(200, service.state())
        case "GET", "counts":
            return ApiResponse(200, service.counts())
        case "GET", "requests":
            return ApiResponse(200, list(service.requests))
        case "POST", "faults":
            try:
                service.faults.add(*(_fault(entry) for entry in request.json()))
            except (TypeError, ValueError, AttributeError) as error:
                return ApiResponse(400, {"error": f"expected a list of faults: {error}"})
            return ApiResponse(200, {})
        case "DELETE", "faults":
            service.faults.clear()
            return ApiResponse(200, {})
    return ApiResponse(404, {"error": "expected state, counts, requests or faults"})


def _fault(fields: dict[str, Any]) -> Fault:
    texts = {name: fields[name].encode() for name in ("contains", "body") if fields.get(name) is not None}
    return Fault(**(fields | texts))
