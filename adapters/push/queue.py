"""A Pub/Sub push endpoint for serverless hosts: the HTTP response to a push settles its message.

A request stays open until its message is settled: 204 acks it; 5xx and 429 nack it. Pub/Sub then redelivers it by the
subscription's retry policy, and dead-letters it by its dead-letter policy.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from contextlib import contextmanager, suppress
from http import HTTPStatus
from threading import Thread
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, urlsplit

import uvicorn

from adapters.base import QueueError, QueueURLError, QueueWarning
from adapters.push.connections import limited_protocol
from adapters.push.delivery import PushDelivery, parse_request
from adapters.push.oidc import KeysUnavailableError, TokenRefusedError, TokenVerifier
from adapters.shared.inbox import Inbox

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Sequence

    from adapters.base import Delivery, Failure, QueueOptions

log = logging.getLogger("klaviyo_worker.push")

MAX_BODY = 15_000_000  # bytes; a Pub/Sub message of 10 MB is 13.4 MB in base64
BODY_TIMEOUT = 30.0  # seconds to read a request's body
STOP_TIMEOUT = 5.0  # seconds to send the last responses
KEEP_ALIVE = 620  # seconds; longer than Google's front ends keep idle connections open
_EXPECTED = "expected push://HOST[:PORT][?audience=AUDIENCE&service_account=EMAIL], both or neither"


def open_url(url: str, options: QueueOptions) -> PushQueue:
    """Open `push://HOST[:PORT]`. With `audience` and `service_account`, only requests with their token are accepted.

    The audience alone is not sufficient, because Google signs tokens for any audience on request of any account.
    """
    parts = urlsplit(url)
    query = dict(parse_qsl(parts.query, keep_blank_values=True))
    guards = [query.pop(name) for name in ("audience", "service_account") if name in query]
    try:
        port = options.port if parts.port is None else parts.port
    except ValueError:
        raise QueueURLError("QUEUE_URL is malformed", todo=_EXPECTED) from None
    if not parts.hostname or parts.path.strip("/") or query or len(guards) == 1 or not all(guards):
        raise QueueURLError("QUEUE_URL is malformed", todo=_EXPECTED)
    verifier = TokenVerifier(*guards) if guards else None
    return PushQueue(parts.hostname, port, options, verifier)


class PushQueue:
    """An endpoint that Pub/Sub pushes to. Implements QueueAdapter; listens after the first `receive`."""

    lease_seconds = None  # Pub/Sub waits for the response until the subscription's ack deadline

    def __init__(self, host: str, port: int, options: QueueOptions, verifier: TokenVerifier | None = None) -> None:
        self.host, self.port = host, port
        self._options = options
        self._verifier = verifier
        self._inbox: Inbox[PushDelivery] = Inbox()
        self._requests = _OpenRequests(options)
        self._stopping = False
        self._server: uvicorn.Server | None = None
        self._thread: Thread | None = None

    def receive(self, max_messages: int, wait: float) -> Sequence[PushDelivery]:
        """Return pushed messages. Raises QueueError if the port is not available."""
        if self._thread is None:
            self._listen()
        elif not self._thread.is_alive() and not self._stopping:
            raise QueueError(f"QUEUE_URL: the endpoint on port {self.port} has ended")
        return self._inbox.get(max_messages, wait)

    def ack(self, deliveries: Sequence[Delivery]) -> None:
        """Respond with 204."""
        _respond(deliveries, HTTPStatus.NO_CONTENT)

    def nack(self, deliveries: Sequence[Delivery], delay: float = 0.0, failure: Failure | None = None) -> None:
        """Respond with 503. The subscription's retry policy sets the delay."""
        del delay, failure
        _respond(deliveries, HTTPStatus.SERVICE_UNAVAILABLE)

    def dead_letter(self, delivery: Delivery, failure: Failure) -> bool:
        """Respond with 500. The subscription's policy dead-letters the message after its last attempt."""
        del failure
        _respond([delivery], HTTPStatus.INTERNAL_SERVER_ERROR)
        return False

    def extend(self, deliveries: Sequence[Delivery], seconds: float) -> None:
        """Do nothing: the request stays open."""

    def backlog(self) -> None:
        """Return None: a push endpoint cannot read the backlog."""

    def check(self) -> Sequence[QueueWarning]:
        """Warn if the endpoint accepts requests without a token, or if a setting has no effect."""
        warnings = []
        if self._verifier is None:
            open_to_all = "push:// accepts messages from every client that can reach it"
            warnings.append(QueueWarning(open_to_all, "add ?audience=AUDIENCE&service_account=EMAIL to QUEUE_URL"))
        if self._options.direct_dead_letter:
            no_effect = (
                "KLAVIYO_WORKER_DEAD_LETTER_MODE=direct has no effect on push://, "
                "because the subscription's policy dead-letters messages"
            )
            warnings.append(QueueWarning(no_effect))
        return warnings

    def stop(self) -> None:
        """Accept no more requests. Respond with 503 to those whose message `receive` has not returned."""
        self._stopping = True
        _respond(self._inbox.clear(), HTTPStatus.SERVICE_UNAVAILABLE)
        if self._server is not None:
            self._server.should_exit = True

    def close(self) -> None:
        """Stop, and wait for the responses to be sent."""
        self.stop()
        if self._thread is not None:
            self._thread.join(STOP_TIMEOUT)

    def _listen(self) -> None:
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        try:
            listener = socket.create_server((self.host, self.port), family=family, backlog=1024)
        except OSError as error:
            raise QueueError(f"QUEUE_URL: cannot listen on {self.host} port {self.port}: {error.strerror}") from None
        self.port = listener.getsockname()[1]
        config = uvicorn.Config(
            self._application,
            interface="asgi3",
            http=limited_protocol(self._options.max_messages),
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=KEEP_ALIVE,
        )
        self._server = uvicorn.Server(config)
        self._thread = Thread(target=self._server.run, args=([listener],), name="push", daemon=True)
        self._thread.start()
        log.info("listening", extra={"host": self.host, "port": self.port})

    async def _application(self, scope: Any, receive: Any, send: Any) -> None:
        """Handle one request (ASGI)."""
        status = await self._status(scope, receive)
        await send({"type": "http.response.start", "status": status, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body"})

    async def _status(self, scope: Any, receive: Callable[[], Awaitable[Any]]) -> int:
        headers = dict(scope["headers"])
        if scope["method"] != "POST":
            return HTTPStatus.METHOD_NOT_ALLOWED
        if refusal := await self._authorize(headers):
            return refusal
        declared = int(headers.get(b"content-length", 0))  # the server has checked that it is a number
        if declared > MAX_BODY:
            return HTTPStatus.REQUEST_ENTITY_TOO_LARGE
        with self._requests.open() as request:
            if not request.grow(declared):
                return HTTPStatus.TOO_MANY_REQUESTS
            try:
                async with asyncio.timeout(BODY_TIMEOUT):
                    body = await _read_body(receive, request)
            except TimeoutError:
                return HTTPStatus.REQUEST_TIMEOUT
            return body if isinstance(body, HTTPStatus) else await self._wait_for_settlement(body, receive)

    async def _wait_for_settlement(self, body: bytes, receive: Callable[[], Awaitable[Any]]) -> int:
        """Pass the message to the worker; return the status of its settlement, or 503 if the client disconnects."""
        loop = asyncio.get_running_loop()
        response: asyncio.Future[int] = loop.create_future()

        def settle(status: int) -> None:
            if not response.done():
                response.set_result(status)

        def respond(status: int) -> None:
            with suppress(RuntimeError):  # the server has stopped and closed the connection
                loop.call_soon_threadsafe(settle, status)

        delivery = parse_request(body, respond)
        self._inbox.put(delivery)
        if self._stopping:  # `stop` has cleared the inbox
            _respond(self._inbox.clear(), HTTPStatus.SERVICE_UNAVAILABLE)
        disconnect = asyncio.ensure_future(receive())  # the only event after the body
        await asyncio.wait({response, disconnect}, return_when=asyncio.FIRST_COMPLETED)
        disconnect.cancel()
        if response.done():
            return response.result()
        self._inbox.remove(delivery)  # Pub/Sub redelivers it, even if the worker is processing it already
        return HTTPStatus.SERVICE_UNAVAILABLE

    async def _authorize(self, headers: dict[bytes, bytes]) -> int | None:
        """Return None if the request's token is valid, otherwise the status of the response."""
        if self._verifier is None:
            return None
        authorization = headers.get(b"authorization", b"").decode("latin-1")
        try:
            await asyncio.to_thread(self._verifier.verify, authorization)
        except TokenRefusedError as error:
            log.warning("push_refused", extra={"reason": str(error)})
            return HTTPStatus.UNAUTHORIZED
        except KeysUnavailableError as error:
            log.warning("push_not_verified", extra={"reason": str(error)})
            return HTTPStatus.SERVICE_UNAVAILABLE
        return None


class _OpenRequests:
    """Number and size of the open requests. Used by the server's thread only."""

    def __init__(self, limit: QueueOptions) -> None:
        self.limit = limit
        self.requests = 0
        self.bytes = 0

    @contextmanager
    def open(self) -> Iterator[_OpenRequest]:
        """Count a request while it is open."""
        request = _OpenRequest(self)
        self.requests += 1
        try:
            yield request
        finally:
            self.requests -= 1
            self.bytes -= request.size


class _OpenRequest:
    """An open request and the size of its body, as far as it is declared or has arrived."""

    def __init__(self, all_requests: _OpenRequests) -> None:
        self._all = all_requests
        self.size = 0

    def grow(self, size: int) -> bool:
        """Count a body of `size` bytes; return False if the open requests exceed a limit. One request never does."""
        self._all.bytes += max(0, size - self.size)
        self.size = max(size, self.size)
        limit = self._all.limit
        return self._all.requests == 1 or (
            self._all.requests <= limit.max_messages and self._all.bytes <= limit.max_bytes
        )


async def _read_body(receive: Callable[[], Awaitable[Any]], request: _OpenRequest) -> bytes | HTTPStatus:
    """Read the request's body.

    Return the status of the response if it is incomplete, larger than any Pub/Sub message, or exceeds a limit.
    """
    body = bytearray()
    more = True
    while more:
        part = await receive()
        if part["type"] == "http.disconnect":
            return HTTPStatus.BAD_REQUEST
        body += part.get("body", b"")
        if len(body) > MAX_BODY:
            return HTTPStatus.REQUEST_ENTITY_TOO_LARGE
        if not request.grow(len(body)):
            return HTTPStatus.TOO_MANY_REQUESTS
        more = part.get("more_body", False)
    return bytes(body)


def _respond(deliveries: Sequence[Delivery], status: int) -> None:
    for delivery in deliveries:
        if isinstance(delivery, PushDelivery):
            delivery.respond(status)
