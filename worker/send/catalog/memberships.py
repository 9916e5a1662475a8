"""Verifies that items are in the categories that they were last written with.

No list of items shows their categories. The metadata of an item has a hash of those that it was last written with, so
the comparison of the attributes shows what commercetools has changed. Other clients can change the categories, too: if
one deletes a category, its items lose it. When the category exists again, only Klaviyo's answer shows that.
"""

from __future__ import annotations

from collections import defaultdict
from threading import Lock
from typing import TYPE_CHECKING

import cachetools

from worker.errors import WorkerError
from worker.send.bodies import related
from worker.transform.catalog import external_id

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from concurrent.futures import Executor

    from worker.model import Operation
    from worker.send.catalog.reader import CatalogReader

_CACHE_SIZE, _CACHE_SECONDS = 50_000, 600.0


class Memberships:
    """Klaviyo's categories of items. Safe for many threads.

    It remembers for a while which categories have all the items that it asked them for: they were not deleted.
    """

    def __init__(self, reader: CatalogReader, executor: Executor) -> None:
        self._reader = reader
        self._executor = executor
        self._intact: cachetools.TTLCache[str, bool] = cachetools.TTLCache(_CACHE_SIZE, _CACHE_SECONDS)
        self._lock = Lock()

    def forget(self, category: str) -> None:
        """Forget a category that was written: it was possibly missing."""
        with self._lock:
            self._intact.pop(category, None)

    def doubtful(self, operations: Sequence[Operation]) -> list[Operation]:
        """Return the operations on items whose categories must be read one item at a time.

        These are all whose categories are not known, or those that a category lacks. Of the two ways to find out, it
        takes that with fewer requests.
        """
        items_of: dict[str, list[str]] = defaultdict(list)
        with self._lock:
            for operation in operations:
                for category in map(external_id, related(operation, "categories")):
                    if category not in self._intact:
                        items_of[category].append(operation.key)
        unknown = {item for items in items_of.values() for item in items}
        if len(items_of) < len(unknown):
            lacking = self._executor.map(self._lacking, items_of, items_of.values())
            unknown = {item for items in lacking for item in items}
        return [operation for operation in operations if operation.key in unknown]

    def _lacking(self, category: str, items: Sequence[str]) -> Iterable[str]:
        """Return the items that a category does not have in Klaviyo; all if it cannot be asked."""
        try:
            lacking = set(items) - self._reader.items_in(category, items)
        except WorkerError:  # reading an item raises the error that concerns it
            return items
        if not lacking:
            with self._lock:
                self._intact[category] = True
        return lacking
