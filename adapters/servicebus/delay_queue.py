"""Where messages wait that were sent back, for a queue that cannot delay them itself."""

from __future__ import annotations

import time
from heapq import heappop, heappush
from itertools import count
from threading import Condition, Thread
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")


class Parking(Generic[T]):
    """Holds up to `places` items, each until it is due, and then hands them to `release`, on a thread of its own.

    Beyond that the one that is due first goes at once. Safe for many threads.
    """

    def __init__(self, places: int, release: Callable[[list[T]], None]) -> None:
        self._places = places
        self._release = release
        self._parked: list[tuple[float, int, T]] = []  # a heap, by when they are due, in monotonic seconds
        self._order = count()
        self._changed = Condition()
        self._is_closed = False
        self._thread = Thread(target=self._run, daemon=True, name="parking")

    def park(self, items: list[T], delay: float) -> list[T]:
        """Hold items for `delay` seconds; return what has to go at once: no place is left, or it is closed."""
        due = time.monotonic() + delay
        with self._changed:
            if self._is_closed:
                return items
            for item in items:
                heappush(self._parked, (due, next(self._order), item))
            surplus = [heappop(self._parked)[2] for _ in range(len(self._parked) - self._places)]
            if not self._thread.is_alive():
                self._thread.start()
            self._changed.notify_all()
        return surplus

    def parked(self) -> list[T]:
        """Return what is held."""
        with self._changed:
            return [item for _, _, item in self._parked]

    def close(self) -> list[T]:
        """Hold no more; return what was held."""
        with self._changed:
            self._is_closed = True
            left = [item for _, _, item in self._parked]
            self._parked.clear()
            self._changed.notify_all()
        return left

    def _run(self) -> None:
        while True:
            with self._changed:
                if self._is_closed:
                    return
                now = time.monotonic()
                due = []
                while self._parked and self._parked[0][0] <= now:
                    due.append(heappop(self._parked)[2])
                if not due:
                    self._changed.wait(self._parked[0][0] - now if self._parked else None)
                    continue
            self._release(due)
