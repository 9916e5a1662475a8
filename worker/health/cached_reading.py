"""A cache for a value that is expensive to read. Callers can read it often and do not block for long."""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")

MAX_AGE = 10.0  # seconds after which the function is called again
READ_TIMEOUT = 0.5  # seconds that `read` waits for the function; if it takes longer, a later `read` returns its result


class CachedReading(Generic[T]):
    """The result of a function, which is called again after MAX_AGE. Thread-safe. Calls never overlap."""

    def __init__(self, function: Callable[[], T]) -> None:
        self._function = function
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="klaviyo-reading")
        self._lock = Lock()
        self._call: Future[T] | None = None
        self._called_at = 0.0  # monotonic seconds

    def read(self) -> T:
        """Return the value. Raises the error of the function, or TimeoutError."""
        with self._lock:
            now = time.monotonic()
            if self._call is None or (self._call.done() and now > self._called_at + MAX_AGE):
                self._call = self._pool.submit(self._function)
                self._called_at = now
            call = self._call
        return call.result(READ_TIMEOUT)
