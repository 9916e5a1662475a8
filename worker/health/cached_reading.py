"""A cached reading of an expensive value, for frequent callers that must not block."""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")

MAX_AGE = 10.0  # seconds after which the value is read again
READ_TIMEOUT = 0.5  # seconds to wait for a call; the call continues, and a later `read` returns its result


class CachedReading(Generic[T]):
    """The result of the last call of a function, at most MAX_AGE old. Thread-safe; calls never overlap."""

    def __init__(self, function: Callable[[], T]) -> None:
        self._function = function
        self._pool = ThreadPoolExecutor(1)
        self._lock = Lock()
        self._call: Future[T] | None = None
        self._called_at = 0.0  # monotonic seconds

    def read(self) -> T:
        """Return the value. Call the function if the value is too old. Raises its errors, and TimeoutError."""
        with self._lock:
            now = time.monotonic()
            if self._call is None or (self._call.done() and now > self._called_at + MAX_AGE):
                self._call = self._pool.submit(self._function)
                self._called_at = now
            call = self._call
        return call.result(READ_TIMEOUT)
