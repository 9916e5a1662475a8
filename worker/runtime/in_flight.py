"""The messages in flight: received and not settled. Their number and their size are limited."""

from __future__ import annotations

from datetime import UTC, datetime
from threading import Condition
from typing import TYPE_CHECKING

from worker.errors import CircuitOpen, Misconfigured

if TYPE_CHECKING:
    from collections.abc import Sequence

    from worker.model import Message


class InFlight:
    """The messages in flight of all lanes. Thread-safe."""

    def __init__(self, max_messages: int, max_bytes: int) -> None:
        self._max_messages = max_messages
        self._max_bytes = max_bytes
        self._messages: dict[int, Message] = {}  # by id()
        self._held: dict[int, Exception | None] = {}  # by id() of each held message: why it could not be processed
        self._bytes = 0
        self._changed = Condition()

    def __len__(self) -> int:
        return len(self._messages)

    def messages(self) -> list[Message]:
        """Return all messages in flight."""
        with self._changed:
            return list(self._messages.values())

    def add(self, message: Message) -> None:
        """Add a message that was received."""
        with self._changed:
            self._messages[id(message)] = message
            self._bytes += len(message.delivery.body)

    def remove(self, messages: Sequence[Message]) -> None:
        """Remove messages that were settled."""
        with self._changed:
            for message in messages:
                self._held.pop(id(message), None)
                if self._messages.pop(id(message), None) is not None:
                    self._bytes -= len(message.delivery.body)
            self._changed.notify_all()

    def hold(self, messages: Sequence[Message]) -> None:
        """Record that messages are held, and why."""
        with self._changed:
            for message in messages:
                if id(message) in self._messages:
                    self._held[id(message)] = message.outcome.cause if message.outcome else None
            self._changed.notify_all()

    def wait_for_capacity(self, seconds: float) -> int:
        """Return how many messages can be received. If there is no capacity, first wait at most `seconds` for it."""
        with self._changed:
            if self._capacity() <= 0:
                self._changed.wait(seconds)
            return max(self._capacity(), 0)

    def wait_for_change(self, seconds: float) -> None:
        """Wait at most `seconds` until a message is settled or held."""
        with self._changed:
            self._changed.wait(seconds)

    def wake(self) -> None:
        """End all waits."""
        with self._changed:
            self._changed.notify_all()

    @property
    def held(self) -> int:
        """Count the held messages."""
        return len(self._held)

    def oldest_age(self) -> float | None:
        """Return the number of seconds since the oldest message was published: 0 without messages, None if unknown."""
        messages = self.messages()
        published = [message.delivery.published_at for message in messages if message.delivery.published_at is not None]
        if not published:
            return None if messages else 0.0
        return max((datetime.now(UTC) - min(published)).total_seconds(), 0.0)  # clocks can differ

    @property
    def has_only_held(self) -> bool:
        """Return whether every message is held. True without messages."""
        return len(self._held) >= len(self._messages)

    @property
    def is_blocked(self) -> bool:
        """Return whether there are messages, all of them are held, and one is held because a circuit is open."""
        with self._changed:
            return self.has_only_held and any(isinstance(cause, CircuitOpen) for cause in self._held.values())

    def parked_reason(self) -> str:
        """Return why the worker is parked; "" if it is not."""
        with self._changed:
            return next((str(cause) for cause in self._held.values() if isinstance(cause, Misconfigured)), "")

    def _capacity(self) -> int:
        return self._max_messages - len(self._messages) if self._bytes < self._max_bytes else 0
