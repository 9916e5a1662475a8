"""The number of resources per page, from the sizes of the resources that were read before."""

from __future__ import annotations

from threading import Lock
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from worker.commercetools.queries import Query

MAX_PAGE_SIZE = 500  # resources; the maximum that commercetools allows
PAGE_BYTES = 4_000_000  # of a page whose resources are as large as the last ones; decoded, it takes five times this
_DECAY = 0.9  # per page: how fast a few large resources are forgotten


class PageSizes:
    """The page sizes of the endpoints. Safe for many threads."""

    def __init__(self) -> None:
        self._bytes: dict[str, float] = {}  # of a resource, by path
        self._lock = Lock()

    def next_size(self, query: Query) -> int:
        """Return the number of resources to request, from 1 to MAX_PAGE_SIZE."""
        expected = self._bytes.get(query.path, query.resource_bytes)
        return int(max(1, min(MAX_PAGE_SIZE, PAGE_BYTES / expected)))

    def observe(self, query: Query, size: int, resources: int) -> None:
        """Record a page of `size` bytes."""
        if resources:
            with self._lock:
                self._bytes[query.path] = max(size / resources, _DECAY * self._bytes.get(query.path, 0.0), 1.0)

    def halve(self, query: Query, resources: int) -> None:
        """Request fewer resources than `resources`, whose page was too large."""
        with self._lock:
            self._bytes[query.path] = max(2 * PAGE_BYTES / resources, self._bytes.get(query.path, 0.0))
