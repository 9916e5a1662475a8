"""The dead-letter queue of a Service Bus queue. Dead letters are read without locks, and locked only for removal."""

from __future__ import annotations

import time
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from threading import Lock
from typing import TYPE_CHECKING

from adapters.base import DeadLetter, QueueError
from adapters.servicebus.connections import FAILURES, close
from adapters.servicebus.dead_letter_reason import parse_reason
from adapters.servicebus.lock_duration import MIN_LOCK, lock_end
from adapters.servicebus.message import ServiceBusDelivery, delivery_of
from adapters.servicebus.receiver import MAX_PREFETCH
from adapters.servicebus.settlement import ReceiverPool, Settlement, is_settled

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from azure.servicebus import ServiceBusReceivedMessage, ServiceBusReceiver

REMOVE_TIMEOUT = 10.0  # seconds of retries to remove locked messages
IDLE_TIMEOUT = 3.0  # seconds without a message after which there is none left to lock
CLOSE_TIMEOUT = 0.5  # seconds, as for Settlement
_REASON = ("DeadLetterReason", "DeadLetterErrorDescription")  # properties that the publisher did not set


class ServiceBusDeadLetters:
    """The dead letters by sequence number. Concurrent readers each get all of them: handling twice is harmless.

    Service Bus locks dead letters only in its own order. To remove a dead letter, those before it must be locked too;
    `close` releases them. A dead letter whose lock ends earlier is locked again.
    """

    def __init__(
        self, connect: Callable[..., ServiceBusReceiver], queue_error: Callable[[BaseException], QueueError]
    ) -> None:
        self._connect = connect
        self._queue_error = queue_error
        self._pool = ReceiverPool(connect)
        self._settlement = Settlement(connect)
        self._locked: dict[int, ServiceBusReceivedMessage] = {}  # by sequence number
        self._receiver: ServiceBusReceiver | None = None  # locks messages
        self._locked_at = 0.0  # monotonic seconds
        self._next = 1  # sequence number to continue reading from
        self._lock = Lock()

    def check(self) -> None:
        """Raise QueueError unless the dead letters can be read."""
        self._read([1], 1)

    def receive(self, max_messages: int, wait: float) -> list[DeadLetter]:  # noqa: ARG002 - reading does not wait
        """Return the next dead letters. Service Bus returns at most 250 at a time."""
        with self._lock:
            found = self._read([self._next], max_messages)
            self._next = _sequence_number(found[-1]) + 1 if found else self._next
        return [_dead_letter(message) for message in found]

    def remove(self, dead_letters: Sequence[DeadLetter]) -> None:
        """Lock and complete the dead letters. Raises QueueError if some still exist afterwards."""
        deliveries = [dead_letter.delivery for dead_letter in dead_letters]
        wanted = {_sequence_number(each.message) for each in deliveries if isinstance(each, ServiceBusDelivery)}
        remaining = set(wanted)
        with self._lock:
            self._forget_expired()
            if time.monotonic() - self._locked_at > MIN_LOCK:  # locks of prefetched messages have possibly ended
                self._close_receiver()
            self._complete(remaining)
            try:
                self._lock_and_complete(remaining)
            except FAILURES as error:
                raise self._queue_error(error) from None
            existing = remaining and remaining & {_sequence_number(message) for message in self._read(remaining, 1)}
        if existing:
            reason = "another process has locked them, or locks end before all dead letters ahead of them are locked"
            text = f"QUEUE_URL: {len(existing)} of {len(wanted)} dead letters still exist: {reason}"
            raise QueueError(text, todo="try again")

    def close(self) -> None:
        """Abandon the locked dead letters, and close the connections."""
        with self._lock:
            self._close_receiver()
            self._forget_expired()
            self._settlement.nack(list(self._locked.values()))
            self._locked.clear()
            self._settlement.close()
            self._pool.close(CLOSE_TIMEOUT)

    def _read(self, numbers: Iterable[int], max_messages: int) -> list[ServiceBusReceivedMessage]:
        """Read up to `max_messages` from each sequence number on, without locks. The results are in any order."""
        found: list[ServiceBusReceivedMessage] = []

        def read(number: int, receiver: ServiceBusReceiver) -> None:
            found.extend(receiver.peek_messages(max_messages, sequence_number=number))

        for error in self._pool.run([partial(read, number) for number in numbers]):
            if error is not None:
                raise self._queue_error(error)
        return found

    def _lock_and_complete(self, remaining: set[int]) -> None:
        """Lock dead letters until none is available. Remove those in `remaining` from it and from the queue."""
        skipped: set[int] = set()
        while remaining:
            locked = {
                _sequence_number(message): message for message in self._lock_next(min(len(remaining), MAX_PREFETCH))
            }
            self._locked |= locked
            if not locked or skipped & locked.keys():  # a skipped dead letter came again, so all were seen
                return
            skipped |= locked.keys() - remaining
            self._complete(remaining)

    def _lock_next(self, max_messages: int) -> Sequence[ServiceBusReceivedMessage]:
        """Lock up to `max_messages`. Return [] if none is available even over a new connection."""
        is_new = self._receiver is None
        try:
            # keep_alive=0 as in ServiceBusQueue: otherwise a thread of the SDK also reads from the link
            self._receiver = self._receiver or self._connect(prefetch_count=MAX_PREFETCH - 1, keep_alive=0)
            messages = self._receiver.receive_messages(max_messages, IDLE_TIMEOUT)
            self._locked_at = time.monotonic()
        except FAILURES:
            if is_new:
                raise
            messages = []
        if messages or is_new:
            return messages
        self._close_receiver()
        return self._lock_next(max_messages)

    def _close_receiver(self) -> None:
        if self._receiver is not None:
            close(self._receiver)
            self._receiver = None

    def _complete(self, remaining: set[int]) -> None:
        """Remove the locked dead letters from `remaining` and from the queue."""
        locked = {number: self._locked.pop(number) for number in remaining & self._locked.keys()}
        self._settlement.ack(list(locked.values()), REMOVE_TIMEOUT)
        remaining -= {number for number, message in locked.items() if is_settled(message)}

    def _forget_expired(self) -> None:
        now = datetime.now(UTC)
        self._locked = {number: each for number, each in self._locked.items() if (lock_end(each) or now) > now}


def _dead_letter(message: ServiceBusReceivedMessage) -> DeadLetter:
    """Return a message that was read without a lock as a dead letter."""
    delivery = delivery_of(message)
    parsed = parse_reason(*(delivery.attributes.get(name, "") for name in _REASON))
    original = {name: value for name, value in delivery.attributes.items() if name not in _REASON}
    return DeadLetter(replace(delivery, attributes=original, attempt=parsed.attempt), parsed.failure, parsed.at)


def _sequence_number(message: ServiceBusReceivedMessage) -> int:
    return message.sequence_number or 0
