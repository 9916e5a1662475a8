"""Catalog data kept for a while, and read by one thread at a time for all that ask."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import replace
from threading import Lock
from typing import TYPE_CHECKING

import cachetools

from worker.commercetools import queries
from worker.errors import WorkerError

if TYPE_CHECKING:
    from collections.abc import Collection

    from worker.model import Json

MAX_ENTRIES = 20_000
_REMEMBERED = (queries.PRODUCT_CATEGORIES, queries.CATEGORY_NAMES, queries.DISCOUNT_CODES)
_REMEMBERED_AS = {query: kept for kept in _REMEMBERED for query in (kept, replace(kept, cached_fields=()))}

Key = tuple[queries.Query, str]


class CachedReader:
    """A Reader that remembers, for `ttl` seconds, what queries say may be remembered. Safe for many threads.

    What several threads miss at the same moment is read once (single-flight).
    """

    def __init__(self, reader: queries.Reader, ttl: float) -> None:
        self._reader = reader
        self._known: cachetools.TTLCache[Key, Json] = cachetools.TTLCache(MAX_ENTRIES, ttl)
        self._under_way: dict[Key, Future[queries.QueryResult]] = {}
        self._lock = Lock()

    def find(self, query: queries.Query, values: Collection[str]) -> queries.QueryResult:
        """Find, from memory where that is allowed; a fresh reading of the same resources renews it."""
        if not query.cached_fields:
            return self._read(query, values)
        with self._lock:
            known = {value: self._known.get((query, value)) for value in values}
            missing = [value for value, resource in known.items() if resource is None]
            others = {value: self._under_way[query, value] for value in missing if (query, value) in self._under_way}
            mine = [value for value in missing if value not in others]
            reading: Future[queries.QueryResult] = Future()
            self._under_way |= {(query, value): reading for value in mine}
        found: queries.QueryResult = {value: [resource] for value, resource in known.items() if resource is not None}
        if mine:
            found |= self._lead(query, mine, reading)
        for value, other in others.items():
            found[value] = other.result()[value]
        return found

    def _lead(
        self, query: queries.Query, values: list[str], reading: Future[queries.QueryResult]
    ) -> queries.QueryResult:
        """Read for this thread and those that wait for the same."""
        try:
            found = self._read(query, values)
            reading.set_result(found)
        except BaseException as defect:
            reading.set_exception(defect)
            raise
        finally:
            with self._lock:
                for value in values:
                    del self._under_way[query, value]
        return found

    def _read(self, query: queries.Query, values: Collection[str]) -> queries.QueryResult:
        found = self._reader.find(query, values)
        kept = _REMEMBERED_AS.get(query)
        if kept is not None:
            resources = {value: each[0] for value, each in found.items() if not isinstance(each, WorkerError) and each}
            with self._lock:
                for value, resource in resources.items():
                    self._known[kept, value] = {name: resource.get(name) for name in kept.cached_fields}
        return found
