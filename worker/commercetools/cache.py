"""A cache for catalog data, discount codes and email addresses of commercetools."""

from __future__ import annotations

from concurrent.futures import Future
from threading import Lock
from typing import TYPE_CHECKING

import cachetools

from worker.commercetools import queries
from worker.json_access import as_dicts

if TYPE_CHECKING:
    from collections.abc import Collection

    from worker.model import Json

MAX_ENTRIES = 20_000
_CACHED = (
    queries.LINE_PRODUCTS,
    queries.CATEGORY_NAMES,
    queries.DISCOUNT_CODES,
    queries.WORKFLOW_STATES,
    queries.CUSTOMER_EMAILS,
)
# query -> the cached query that its results update. A query for whole resources updates the cached one, too.
_CACHED_BY_QUERY = {cached: cached for cached in _CACHED} | {
    queries.PRODUCTS: queries.LINE_PRODUCTS,
    queries.CATEGORIES: queries.CATEGORY_NAMES,
    queries.CUSTOMERS: queries.CUSTOMER_EMAILS,
}

Key = tuple[queries.Query, str]


class CachedReader:
    """A Reader that caches the `cached_fields` of resources for `ttl` seconds. Safe for many threads.

    Of the attributes of a product, only those with one of the `attribute_names` are cached, as they can be large texts.
    If several threads miss the same value, one of them reads it and the others wait for its result.
    """

    def __init__(self, reader: queries.Reader, ttl: float, attribute_names: Collection[str] = ()) -> None:
        self._reader = reader
        self._attribute_names = attribute_names
        self._cache: cachetools.TTLCache[Key, Json] = cachetools.TTLCache(MAX_ENTRIES, ttl)
        self._pending: dict[Key, Future[queries.QueryResult]] = {}
        self._lock = Lock()

    def find(self, query: queries.Query, values: Collection[str]) -> queries.QueryResult:
        """Find the resources. Use the cache if the query has `cached_fields`."""
        if not query.cached_fields:
            return self._read(query, values)
        with self._lock:
            cached = {value: self._cache.get((query, value)) for value in values}
            missing = [value for value, resource in cached.items() if resource is None]
            pending = {value: self._pending[query, value] for value in missing if (query, value) in self._pending}
            to_read = [value for value in missing if value not in pending]
            future: Future[queries.QueryResult] = Future()
            self._pending |= {(query, value): future for value in to_read}
        result: queries.QueryResult = {value: [resource] for value, resource in cached.items() if resource is not None}
        if to_read:
            result |= self._read_for_all(query, to_read, future)
        for value, other in pending.items():
            result[value] = other.result()[value]
        return result

    def _read_for_all(
        self, query: queries.Query, values: list[str], future: Future[queries.QueryResult]
    ) -> queries.QueryResult:
        """Read the resources for this thread and for the threads that wait for `future`."""
        try:
            result = self._read(query, values)
            future.set_result(result)
        except BaseException as error:
            future.set_exception(error)
            raise
        finally:
            with self._lock:
                for value in values:
                    del self._pending[query, value]
        return result

    def _read(self, query: queries.Query, values: Collection[str]) -> queries.QueryResult:
        """Read the resources and update the cache."""
        result = self._reader.find(query, values)
        cached = _CACHED_BY_QUERY.get(query)
        if cached is not None:
            found = {value: found[0] for value, found in result.items() if isinstance(found, list) and found}
            parts = {value: self._cached_part(resource, cached) for value, resource in found.items()}
            with self._lock:
                for value, part in parts.items():
                    self._cache[cached, value] = part
        return result

    def _cached_part(self, resource: Json, query: queries.Query) -> Json:
        part = {name: resource.get(name) for name in query.cached_fields}
        if "attributes" in part:
            attributes = as_dicts(part["attributes"])
            part["attributes"] = [each for each in attributes if each.get("name") in self._attribute_names]
        return part
