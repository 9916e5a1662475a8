"""One pass through the dead letters of a queue that leases them.

Only the handles of dead letters are kept, so a pass through many dead letters needs little memory.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Event, Lock, Thread
from typing import TYPE_CHECKING, Protocol

from adapters.base import QueueError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from datetime import datetime

    from adapters.base import DeadLetter

LEASE_SECONDS = 60  # dead letters of a killed process can be leased again after this time
EMPTY_POLL_PAUSE = 0.1  # seconds between polls of a queue that returns nothing, possibly immediately


class DeadLetterSource(Protocol):
    """A queue that leases dead letters. A handle identifies a lease. Methods are called from several threads."""

    def lease(self, max_messages: int, wait: float, seconds: int) -> Sequence[tuple[str, DeadLetter]]:
        """Lease dead letters for `seconds`; return them with their handles within `wait` seconds. Raises QueueError."""

    def extend(self, handles: Sequence[str], seconds: int) -> Mapping[str, str]:
        """Make the leases end `seconds` from now. Return the error text of each handle that failed."""

    def remove(self, handles: Sequence[str]) -> Mapping[str, str]:
        """Remove the dead letters permanently. Return the error text of each handle that failed."""

    def close(self) -> None:
        """Close the connections."""


@dataclass(frozen=True, slots=True)
class DeadLetterDelivery:
    """The message of a dead letter."""

    id: str
    body: bytes = field(repr=False)
    attributes: Mapping[str, str]
    attempt: int | None
    published_at: datetime | None


@dataclass(slots=True)
class _Lease:
    handle: str
    expires_at: float  # monotonic seconds


class LeasedDeadLetters:
    """Returns each dead letter once, and releases those that are not removed. Implements DeadLetterQueue.

    If a lease expires, the queue delivers the dead letter again: then only the new handle is stored.
    """

    def __init__(self, source: DeadLetterSource, *, seconds: int = LEASE_SECONDS) -> None:
        self._source = source
        self._seconds = seconds
        self._lock = Lock()
        self._leases: dict[str, _Lease] = {}  # by the message's id
        self._removed: set[str] = set()
        self._closed = Event()
        self._polls = ThreadPoolExecutor(1, "dead-letters")  # Ctrl-C interrupts the caller, not the poll in progress
        self._extender = Thread(target=self._extend_leases, daemon=True)
        self._extender.start()

    def receive(self, max_messages: int, wait: float) -> Sequence[DeadLetter]:
        """Return dead letters that were not returned before."""
        return self._polls.submit(self._poll, max_messages, wait).result()

    def remove(self, dead_letters: Sequence[DeadLetter]) -> None:
        """Remove dead letters permanently. Raises QueueError if leases were lost: these dead letters can remain."""
        now = time.monotonic()
        ids = [dead_letter.delivery.id for dead_letter in dead_letters]
        with self._lock:
            leases = {id_: self._leases[id_] for id_ in ids if id_ not in self._removed}
        errors = {lease.handle: "its lease had ended" for lease in leases.values() if lease.expires_at < now}
        errors |= self._source.remove([lease.handle for lease in leases.values()])
        with self._lock:
            for id_, lease in leases.items():
                if lease.handle not in errors:
                    self._removed.add(id_)
                    self._leases.pop(id_, None)
        if errors:
            reason = next(iter(errors.values()))
            raise QueueError(f"QUEUE_URL: {len(errors)} dead letters were possibly not removed: {reason}")

    def close(self) -> None:
        """End the leases; if that fails, they expire."""
        if self._closed.is_set():
            return
        self._closed.set()
        self._polls.shutdown()
        self._extender.join()  # otherwise it could extend the leases again
        self._source.extend([lease.handle for lease in self._leases.values()], 0)
        self._source.close()

    def _poll(self, max_messages: int, wait: float) -> list[DeadLetter]:
        """Poll until new dead letters arrive: a queue can return none, or known ones, although it has new ones."""
        deadline = time.monotonic() + wait
        new: list[DeadLetter] = []
        while not (new or self._closed.is_set()):
            started_at = time.monotonic()
            leased = self._source.lease(max_messages, max(deadline - started_at, 0.0), self._seconds)
            new = self._store(leased, started_at + self._seconds)
            if time.monotonic() >= deadline:
                break
            if not leased:
                self._closed.wait(EMPTY_POLL_PAUSE)
        return new

    def _store(self, leased: Sequence[tuple[str, DeadLetter]], expires_at: float) -> list[DeadLetter]:
        """Store the leases and return the new dead letters. If a removed dead letter reappears, remove it again."""
        new = []
        reappeared = []
        with self._lock:
            for handle, dead_letter in leased:
                id_ = dead_letter.delivery.id
                if id_ in self._removed:
                    reappeared.append(handle)
                    continue
                if id_ not in self._leases:
                    new.append(dead_letter)
                self._leases[id_] = _Lease(handle, expires_at)
        if reappeared:
            self._source.remove(reappeared)
        return new

    def _extend_leases(self) -> None:
        while not self._closed.wait(self._seconds / 3):
            with self._lock:
                leases = list(self._leases.values())
            expires_at = time.monotonic() + self._seconds
            errors = self._source.extend([lease.handle for lease in leases], self._seconds)
            for lease in leases:
                if lease.handle not in errors:
                    lease.expires_at = expires_at
