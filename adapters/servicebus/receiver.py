"""Messages of a Service Bus queue as they arrive, whatever becomes of the connection."""

from __future__ import annotations

import logging
import time
from threading import Condition, Event, Thread
from typing import TYPE_CHECKING

from adapters.base import QueueRefusedError
from adapters.servicebus.connections import close, in_short, is_refusal
from adapters.servicebus.message import ServiceBusDelivery, delivery_of
from adapters.shared.inbox import Inbox

if TYPE_CHECKING:
    from collections.abc import Callable

    from azure.servicebus import ServiceBusReceiver

log = logging.getLogger("klaviyo_worker.servicebus")

RECEIVE_WAIT = 0.5  # seconds in which a thread that waits for messages notices that it is to stop
STOP_SECONDS = 3 * RECEIVE_WAIT  # the SDK ends its wait up to 0.2 s late
CLOSE_SECONDS = 1.0  # the SDK has this long to return what is on its way
MOST_AT_ONCE = 50  # messages on their way to a receiver
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 10.0  # seconds before a receiver that ended is opened again
REFUSED_FOR = 60.0  # seconds a refusal is taken for passing: permissions take a while to spread
SILENCE = 300.0  # seconds without a message after which a receiver is opened anew, in case it hangs


class Receiving:
    """Receives on a thread of its own, and opens a receiver again whenever it ends.

    No more waits to be taken than the last `take` asked for, nor more bytes than `max_bytes` and one call brings.
    """

    def __init__(self, connect: Callable[[], ServiceBusReceiver], max_bytes: int) -> None:
        self._connect = connect
        self._max_bytes = max_bytes
        self._receiver: ServiceBusReceiver | None = None
        self._inbox: Inbox[ServiceBusDelivery] = Inbox()
        self._wanted = 0
        self._asked = Condition()
        self._stopping = Event()
        self._received = Event()  # the last message there will be
        self._thread = Thread(target=self._run, daemon=True, name="servicebus-receiving")
        self._at_once = 1
        self._pause = FIRST_PAUSE
        self._heard_at = 0.0  # monotonic seconds, as all times here
        self._refused_since: float | None = None
        self._refusal = ""

    def take(self, max_messages: int, wait: float) -> list[ServiceBusDelivery]:
        """Return up to `max_messages`, waiting at most `wait` seconds. Raises QueueRefusedError, and may go on."""
        self._want(max_messages)
        deliveries = self._inbox.take(max_messages, wait)
        self._want(max_messages - len(deliveries))
        refused_since = self._refused_since
        if not deliveries and refused_since is not None and time.monotonic() - refused_since > REFUSED_FOR:
            raise QueueRefusedError(f"QUEUE_URL: Service Bus refuses the queue: {self._refusal}")
        return deliveries

    def waiting(self) -> list[ServiceBusDelivery]:
        """Return the messages that arrived and were not taken."""
        return self._inbox.waiting()

    def stop(self) -> list[ServiceBusDelivery]:
        """Receive no more. Returns what arrived and was not taken."""
        self._stopping.set()
        with self._asked:
            self._asked.notify_all()
        if self._thread.is_alive():
            self._received.wait(STOP_SECONDS)
        return self._inbox.clear()

    def close(self) -> None:
        """Stop, and wait a moment for the receiver to be closed."""
        self.stop()
        if self._thread.is_alive():
            self._thread.join(CLOSE_SECONDS)

    def _want(self, messages: int) -> None:
        with self._asked:
            self._wanted = messages
            if self._thread.ident is None and not self._stopping.is_set():
                self._thread.start()
            self._asked.notify_all()

    def _run(self) -> None:
        while not self._stopping.is_set():
            with self._asked:
                has_room = self._asked.wait_for(self._has_room, RECEIVE_WAIT)
            if has_room:
                self._receive()
            else:  # nobody renews the locks of what is on its way: give it back
                self._close()
        self._received.set()
        self._close()

    def _has_room(self) -> bool:
        waiting = self._inbox.waiting()
        return len(waiting) < self._wanted and sum(len(delivery.body) for delivery in waiting) < self._max_bytes

    def _receive(self) -> None:
        """Receive a few messages: a single one, at once, while few come.

        The SDK waits for more messages, for 0.2 s, when it was asked for more than there are.
        """
        wanted = max(min(self._at_once, self._wanted - len(self._inbox.waiting())), 1)
        try:
            if self._receiver is None:
                self._receiver = self._connect()
                self._heard_at = time.monotonic()
                return  # that took a while: perhaps nothing is to be received any more
            messages = self._receiver.receive_messages(wanted, RECEIVE_WAIT)
            for message in messages:
                self._inbox.put(delivery_of(message))
        except Exception as error:  # noqa: BLE001 - a thread that ends would never receive again
            self._ended(error)
            return
        self._at_once = min(wanted * 10, MOST_AT_ONCE) if len(messages) == wanted else 1
        self._pause, self._refused_since = FIRST_PAUSE, None
        if messages:
            self._heard_at = time.monotonic()
        elif time.monotonic() - self._heard_at > SILENCE:
            log.info("receiver_renewed", extra={"silent_s": round(SILENCE)})
            self._close()

    def _ended(self, error: BaseException) -> None:
        """Note why the receiver ended, and wait before the next try."""
        self._close()
        if is_refusal(error):
            self._refusal = in_short(error)
            self._refused_since = self._refused_since or time.monotonic()
        about = {"error": type(error).__name__, "reason": in_short(error), "retry_in_s": self._pause}
        log.warning("receiver_ended", extra=about)
        self._stopping.wait(self._pause)
        self._pause = min(self._pause * 2, LONGEST_PAUSE)

    def _close(self) -> None:
        if self._receiver is not None:
            close(self._receiver)
            self._receiver = None
