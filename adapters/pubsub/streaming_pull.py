"""A streaming pull that goes on: the Pub/Sub client's stream, opened again whenever it ends or falls silent.

The client reconnects by itself after most faults. After some its stream ends for good (an RPC of its own
that failed for a minute, a subscription that is not there yet), and a defect in its consumer thread leaves
it running without ever receiving again. docs/decisions/0008-pubsub-streaming-pull.md tells why this client.
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
from adapters.shared.inbox import Inbox

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from google.cloud.pubsub_v1.subscriber.futures import StreamingPullFuture
    from google.cloud.pubsub_v1.subscriber.message import Message
    from google.cloud.pubsub_v1.types import FlowControl

log = logging.getLogger("klaviyo_worker.pubsub")

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 10.0  # seconds before a stream that ended is opened again
REFUSED_FOR = 60.0  # seconds a refusal is taken for passing: permissions take a while to spread
SILENCE = 300.0  # seconds without a message after which the stream is opened anew, in case it hangs
FINISH_SECONDS = 1.0  # the server has this long to end the stream when asked
STOP_SECONDS = 3.0  # the client has this long to return what it holds
_REFUSALS = (
    google.NotFound,
    google.PermissionDenied,
    google.Unauthenticated,
    google.InvalidArgument,
    google.FailedPrecondition,
    GoogleAuthError,
)


class StreamClient(SubscriberClient):  # type: ignore[misc] # no types
    """A client whose stream can be ended in order: by ending our side and reading what is still under way.

    The client itself cancels the call. A server that has not noticed yet goes on to hand messages to it,
    those just returned among them, and they are out of reach until their leases end.
    """

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._requests: SimpleQueue[object] = SimpleQueue()
        self._call: Any = None
        self._finished = False

    def streaming_pull(self, requests: Iterable[object], **arguments: Any) -> Any:
        """Open a stream, as the superclass; `finish` ends its requests, and then there is no other."""
        if self._finished:
            raise google.Cancelled("the stream was finished")  # type: ignore[no-untyped-call]
        outgoing = self._requests = SimpleQueue()
        self._call = super().streaming_pull(requests=iter(outgoing.get, None), **arguments)
        Thread(target=_pump, args=(requests, outgoing), daemon=True).start()
        return self._call

    def modify_ack_deadline(self, *arguments: Any, **named: Any) -> None:
        """Extend leases, as the superclass; that it failed for a minute is no reason to end the stream.

        Nor is a connection closed meanwhile one to end the client's thread with a traceback.
        """
        try:
            super().modify_ack_deadline(*arguments, **named)
        except (google.RetryError, ValueError) as error:
            log.warning("lease_lost", extra={"action": "extend", "reason": str(error)})

    def finish(self, seconds: float) -> None:
        """End the requests, and wait for the server to end the stream."""
        self._finished = True
        self._requests.put(None)
        deadline = time.monotonic() + seconds
        while self._call is not None and self._call.is_active() and time.monotonic() < deadline:
            time.sleep(0.01)


def _pump(requests: Iterable[object], outgoing: SimpleQueue[object]) -> None:
    for request in requests:
        outgoing.put(request)
    outgoing.put(None)


class StreamingPull:
    """Messages of a subscription as they arrive, whatever becomes of the connection.

    `connect` makes a client. Every stream gets one of its own, as only closing that ends a stream for sure:
    one that hangs would go on swallowing messages. `take` watches over the stream, so it must be called as
    long as messages are wanted.
    """

    def __init__(self, connect: Callable[[], StreamClient], path: str, flow_control: FlowControl) -> None:
        self._connect = connect
        self._path = path
        self._flow_control = flow_control
        self._client: StreamClient | None = None
        self._stream: StreamingPullFuture | None = None
        self._inbox: Inbox[Message] = Inbox()
        self._pause = FIRST_PAUSE
        self._open_at = 0.0  # monotonic seconds, as all times here
        self._opened_at = 0.0
        self._refused_since: float | None = None
        self._silent = 0.0  # seconds spent waiting in vain

    def take(self, max_messages: int, wait: float) -> list[Message]:
        """Return up to `max_messages`, waiting at most `wait` seconds. Raises QueueRefusedError, and may go on."""
        self._watch()
        began = time.monotonic()
        messages = self._inbox.take(max_messages, wait)
        if messages:
            self._silent, self._pause, self._refused_since = 0.0, FIRST_PAUSE, None
        else:
            self._silent += time.monotonic() - began
        return messages

    def waiting(self) -> list[Message]:
        """Return the messages that arrived and were not taken."""
        return self._inbox.waiting()

    def stop(self) -> list[Message]:
        """End the stream; the client returns what it holds. Returns what arrived and was not taken."""
        self._close()
        return self._inbox.clear()

    def _watch(self) -> None:
        """Open the stream if there is none, after a pause if it has just ended."""
        if self._stream is not None and self._stream.done():
            self._ended(self._stream.exception())
        elif self._silent > SILENCE:
            log.info("stream_renewed", extra={"silent_s": round(self._silent)})
            self._close()
        if self._stream is None and time.monotonic() >= self._open_at:
            self._open()

    def _open(self) -> None:
        self._opened_at, self._silent = time.monotonic(), 0.0
        try:
            self._client = self._connect()
            one_thread = ThreadScheduler(ThreadPoolExecutor(max_workers=1))  # the callback only hands over
            self._stream = self._client.subscribe(self._path, self._inbox.put, self._flow_control, one_thread)
        except (google.GoogleAPIError, GoogleAuthError, OSError) as error:  # OSError: of the credentials' file
            self._ended(error)

    def _close(self) -> None:
        if self._client is None:
            return
        self._client.finish(FINISH_SECONDS)
        if self._stream is not None:
            self._stream.cancel()
            try:
                self._stream.exception(timeout=STOP_SECONDS)
            except FutureTimeoutError:  # the queue is out of reach; what the client holds comes again by itself
                log.warning("stream_not_closed", extra={"waited_s": STOP_SECONDS})
        Thread(target=self._client.close, daemon=True).start()  # it waits for a reopening that sleeps up to 10 s
        self._client = self._stream = None

    def _ended(self, error: BaseException | None) -> None:
        """Plan the next try. Raises QueueRefusedError when the subscription was refused for `REFUSED_FOR` seconds."""
        now = time.monotonic()
        if now - self._opened_at > REFUSED_FOR:  # it had worked
            self._pause, self._refused_since = FIRST_PAUSE, None
        if isinstance(error, _REFUSALS):
            self._refused_since = self._refused_since or now
            if now - self._refused_since > REFUSED_FOR:
                self._close()
                self._open_at = now
                raise QueueRefusedError(f"QUEUE_URL: Pub/Sub refuses the subscription: {error}")
        self._close()
        self._open_at = now + self._pause
        log.warning(
            "stream_ended", extra={"error": type(error).__name__, "reason": str(error), "retry_in_s": self._pause}
        )
        self._pause = min(self._pause * 2, LONGEST_PAUSE)
