"""An HTTP/1.1 server on loopback that notes its requests and fails on demand."""

from __future__ import annotations

import contextlib
import gzip
import random
import socket
import struct
import time
from collections import deque
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock, Thread
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlsplit

import orjson

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

GZIP_FROM = 1_024  # bytes


@dataclass(frozen=True, slots=True)
class Request:
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
class Answer:
    """An answer: a JSON document (None: an empty body) with status and headers."""

    status: int
    document: Any = None
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Logged:
    """A line of the request log."""

    method: str
    path: str
    status: int
    body_size: int
    at: float


@dataclass(frozen=True, slots=True)
class Fault:
    """What goes wrong, for which requests, how often (None: until cleared).

    `match` is a prefix of "METHOD /path", `where` something the body holds. Actions: `respond` instead of
    handling; `reset` without an answer; `hang` for `seconds`, then close; `slow`: handle after `seconds`;
    `after`: handle, then reset, so that the effect is there and nobody knows; `truncate`: half an answer.
    """

    status: int = 503
    times: int | None = 1
    match: str = ""
    where: bytes = b""
    action: str = "respond"
    seconds: float = 0.0
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes | None = None
    probability: float = 1.0


class Faults:
    """The faults in force, oldest first."""

    def __init__(self, seed: int = 0) -> None:
        self._random = random.Random(seed)
        self._lock = Lock()
        self._waiting: list[list[Any]] = []  # [fault, times left]

    def add(self, *faults: Fault) -> None:
        """Put faults in force."""
        with self._lock:
            self._waiting += [[fault, fault.times] for fault in faults]

    def clear(self) -> None:
        """Let everything work again."""
        with self._lock:
            self._waiting.clear()

    def take(self, request: Request) -> Fault | None:
        """Return the fault this request meets, if any."""
        name = f"{request.method} {request.path}"
        with self._lock:
            for entry in self._waiting:
                fault, left = entry
                hit = name.startswith(fault.match) and fault.where in request.body
                if hit and self._random.random() < fault.probability:
                    if left is not None:
                        entry[1] = left - 1
                        self._waiting = [entry for entry in self._waiting if entry[1] != 0]
                    return fault  # type: ignore[no-any-return]
        return None


class Server:
    """One service on a port of its own; may be stopped and started again on the same port."""

    def __init__(
        self,
        handle: Callable[[Request], Answer],
        explain: Callable[[int], Any],
        control: Callable[[], Any],
        *,
        port: int = 0,
        latency: float = 0.0,
        seed: int = 0,
    ) -> None:
        self.handle = handle
        self.explain = explain  # status -> the error document this service would send
        self.control = control  # () -> the state, for GET /_sandbox/state
        self.latency = latency
        self.faults = Faults(seed)
        self.requests: deque[Logged] = deque(maxlen=1_000_000)
        self._port = port
        self._http: _HTTPServer | None = None

    @property
    def url(self) -> str:
        """Return the base URL."""
        return f"http://127.0.0.1:{self._port}"

    def start(self) -> None:
        """Listen."""
        self._http = _HTTPServer(("127.0.0.1", self._port), _Handler)
        self._http.service = self
        self._port = self._http.server_address[1]
        Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def stop(self) -> None:
        """Refuse connections, and drop those that are open."""
        if self._http is not None:
            self._http.shutdown()
            self._http.server_close()
            self._http.drop_connections()
            self._http = None


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
    wbufsize = -1  # one write per answer: two would meet Nagle and delayed acknowledgements
    server: _HTTPServer

    def log_message(self, *_: Any) -> None:
        """Write nothing: requests are noted in Server.requests."""

    def _serve(self) -> None:
        parts = urlsplit(self.path)
        length = int(self.headers.get("Content-Length") or 0)
        request = Request(
            self.command,
            parts.path,
            parse_qs(parts.query, keep_blank_values=True),
            self.headers,  # type: ignore[arg-type]
            self.rfile.read(length),
            self.path,
        )
        if parts.path.startswith("/_sandbox/"):
            self._send(self._control(request))
        else:
            self._answer(request)

    do_GET = do_POST = do_PATCH = do_DELETE = do_HEAD = _serve

    def _answer(self, request: Request) -> None:
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
            self._send(Answer(fault.status, service.explain(fault.status), fault.headers), fault.body)
            return
        answer = service.handle(request)
        self._note(request, answer.status)
        if action == "after":
            self._reset()
        else:
            self._send(answer, truncate=action == "truncate")

    def _note(self, request: Request, status: int) -> None:
        line = Logged(request.method, request.path, status, len(request.body), time.time())
        self.server.service.requests.append(line)

    def _send(self, answer: Answer, raw: bytes | None = None, *, truncate: bool = False) -> None:
        body = raw if raw is not None else b"" if answer.document is None else orjson.dumps(answer.document)
        headers = {"Content-Type": "application/json", "X-Correlation-ID": "sandbox", **answer.headers}
        if len(body) > GZIP_FROM and "gzip" in self.headers.get("Accept-Encoding", ""):
            body = gzip.compress(body, 1)
            headers["Content-Encoding"] = "gzip"
        self.send_response(answer.status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if truncate:
            self.wfile.flush()
            self._reset()
            return
        self.wfile.write(body)
        self.wfile.flush()

    def _reset(self) -> None:
        """Close with RST, as a crashing host does."""
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()

    def _control(self, request: Request) -> Answer:
        """Serve tests in another process: state, request log, faults."""
        service = self.server.service
        name = f"{request.method} {request.path.removeprefix('/_sandbox/')}"
        if name == "GET state":
            return Answer(200, service.control())
        if name == "GET requests":
            return Answer(200, list(service.requests))
        if name == "POST faults":
            texts = {"where", "body"}
            for entry in request.json():
                values: dict[str, Any] = {
                    k: v.encode() if k in texts and isinstance(v, str) else v for k, v in entry.items()
                }
                service.faults.add(Fault(**values))
            return Answer(200, {})
        if name == "DELETE faults":
            service.faults.clear()
            return Answer(200, {})
        return Answer(404, {"error": "expected state, requests or faults"})
