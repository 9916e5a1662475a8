"""Dead letters of a queue that leases them: each is handed out once, and what is not removed goes back in the end.

Of each letter only a handle is kept, so that a look through many takes little memory.
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

LEASE_SECONDS = 60  # seconds; a look that is killed hides its letters for so long
PAUSE = 0.1  # seconds before a queue is asked again that answered at once, with nothing


class Source(Protocol):
    """A queue that leases dead letters. A handle stands for a lease. Methods are called from several threads."""

    def lease(self, at_most: int, wait: float, seconds: int) -> Sequence[tuple[str, DeadLetter]]:
        """Return letters, leased for so many seconds, with their handles; wait no longer. Raises QueueError."""

    def extend(self, handles: Sequence[str], seconds: int) -> Mapping[str, str]:
        """Have the leases end so many seconds from now; return the reason for each handle where that failed."""

    def remove(self, handles: Sequence[str]) -> Mapping[str, str]:
        """Remove the letters for good; return the reason for each handle where that failed."""

    def close(self) -> None:
        """Let go of what is open."""


@dataclass(frozen=True, slots=True)
class LetterDelivery:
    """The message of a dead letter."""

    id: str
    body: bytes = field(repr=False)
    attributes: Mapping[str, str]
    attempt: int | None
    published_at: datetime | None


@dataclass(slots=True)
class _Lease:
    handle: str
    until: float  # monotonic seconds


class LeasedLetters:
    """Implements DeadLetterQueue. A letter whose lease was lost comes again to nobody: only its handle is noted."""

    def __init__(self, source: Source, *, seconds: int = LEASE_SECONDS) -> None:
        self._source = source
        self._seconds = seconds
        self._lock = Lock()
        self._leases: dict[str, _Lease] = {}  # by the letter's id
        self._removed: set[str] = set()
        self._closed = Event()
        self._looks = ThreadPoolExecutor(1, "dead-letters")  # Ctrl-C ends who waits for a look, not what it notes
        self._extending = Thread(target=self._extend_all, daemon=True)
        self._extending.start()

    def receive(self, max_messages: int, wait: float) -> Sequence[DeadLetter]:
        """Return letters that were not handed out yet."""
        return self._looks.submit(self._look, max_messages, wait).result()

    def remove(self, dead_letters: Sequence[DeadLetter]) -> None:
        """Remove letters for good; those whose lease was lost may still be there."""
        now = time.monotonic()
        with self._lock:
            held = {
                id_: self._leases[id_] for letter in dead_letters if (id_ := letter.delivery.id) not in self._removed
            }
        failed = self._source.remove([lease.handle for lease in held.values()])
        ended = {lease.handle: "its lease had ended" for lease in held.values() if lease.until < now}
        left = {**ended, **failed}
        with self._lock:
            for id_, lease in held.items():
                if lease.handle not in left:
                    self._removed.add(id_)
                    self._leases.pop(id_, None)
        if left:
            reason = next(iter(left.values()))
            raise QueueError(f"QUEUE_URL: {len(left)} dead letters may not have been removed: {reason}")

    def close(self) -> None:
        """End the leases; those that cannot be ended do so by themselves."""
        if self._closed.is_set():
            return
        self._closed.set()
        self._looks.shutdown()
        self._extending.join()  # it would hold again what is let go of
        self._source.extend([lease.handle for lease in self._leases.values()], 0)
        self._source.close()

    def _look(self, at_most: int, wait: float) -> list[DeadLetter]:
        """Insist until there are letters: a queue may answer with nothing, or what is known, though it has more."""
        deadline = time.monotonic() + wait
        letters: list[DeadLetter] = []
        while not (letters or self._closed.is_set()):
            began = time.monotonic()
            found = self._source.lease(at_most, max(deadline - began, 0.0), self._seconds)
            letters = self._note(found, began + self._seconds)
            if time.monotonic() >= deadline:
                break
            if not found:
                self._closed.wait(PAUSE)
        return letters

    def _note(self, found: Sequence[tuple[str, DeadLetter]], until: float) -> list[DeadLetter]:
        """Note the leases, remove again what should not be there any more, and return what is new."""
        new = []
        with self._lock:
            back = [handle for handle, letter in found if letter.delivery.id in self._removed]
            for handle, letter in found:
                id_ = letter.delivery.id
                if id_ in self._removed:
                    continue
                if id_ not in self._leases:
                    new.append(letter)
                self._leases[id_] = _Lease(handle, until)
        if back:
            self._source.remove(back)
        return new

    def _extend_all(self) -> None:
        while not self._closed.wait(self._seconds / 3):
            with self._lock:
                leases = list(self._leases.values())
            until = time.monotonic() + self._seconds
            failed = self._source.extend([lease.handle for lease in leases], self._seconds)
            for lease in leases:
                if lease.handle not in failed:
                    lease.until = until
