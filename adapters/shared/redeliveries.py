"""The messages that this worker nacked and that were not redelivered yet: the backlog of a queue that cannot count."""

from __future__ import annotations

from threading import Lock
from typing import TYPE_CHECKING

from cachetools import TTLCache

if TYPE_CHECKING:
    from collections.abc import Iterable

MAX_IDS = 100_000
EXPECTED_SECONDS = 1800.0  # seconds after a nack during which a redelivery is expected


class ExpectedRedeliveries:
    """Ids of messages that the queue should redeliver. Safe for many threads."""

    def __init__(self) -> None:
        self._ids: TTLCache[str, None] = TTLCache(MAX_IDS, EXPECTED_SECONDS)
        self._lock = Lock()

    def __len__(self) -> int:
        with self._lock:
            return len(self._ids)

    def add(self, ids: Iterable[str]) -> None:
        """Add messages that were nacked."""
        with self._lock:
            self._ids.update(dict.fromkeys(ids))

    def remove(self, ids: Iterable[str]) -> None:
        """Remove messages that were received or acked.

        An acked message can be included: an earlier delivery that lost its lease can be nacked after the redelivery.
        """
        with self._lock:
            for name in ids:
                self._ids.pop(name, None)
