"""A streaming pull that reopens its stream when the stream ends or receives nothing.

The Pub/Sub client reconnects after most faults. Its stream ends permanently if one of its own RPCs fails for a minute,
or if the subscription does not exist yet. A defect in its consumer thread can leave the stream open although it
receives nothing. docs/decisions/0008-pubsub-streaming-pull.md explains the choice of this client.
"""

from __future__ import annotations

import logging
import time
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from queue import SimpleQueue
from threading import Thread
from typing import TYPE_CHECKING, Any

from google.api_core import exceptions as google
from google.auth.exceptions import GoogleAuthError
from google.cloud.pubsub_v1 import SubscriberClient
from google.cloud.pubsub_v1.subscriber.scheduler import ThreadScheduler

from adapters.base import QueueRefusedError
from adapters.shared import reconnect
from adapters.shared.inbox import Inbox
from adapters.shared.reconnect import ReceiveFailures

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from google.cloud.pubsub_v1.subscriber.futures import StreamingPullFuture
    from google.cloud.pubsub_v1.subscriber.message import Message
    from google.cloud.pubsub_v1.types import FlowControl

log = logging.getLogger("klaviyo_worker.pubsub")

IDLE_TIMEOUT = 300.0  # seconds without a message after which the stream is reopened, in case it hangs
SERVER_CLOSE_TIMEOUT = 1.0  # seconds for the server to end the stream
CLIENT_CLOSE_TIMEOUT = 3.0  # seconds for the client to nack the messages that it has buffered
_REFUSALS = (
    google.NotFound,
    google.PermissionDenied,
    google.Unauthenticated,
    google.InvalidArgument,
    google.FailedPrecondition,
    GoogleAuthError,
)


class StreamClient(SubscriberClient):  # type: ignore[misc] # no types
    """A client that can end its stream gracefully: it ends the requests, then reads the remaining responses.

    The superclass cancels the call. Until the server notices this, it sends messages into the cancelled call, including
    messages that were just nacked. Such messages are redelivered only when their leases have ended.
    """

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._requests: SimpleQueue[object] = SimpleQueue()
        self._call: Any = None
        self._is_closing = False

    def streaming_pull(self, requests: Iterable[object], **arguments: Any) -> Any:
        """Open a stream, unless `close_gracefully` was called."""
        if self._is_closing:
            raise google.Cancelled("the stream was closed")  # type: ignore[no-untyped-call]
        outgoing = self._requests = SimpleQueue()
        self._call = super().streaming_pull(requests=iter(outgoing.get, None), **arguments)
        Thread(target=_forward, args=(requests, outgoing), daemon=True).start()
        return self._call

    def modify_ack_deadline(self, *arguments: Any, **named: Any) -> None:
        """Extend leases. Log errors instead of raising them.

        If raised, the error of an extension that failed for a minute would end the stream. The error of a closed
        connection would end the client's thread with a traceback.
        """
        try:
            super().modify_ack_deadline(*arguments, **named)
        except (google.RetryError, ValueError) as error:
            log.warning("lease_lost", extra={"action": "extend", "reason": str(error)})

    def close_gracefully(self, seconds: float) -> None:
        """End the requests, and wait for the server to end the stream."""
        self._is_closing = True
        self._requests.put(None)
        deadline = time.monotonic() + seconds
        while self._call is not None and self._call.is_active() and time.monotonic() < deadline:
            time.sleep(0.01)


def _forward(requests: Iterable[object], outgoing: SimpleQueue[object]) -> None:
    for request in requests:
        outgoing.put(request)
    outgoing.put(None)


class StreamingPull:
    """The messages of a subscription, received over a stream that is reopened after every failure.

    `connect` returns a new client. Every stream has its own client, because only closing the client ends a stream
    reliably; a hanging stream would continue to receive messages. `receive` also reopens the stream, so it must be
    called regularly.
    """

    def __init__(self, connect: Callable[[], StreamClient], path: str, flow_control: FlowControl) -> None:
        self._connect = connect
        self._path = path
        self._flow_control = flow_control
        self._client: StreamClient | None = None
        self._stream: StreamingPullFuture | None = None
        self._inbox: Inbox[Message] = Inbox()
        self._failures = ReceiveFailures("pubsub")
        self._reopen_at = 0.0  # monotonic seconds
        self._opened_at = 0.0  # monotonic seconds
        self._idle_seconds = 0.0  # spent in `receive` without a message

    def receive(self, max_messages: int, wait: float) -> list[Message]:
        """Return up to `max_messages`, waiting at most `wait` seconds for the first.

        Raises QueueRefusedError after a lasting refusal; the next call tries again.
        """
        self._ensure_open()
        started_at = time.monotonic()
        messages = self._inbox.get(max_messages, wait)
        if messages:
            self._idle_seconds = 0.0
            self._failures.reset()
        else:
            self._idle_seconds += time.monotonic() - started_at
        return messages

    def pending(self) -> list[Message]:
        """Return the messages that arrived and that `receive` did not return yet."""
        return self._inbox.items()

    def stop(self) -> list[Message]:
        """Close the stream; return the messages that arrived and that `receive` did not return."""
        self._close()
        return self._inbox.clear()

    def _ensure_open(self) -> None:
        """Open the stream if there is none and the backoff is over."""
        if self._stream is not None and self._stream.done():
            self._on_failure(self._stream.exception())
        elif self._idle_seconds > IDLE_TIMEOUT:
            log.info("receiver_restarted", extra={"adapter": "pubsub", "silent_s": round(self._idle_seconds)})
            self._close()
        if self._stream is None and time.monotonic() >= self._reopen_at:
            self._open()

    def _open(self) -> None:
        self._opened_at, self._idle_seconds = time.monotonic(), 0.0
        try:
            self._client = self._connect()
            one_thread = ThreadScheduler(ThreadPoolExecutor(max_workers=1))  # enough: the callback only stores
            self._stream = self._client.subscribe(self._path, self._inbox.put, self._flow_control, one_thread)
        except (google.GoogleAPIError, GoogleAuthError, OSError) as error:  # OSError: the credentials file
            self._on_failure(error)

    def _close(self) -> None:
        if self._client is None:
            return
        self._client.close_gracefully(SERVER_CLOSE_TIMEOUT)
        if self._stream is not None:
            self._stream.cancel()
            try:
                self._stream.exception(timeout=CLIENT_CLOSE_TIMEOUT)
            except FutureTimeoutError:  # Pub/Sub is unreachable; the client's messages are redelivered
                log.warning("stream_not_closed", extra={"waited_s": CLIENT_CLOSE_TIMEOUT})
        Thread(target=self._client.close, daemon=True).start()  # can take 10 s, if the client waits to reconnect
        self._client = self._stream = None

    def _on_failure(self, error: BaseException | None) -> None:
        """Close the stream and schedule its reopening. Raises QueueRefusedError after a lasting refusal."""
        self._reopen_at = now = time.monotonic()
        self._close()
        if now - self._opened_at > reconnect.REFUSAL_TIMEOUT:  # the stream had worked
            self._failures.reset()
        if isinstance(error, _REFUSALS):
            self._failures.add_refusal(str(error))
            if refusal := self._failures.lasting_refusal():
                raise QueueRefusedError(f"QUEUE_URL: Pub/Sub refuses the subscription: {refusal}")
        self._reopen_at = now + self._failures.back_off(type(error).__name__, str(error))
