"""Pub/Sub push: an HTTP endpoint for serverless hosts. The answer to a push is the settlement of its message.

A request stays open until its message is settled: 204 for an ack, 5xx or 429 for anything else, upon which
Pub/Sub delivers again by the subscription's retry policy and gives up by its dead-letter policy.
"""

from __future__ import annotations

import asyncio
import base64
import logging
import socket
import uuid
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from http import HTTPStatus
from threading import Thread
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, urlsplit

import orjson
import uvicorn

from adapters.base import QueueError, QueueURLError, QueueWarning
from adapters.push.oidc import KeysUnavailableError, TokenRefusedError, TokenVerifier
from adapters.shared.inbox import Inbox

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence

    from adapters.base import Delivery, Failure, QueueOptions

log = logging.getLogger("klaviyo_worker.push")

MAX_BODY = 15_000_000  # bytes; a Pub/Sub message of 10 MB is 13.4 MB in base64
BODY_SECONDS = 30.0  # for a request's body to arrive
STOP_SECONDS = 5.0  # for answers to leave once all is settled
KEEP_ALIVE = 620  # seconds, longer than Google's front ends, so that they hang up first
_EXPECTED = "expected push://HOST[:PORT][?audience=AUDIENCE&service_account=EMAIL], both or neither"


@dataclass(frozen=True, slots=True, eq=False)
class PushDelivery:
    """A message whose sender waits for the answer. `attempt` is None without a dead-letter policy."""

    id: str
    body: bytes = field(repr=False)
    attributes: Mapping[str, str]
    attempt: int | None
    published_at: datetime | None
    answer: Callable[[int], None] = field(repr=False)


def open_url(url: str, options: QueueOptions) -> PushQueue:
    """Open `push://HOST[:PORT]`. With `audience` and `service_account`, only requests with their token are taken.

    Neither goes without the other: anybody can have Google sign a token for any audience.
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
    """An endpoint that Pub/Sub pushes to. Implements QueueAdapter; listens from the first `receive` on."""

    lease_seconds = None  # Pub/Sub waits for the answer, as long as the subscription's ack deadline

    def __init__(self, host: str, port: int, options: QueueOptions, verifier: TokenVerifier | None = None) -> None:
        self.host, self.port = host, port
        self._options = options
        self._verifier = verifier
        self._inbox: Inbox[PushDelivery] = Inbox()
        self._open = _Load()
        self._stopping = False
        self._server: uvicorn.Server | None = None
        self._thread: Thread | None = None

    def receive(self, max_messages: int, wait: float) -> Sequence[PushDelivery]:
        """Return what was pushed. Raises QueueError when the port cannot be had."""
        if self._thread is None:
            self._listen()
        elif not self._thread.is_alive() and not self._stopping:
            raise QueueError(f"QUEUE_URL: the endpoint on port {self.port} has ended")
        return self._inbox.take(max_messages, wait)

    def ack(self, deliveries: Sequence[Delivery]) -> None:
        """Answer 204."""
        _answer(deliveries, HTTPStatus.NO_CONTENT)

    def nack(self, deliveries: Sequence[Delivery], delay: float = 0.0, failure: Failure | None = None) -> None:
        """Answer 503. When the message comes again is up to the subscription's retry policy."""
        del delay, failure
        _answer(deliveries, HTTPStatus.SERVICE_UNAVAILABLE)

    def dead_letter(self, delivery: Delivery, failure: Failure) -> bool:
        """Answer 500: the subscription's policy moves the message to the dead letters in the end."""
        del failure
        _answer([delivery], HTTPStatus.INTERNAL_SERVER_ERROR)
        return False

    def extend(self, deliveries: Sequence[Delivery], seconds: float) -> None:
        """Do nothing: the sender waits."""

    def backlog(self) -> None:
        """Return None: who is pushed to cannot see the queue."""

    def check(self) -> Sequence[QueueWarning]:
        """Warn of what the endpoint cannot do, and of an endpoint open to everybody."""
        warnings = []
        if self._verifier is None:
            open_to_all = "push:// takes messages from every client that can reach it"
            warnings.append(QueueWarning(open_to_all, "add ?audience=AUDIENCE&service_account=EMAIL to QUEUE_URL"))
        if self._options.direct_dead_letter:
            no_effect = (
                "KLAVIYO_WORKER_DEAD_LETTER_MODE=direct has no effect on push://: the subscription's policy counts"
            )
            warnings.append(QueueWarning(no_effect))
        return warnings

    def stop(self) -> None:
        """Take no more requests, and answer 503 to those not received."""
        self._stopping = True
        _answer(self._inbox.clear(), HTTPStatus.SERVICE_UNAVAILABLE)
        if self._server is not None:
            self._server.should_exit = True

    def close(self) -> None:
        """Stop, and wait for the answers to leave."""
        self.stop()
        if self._thread is not None:
            self._thread.join(STOP_SECONDS)

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
            http="h11",
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
        """Answer one request (ASGI)."""
        status = await self._status(scope, receive)
        await send({"type": "http.response.start", "status": status, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body"})

    async def _status(self, scope: Any, receive: Callable[[], Awaitable[Any]]) -> int:
        headers = dict(scope["headers"])
        if scope["method"] != "POST":
            return HTTPStatus.METHOD_NOT_ALLOWED
        if refusal := await self._refusal(headers):
            return refusal
        size = int(headers.get(b"content-length", MAX_BODY))  # the server has seen to it that it is a number
        if size > MAX_BODY:
            return HTTPStatus.REQUEST_ENTITY_TOO_LARGE
        if not self._open.add(size, self._options):
            return HTTPStatus.TOO_MANY_REQUESTS
        try:
            async with asyncio.timeout(BODY_SECONDS):
                body = await _body(receive)
            return HTTPStatus.REQUEST_ENTITY_TOO_LARGE if body is None else await self._settled(body, receive)
        except TimeoutError:
            return HTTPStatus.REQUEST_TIMEOUT
        finally:
            self._open.remove(size)

    async def _settled(self, body: bytes, receive: Callable[[], Awaitable[Any]]) -> int:
        """Hand the message to the worker and wait for the answer, or for the sender to hang up."""
        loop = asyncio.get_running_loop()
        answered: asyncio.Future[int] = loop.create_future()

        def settle(status: int) -> None:
            if not answered.done():
                answered.set_result(status)

        def answer(status: int) -> None:
            with suppress(RuntimeError):  # the server has ended, and the sender heard that
                loop.call_soon_threadsafe(settle, status)

        delivery = _delivery(body, answer)
        self._inbox.put(delivery)
        if self._stopping:  # `stop` has cleared the inbox
            _answer(self._inbox.clear(), HTTPStatus.SERVICE_UNAVAILABLE)
        gone = asyncio.ensure_future(receive())  # all that comes after the body
        await asyncio.wait({answered, gone}, return_when=asyncio.FIRST_COMPLETED)
        gone.cancel()
        if answered.done():
            return answered.result()
        self._inbox.remove(delivery)  # it is sent again; if it is in work already, that goes on
        return HTTPStatus.SERVICE_UNAVAILABLE

    async def _refusal(self, headers: dict[bytes, bytes]) -> int | None:
        """Return the status for a sender that is not Pub/Sub, or cannot be told; None to go on."""
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


class _Load:
    """How many requests are open, and the bytes of their bodies. Used by the server's thread alone."""

    def __init__(self) -> None:
        self._requests = 0
        self._bytes = 0

    def add(self, size: int, limit: QueueOptions) -> bool:
        """Count a request in, unless it is one too many."""
        if self._requests and (self._requests >= limit.max_messages or self._bytes + size > limit.max_bytes):
            return False
        self._requests += 1
        self._bytes += size
        return True

    def remove(self, size: int) -> None:
        self._requests -= 1
        self._bytes -= size


async def _body(receive: Callable[[], Awaitable[Any]]) -> bytes | None:
    """Read the request's body; None when it is larger than any Pub/Sub message, or breaks off."""
    body = bytearray()
    more = True
    while more:
        part = await receive()
        if part["type"] == "http.disconnect":
            return None
        body += part.get("body", b"")
        if len(body) > MAX_BODY:
            return None
        more = part.get("more_body", False)
    return bytes(body)


def _answer(deliveries: Sequence[Delivery], status: int) -> None:
    for delivery in deliveries:
        if isinstance(delivery, PushDelivery):
            delivery.answer(status)


def _delivery(body: bytes, answer: Callable[[int], None]) -> PushDelivery:
    """Read Pub/Sub's envelope. What is no envelope is a message itself: payload unwrapping, or anything at all."""
    try:
        envelope = orjson.loads(body)
        message = envelope["message"]
        name = str(message["messageId"])
        data = base64.b64decode(message.get("data", ""), validate=True)
        attributes = {str(key): str(value) for key, value in (message.get("attributes") or {}).items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        return PushDelivery(uuid.uuid4().hex, body, {}, None, None, answer)
    attempt = envelope.get("deliveryAttempt")
    return PushDelivery(
        name,
        data,
        attributes,
        attempt if isinstance(attempt, int) else None,
        _time(message.get("publishTime")),
        answer,
    )


def _time(text: Any) -> datetime | None:
    try:
        moment = datetime.fromisoformat(text)
    except (ValueError, TypeError):
        return None
    return moment if moment.tzinfo else None
