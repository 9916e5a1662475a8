"""A buffer between the threads of a client and the worker's receiving thread."""

from __future__ import annotations

from collections import deque
from contextlib import suppress
from threading import Condition
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")


class Inbox(Generic[T]):
    """A thread-safe FIFO buffer that is read in batches. It has no size limit; the producers must enforce one."""

    def __init__(self) -> None:
        self._items: deque[T] = deque()
        self._arrived = Condition()

    def put(self, *items: T) -> None:
        """Add items in one step, and wake a waiting `get`."""
        with self._arrived:
            self._items.extend(items)
            self._arrived.notify()

    def get(self, max_items: int, wait: float) -> list[T]:
        """Remove and return up to `max_items` items, oldest first; [] if none arrives within `wait` seconds."""
        with self._arrived:
            self._arrived.wait_for(lambda: self._items, wait)
            return [self._items.popleft() for _ in range(min(max_items, len(self._items)))]

    def items(self) -> list[T]:
        """Return all items without removing them."""
        with self._arrived:
            return list(self._items)

    def drop(self, is_unwanted: Callable[[T], bool]) -> int:
        """Remove the items for which `is_unwanted` is true; return their number."""
        with self._arrived:
            before = len(self._items)
            self._items = deque(item for item in self._items if not is_unwanted(item))
            return before - len(self._items)

    def remove(self, item: T) -> None:
        """Remove an item if it is present."""
        with self._arrived, suppress(ValueError):
            self._items.remove(item)

    def clear(self) -> list[T]:
        """Remove and return all items."""
        with self._arrived:
            items = list(self._items)
            self._items.clear()
            return items
