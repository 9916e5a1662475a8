"""Receives the messages of a Service Bus queue on a thread, and reopens the connection after every failure."""

from __future__ import annotations

import logging
import time
from threading import Condition, Event, Thread
from typing import TYPE_CHECKING

from adapters.base import QueueRefusedError
from adapters.servicebus.connections import close, first_line, is_refusal
from adapters.servicebus.message import ServiceBusDelivery, delivery_of
from adapters.shared.inbox import Inbox
from adapters.shared.reconnect import ReceiveFailures

if TYPE_CHECKING:
    from collections.abc import Callable

    from azure.servicebus import ServiceBusReceiver

log = logging.getLogger("klaviyo_worker.servicebus")

RECEIVE_WAIT = 0.5  # seconds after which a waiting thread checks if it must stop
STOP_TIMEOUT = 3 * RECEIVE_WAIT  # the SDK can end its wait 0.2 s late
CLOSE_TIMEOUT = 1.0  # seconds for the SDK to release the messages that it prefetched
MAX_PREFETCH = 50  # messages that Service Bus sends ahead to a receiver
IDLE_TIMEOUT = 300.0  # seconds without a message after which the receiver is reopened, in case it hangs


class Receiver:
    """The messages of a queue, received on a separate thread.

    It buffers at most as many messages as the last `receive` requested. The total size of their bodies can exceed
    `max_bytes` by the bodies of one SDK call.
    """

    def __init__(self, connect: Callable[[], ServiceBusReceiver], max_bytes: int) -> None:
        self._connect = connect
        self._max_bytes = max_bytes
        self._receiver: ServiceBusReceiver | None = None
        self._inbox: Inbox[ServiceBusDelivery] = Inbox()
        self._wanted = 0
        self._requested = Condition()
        self._stopping = Event()
        self._ended = Event()  # the last message has arrived
        self._thread = Thread(target=self._run, daemon=True, name="servicebus-receiver")
        self._batch = 1  # messages to request from the SDK
        self._failures = ReceiveFailures("servicebus")
        self._active_at = 0.0  # monotonic seconds: the last message, or the opening

    def receive(self, max_messages: int, wait: float) -> list[ServiceBusDelivery]:
        """Return up to `max_messages`, waiting at most `wait` seconds for the first.

        Raises QueueRefusedError after a lasting refusal; the next call tries again.
        """
        self._request(max_messages)
        deliveries = self._inbox.get(max_messages, wait)
        self._request(max_messages - len(deliveries))
        if not deliveries and (refusal := self._failures.lasting_refusal()):
            raise QueueRefusedError(f"QUEUE_URL: Service Bus refuses the queue: {refusal}")
        return deliveries

    def pending(self) -> list[ServiceBusDelivery]:
        """Return the messages that arrived and that `receive` did not return yet."""
        return self._inbox.items()

    def stop(self) -> list[ServiceBusDelivery]:
        """Stop the thread; return the messages that arrived and that `receive` did not return."""
        self._stopping.set()
        with self._requested:
            self._requested.notify_all()
        if self._thread.is_alive():
            self._ended.wait(STOP_TIMEOUT)
        return self._inbox.clear()

    def close(self) -> None:
        """Stop, and wait up to a second for the connection to be closed."""
        self.stop()
        if self._thread.is_alive():
            self._thread.join(CLOSE_TIMEOUT)

    def _request(self, messages: int) -> None:
        with self._requested:
            self._wanted = messages
            if self._thread.ident is None and not self._stopping.is_set():
                self._thread.start()
            self._requested.notify_all()

    def _run(self) -> None:
        while not self._stopping.is_set():
            with self._requested:
                has_room = self._requested.wait_for(self._has_room, RECEIVE_WAIT)
            if has_room:
                self._receive()
            else:  # closing releases the prefetched messages, whose locks are not renewed
                self._close()
        self._ended.set()
        self._close()

    def _has_room(self) -> bool:
        pending = self._inbox.items()
        return len(pending) < self._wanted and sum(len(delivery.body) for delivery in pending) < self._max_bytes

    def _receive(self) -> None:
        """Receive available messages. Request only one message at a time while few arrive.

        If more messages are requested than are available, the SDK waits 0.2 s for the others.
        """
        wanted = max(min(self._batch, self._wanted - len(self._inbox.items())), 1)
        try:
            if self._receiver is None:
                self._receiver = self._connect()
                self._active_at = time.monotonic()
                return  # connecting takes a while: check again whether there is room
            messages = self._receiver.receive_messages(wanted, RECEIVE_WAIT)
            for message in messages:
                self._inbox.put(delivery_of(message))
        except Exception as error:  # noqa: BLE001 - the thread must go on after any error
            self._on_failure(error)
            return
        self._batch = min(wanted * 10, MAX_PREFETCH) if len(messages) == wanted else 1
        self._failures.reset()
        if messages:
            self._active_at = time.monotonic()
        elif time.monotonic() - self._active_at > IDLE_TIMEOUT:
            log.info("receiver_restarted", extra={"adapter": "servicebus", "silent_s": round(IDLE_TIMEOUT)})
            self._close()

    def _on_failure(self, error: BaseException) -> None:
        """Close the connection, and wait before it is reopened."""
        self._close()
        reason = first_line(error)
        if is_refusal(error):
            self._failures.add_refusal(reason)
        self._stopping.wait(self._failures.back_off(type(error).__name__, reason))

    def _close(self) -> None:
        if self._receiver is not None:
            close(self._receiver)
            self._receiver = None
