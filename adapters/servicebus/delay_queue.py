"""Delays nacked messages for a queue that has no delayed nack."""

from __future__ import annotations

import time
from heapq import heappop, heappush
from itertools import count
from threading import Condition, Thread
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")


class DelayQueue(Generic[T]):
    """A buffer of up to `max_items` items that passes each item to `release` when it is due, on a thread of its own.

    If it is full, the items that are due first leave it early. Safe for many threads.
    """

    def __init__(self, max_items: int, release: Callable[[list[T]], None]) -> None:
        self._max_items = max_items
        self._release = release
        self._heap: list[tuple[float, int, T]] = []  # due at (monotonic seconds), number, item
        self._numbers = count()
        self._changed = Condition()
        self._is_closed = False
        self._thread = Thread(target=self._run, daemon=True, name="delay-queue")

    @property
    def is_closed(self) -> bool:
        """Return whether `close` was called."""
        return self._is_closed

    def put(self, items: list[T], delay: float) -> list[T]:
        """Add items for `delay` seconds. Return the items that must leave now: surplus ones, or all after `close`."""
        due_at = time.monotonic() + delay
        with self._changed:
            if self._is_closed:
                return items
            for item in items:
                heappush(self._heap, (due_at, next(self._numbers), item))
            surplus = [heappop(self._heap)[2] for _ in range(len(self._heap) - self._max_items)]
            if not self._thread.is_alive():
                self._thread.start()
            self._changed.notify_all()
        return surplus

    def items(self) -> list[T]:
        """Return all items without removing them."""
        with self._changed:
            return [item for _, _, item in self._heap]

    def close(self) -> list[T]:
        """Accept no more items; remove and return all items."""
        with self._changed:
            self._is_closed = True
            items = [item for _, _, item in self._heap]
            self._heap.clear()
            self._changed.notify_all()
        return items

    def _run(self) -> None:
        while True:
            with self._changed:
                if self._is_closed:
                    return
                now = time.monotonic()
                due = []
                while self._heap and self._heap[0][0] <= now:
                    due.append(heappop(self._heap)[2])
                if not due:
                    self._changed.wait(self._heap[0][0] - now if self._heap else None)
                    continue
            self._release(due)
