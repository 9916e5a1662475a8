"""A figure that costs a call, for who asks often and cannot wait."""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")

MAX_AGE = 10.0  # seconds
READ_TIMEOUT = 0.5  # seconds to wait for the call; it goes on, and who asks next has what it brings


class CachedReading(Generic[T]):
    """What `ask` returned or raised at its last call, which was not long ago. Safe for many threads."""

    def __init__(self, ask: Callable[[], T]) -> None:
        self._ask = ask
        self._pool = ThreadPoolExecutor(1)
        self._lock = Lock()
        self._asked: Future[T] | None = None
        self._asked_at = 0.0  # monotonic seconds

    def read(self) -> T:
        """Return the figure, asking for it when it is old. Raises what `ask` raises, and TimeoutError."""
        with self._lock:
            now = time.monotonic()
            if self._asked is None or (self._asked.done() and now > self._asked_at + MAX_AGE):
                self._asked, self._asked_at = self._pool.submit(self._ask), now
            asked = self._asked
        return asked.result(READ_TIMEOUT)
