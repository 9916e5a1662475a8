"""Where a client's threads leave what arrived, until the worker takes it."""

from __future__ import annotations

from collections import deque
from contextlib import suppress
from threading import Condition
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")


class Inbox(Generic[T]):
    """A queue between threads that is taken from in batches. Its bound is the business of who puts."""

    def __init__(self) -> None:
        self._waiting: deque[T] = deque()
        self._arrived = Condition()

    def put(self, *items: T) -> None:
        """Add items, all at once, and wake who waits."""
        with self._arrived:
            self._waiting.extend(items)
            self._arrived.notify()

    def take(self, at_most: int, wait: float) -> list[T]:
        """Remove up to `at_most` items, oldest first, waiting `wait` seconds for the first; [] when none came."""
        with self._arrived:
            self._arrived.wait_for(lambda: self._waiting, wait)
            return [self._waiting.popleft() for _ in range(min(at_most, len(self._waiting)))]

    def waiting(self) -> list[T]:
        """Return what is here, and leave it."""
        with self._arrived:
            return list(self._waiting)

    def drop(self, is_unwanted: Callable[[T], bool]) -> int:
        """Remove some items and return how many."""
        with self._arrived:
            before = len(self._waiting)
            self._waiting = deque(item for item in self._waiting if not is_unwanted(item))
            return before - len(self._waiting)

    def remove(self, item: T) -> None:
        """Remove an item, if it is still here."""
        with self._arrived, suppress(ValueError):
            self._waiting.remove(item)

    def clear(self) -> list[T]:
        """Remove and return what is here."""
        with self._arrived:
            left = list(self._waiting)
            self._waiting.clear()
            return left
