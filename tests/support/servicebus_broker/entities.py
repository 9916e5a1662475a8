"""Queues and subscriptions: locks, delivery counts, dead letters; without AMQP's links."""

from __future__ import annotations

import time
import uuid
from collections import deque
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING

from tests.support.servicebus_broker.encoding import milliseconds

if TYPE_CHECKING:
    from tests.support.servicebus_broker.encoding import Sections

DEAD = "$deadletterqueue"
UNLIMITED = 1_000_000_000  # deliveries, of a dead letter


@dataclass(slots=True)
class StoredMessage:
    """A message in an entity."""

    sections: Sections
    sequence: int
    enqueued_at: float
    delivery_count: int = 0
    token: uuid.UUID | None = None  # of the lock; None if it is not locked
    locked_until: float = 0.0

    def encode(self, ahead: float) -> bytes:
        """Encode the message for delivery, with times by a clock that is `ahead` seconds ahead."""
        values = {
            "x-opt-sequence-number": self.sequence,
            "x-opt-enqueued-time": milliseconds(self.enqueued_at + ahead),
        }
        if self.token is not None:
            values["x-opt-locked-until"] = milliseconds(self.locked_until + ahead)
        return self.sections.encode(self.delivery_count, values)


class Entity:
    """A queue, a subscription, or the dead-letter queue of one."""

    def __init__(self, name: str, lock: float, max_delivery: int, *, is_dead: bool = False) -> None:
        self.name = name
        self.lock = lock
        self.ahead = 0.0  # seconds that the clock in messages and responses is ahead
        self.refusal = ""  # condition that refuses links and requests; "" grants access
        self.busy = 0  # number of requests to reject as busy
        self.ready: deque[StoredMessage] = deque()
        self.locked: dict[uuid.UUID, StoredMessage] = {}
        self.dead = None if is_dead else Entity(f"{name}/{DEAD}", lock, UNLIMITED, is_dead=True)
        self._max_delivery = max_delivery
        self._sequence = count(1)

    def put(self, sections: Sections) -> None:
        """Store a message."""
        self.ready.append(StoredMessage(sections, next(self._sequence), time.time()))

    def lock_next(self) -> tuple[uuid.UUID, StoredMessage]:
        """Lock the first ready message."""
        stored = self.ready.popleft()
        token = stored.token = uuid.uuid4()
        stored.locked_until = time.time() + self.lock
        self.locked[token] = stored
        return token, stored

    def renew(self, tokens: list[uuid.UUID]) -> list[float] | None:
        """Renew the locks; return their ends, or None if a lock is lost."""
        if any(token not in self.locked for token in tokens):
            return None
        for token in tokens:
            self.locked[token].locked_until = time.time() + self.lock
        return [self.locked[token].locked_until for token in tokens]

    def complete(self, token: uuid.UUID) -> bool:
        """Remove a message. Like all methods that settle, return whether its lock was valid."""
        return self.locked.pop(token, None) is not None

    def release(self, token: uuid.UUID) -> bool:
        """Make a message ready again without counting the delivery."""
        return self._unlock(token, failed=False)

    def abandon(self, token: uuid.UUID) -> bool:
        """Make a message ready again, or dead-letter it after the maximum number of deliveries."""
        return self._unlock(token, failed=True)

    def dead_letter(self, token: uuid.UUID, reason: str, description: str) -> bool:
        """Dead-letter a message."""
        stored = self.locked.pop(token, None)
        if stored is None:
            return False
        if self.dead is not None:
            values = {"DeadLetterReason": reason, "DeadLetterErrorDescription": description}
            self.dead.put(stored.sections.with_properties(values))
        return True

    def end_locks(self, now: float) -> None:
        """Make the messages ready whose locks ended before `now`."""
        for token in [token for token, stored in self.locked.items() if stored.locked_until <= now]:
            self.abandon(token)
        if self.dead is not None:
            self.dead.end_locks(now)

    def read(self, first: int, max_messages: int) -> list[StoredMessage]:
        """Return messages, locked or not, from sequence number `first` on."""
        found = [stored for stored in (*self.ready, *self.locked.values()) if stored.sequence >= first]
        return sorted(found, key=lambda stored: stored.sequence)[:max_messages]

    def _unlock(self, token: uuid.UUID, *, failed: bool) -> bool:
        stored = self.locked.get(token)
        if stored is None:
            return False
        stored.delivery_count += failed
        if stored.delivery_count >= self._max_delivery:
            description = f"Message could not be consumed after {stored.delivery_count} delivery attempts."
            return self.dead_letter(token, "MaxDeliveryCountExceeded", description)
        del self.locked[token]
        stored.token = None
        self.ready.appendleft(stored)
        return True
