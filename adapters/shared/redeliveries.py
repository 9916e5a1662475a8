"""What a worker sent back to its queue and expects again, for queues that do not tell, or not exactly."""

from __future__ import annotations

from threading import Lock
from typing import TYPE_CHECKING

from cachetools import TTLCache

if TYPE_CHECKING:
    from collections.abc import Iterable

_MOST, _SECONDS = 100_000, 1800.0  # messages, and how long they are expected


class Awaited:
    """Ids of messages that are to come again. Safe for many threads."""

    def __init__(self) -> None:
        self._ids: TTLCache[str, None] = TTLCache(_MOST, _SECONDS)
        self._lock = Lock()

    def __len__(self) -> int:
        with self._lock:
            return len(self._ids)

    def note(self, ids: Iterable[str]) -> None:
        """Note messages that were sent back."""
        with self._lock:
            self._ids.update(dict.fromkeys(ids))

    def came(self, ids: Iterable[str]) -> None:
        """Forget messages that came, or are done: a lease that was lost may be given back after that."""
        with self._lock:
            for name in ids:
                self._ids.pop(name, None)
