"""The dead letters of a Service Bus queue: looked at without a lock, and locked only to be removed."""

from __future__ import annotations

import time
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from threading import Lock
from typing import TYPE_CHECKING

from adapters.base import DeadLetter, QueueError
from adapters.servicebus.connections import FAILURES, close
from adapters.servicebus.dead_letter_reason import read
from adapters.servicebus.lock_duration import SHORTEST_LEASE, lock_end
from adapters.servicebus.message import ServiceBusDelivery, delivery_of
from adapters.servicebus.receiver import MOST_AT_ONCE
from adapters.servicebus.settlement import Settlement, Threads, is_settled

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from azure.servicebus import ServiceBusReceivedMessage, ServiceBusReceiver

PATIENCE = 10.0  # seconds to remove what is locked
QUIET = 3.0  # seconds without a letter after which there is none to be locked
CLOSE_SECONDS = 0.5  # as for what settles
_BURIAL = ("DeadLetterReason", "DeadLetterErrorDescription")  # properties that are not the publisher's


class ServiceBusDeadLetters:
    """The letters by sequence number. Two who look at once are both shown all: handling twice is harmless.

    Service Bus locks no letter of one's choice: it hands them out in its own order. So to remove one, those before it
    are locked too, and let go by `close`; a lock that ends before only has to be had once more.
    """

    def __init__(
        self, connect: Callable[..., ServiceBusReceiver], explain: Callable[[BaseException], QueueError]
    ) -> None:
        self._connect = connect
        self._explain = explain
        self._looking = Threads(connect)
        self._settlement = Settlement(connect)
        self._locked: dict[int, ServiceBusReceivedMessage] = {}  # by sequence number, as all here
        self._receiver: ServiceBusReceiver | None = None  # that locks
        self._locked_at = 0.0  # monotonic seconds
        self._next = 1
        self._lock = Lock()

    def check(self) -> None:
        """Raise QueueError unless the letters can be looked at."""
        self._peek([1], 1)

    def receive(self, max_messages: int, wait: float) -> list[DeadLetter]:  # noqa: ARG002 - what is there is there at once
        """Return the next ones: perhaps less than there are, as Service Bus gives no more than 250 at a time."""
        with self._lock:
            found = self._peek([self._next], max_messages)
            self._next = _number(found[-1]) + 1 if found else self._next
        return [_dead_letter(message) for message in found]

    def remove(self, dead_letters: Sequence[DeadLetter]) -> None:
        """Lock and complete them. Raises QueueError when some are still there in the end."""
        deliveries = [letter.delivery for letter in dead_letters]
        asked = {_number(each.message) for each in deliveries if isinstance(each, ServiceBusDelivery)}
        left = set(asked)
        with self._lock:
            self._forget_what_ended()
            if time.monotonic() - self._locked_at > SHORTEST_LEASE:  # what is on its way may be locked no longer
                self._hang_up()
            self._complete(left)
            try:
                self._lock_and_complete(left)
            except FAILURES as error:
                raise self._explain(error) from None
            there = left and left & {_number(message) for message in self._peek(left, 1)}
        if there:
            why = "somebody else has locked them, or locks end before all letters ahead of them are locked"
            raise QueueError(f"QUEUE_URL: {len(there)} of {len(asked)} dead letters are still there: {why}; try again")

    def close(self) -> None:
        """Abandon what is locked, and let go of the connections."""
        with self._lock:
            self._hang_up()
            self._forget_what_ended()
            self._settlement.abandon(list(self._locked.values()))
            self._locked.clear()
            self._settlement.close()
            self._looking.close(CLOSE_SECONDS)

    def _peek(self, numbers: Iterable[int], at_most: int) -> list[ServiceBusReceivedMessage]:
        """Return up to `at_most` letters from each number on, in no order if there are several numbers."""
        found: list[ServiceBusReceivedMessage] = []

        def peek(number: int, receiver: ServiceBusReceiver) -> None:
            found.extend(receiver.peek_messages(at_most, sequence_number=number))

        for error in self._looking.run([partial(peek, number) for number in numbers]):
            if error is not None:
                raise self._explain(error)
        return found

    def _lock_and_complete(self, left: set[int]) -> None:
        """Lock letters, and remove them from `left` and for good, until none is left or to be had."""
        passed: set[int] = set()
        while left:
            locked = {_number(message): message for message in self._lock_next(min(len(left), MOST_AT_ONCE))}
            self._locked |= locked
            if not locked or passed & locked.keys():  # all were seen
                return
            passed |= locked.keys() - left
            self._complete(left)

    def _lock_next(self, wanted: int) -> Sequence[ServiceBusReceivedMessage]:
        """Lock up to so many letters; [] when there are none to be had, also not by a new connection."""
        is_fresh = self._receiver is None
        try:
            # As in ServiceBusQueue: else the SDK reads on a thread of its own
            self._receiver = self._receiver or self._connect(prefetch_count=MOST_AT_ONCE - 1, keep_alive=0)
            messages = self._receiver.receive_messages(wanted, QUIET)
            self._locked_at = time.monotonic()
        except FAILURES:
            if is_fresh:
                raise
            messages = []
        if messages or is_fresh:
            return messages
        self._hang_up()
        return self._lock_next(wanted)

    def _hang_up(self) -> None:
        if self._receiver is not None:
            close(self._receiver)
            self._receiver = None

    def _complete(self, left: set[int]) -> None:
        """Remove, from `left` and for good, what is locked."""
        locked = {number: self._locked.pop(number) for number in left & self._locked.keys()}
        self._settlement.complete(list(locked.values()), PATIENCE)
        left -= {number for number, message in locked.items() if is_settled(message)}

    def _forget_what_ended(self) -> None:
        now = datetime.now(UTC)
        self._locked = {number: each for number, each in self._locked.items() if (lock_end(each) or now) > now}


def _dead_letter(message: ServiceBusReceivedMessage) -> DeadLetter:
    """Read a letter that was peeked."""
    delivery = delivery_of(message)
    burial = read(*(delivery.attributes.get(name, "") for name in _BURIAL))
    own = {name: value for name, value in delivery.attributes.items() if name not in _BURIAL}
    return DeadLetter(replace(delivery, attributes=own, attempt=burial.attempt), burial.failure, burial.at)


def _number(message: ServiceBusReceivedMessage) -> int:
    return message.sequence_number or 0
