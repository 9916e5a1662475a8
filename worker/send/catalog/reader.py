"""Reads what Klaviyo's catalog has: 100 entries per request, items with their variants."""

from __future__ import annotations

from dataclasses import dataclass, field
from http import HTTPStatus
from typing import TYPE_CHECKING
from urllib.parse import quote

import orjson

from adapters.shared.chunks import chunked
from worker.errors import Rejected, RequestBlocked, ResponseTooLarge, WorkerError
from worker.json_access import as_dict, as_dicts, as_key
from worker.klaviyo.client import iter_pages, iter_resources
from worker.send.requests import entry_path
from worker.transform.catalog import catalog_id, external_id

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping
    from concurrent.futures import Executor

    from worker.klaviyo.client import KlaviyoClient
    from worker.model import Json

MAX_ENTRIES = 100  # per page: https://developers.klaviyo.com/en/reference/get_catalog_items
MAX_FILTER_BYTES = 7_000  # percent-encoded; proxies accept URIs of up to 8 KB
ITEMS, VARIANTS, CATEGORIES = "catalog-items", "catalog-variants", "catalog-categories"
_QUERY = {  # what is read of an entry
    ITEMS: "include=variants",
    VARIANTS: "fields%5Bcatalog-variant%5D=inventory_quantity,inventory_policy",  # for stock alone
    CATEGORIES: "fields%5Bcatalog-category%5D=name",
}


@dataclass(frozen=True, slots=True)
class Entry:
    """A catalog entry in Klaviyo: its attributes; for an item also its variants' attributes by external id."""

    attributes: Json = field(repr=False)
    variants: dict[str, Json] = field(default_factory=dict, repr=False)


Found = dict[str, "Entry | WorkerError | None"]  # by external id; None: Klaviyo has no such entry


class CatalogReader:
    """A reader of Klaviyo's catalog. It caches nothing. Safe for many threads."""

    def __init__(self, client: KlaviyoClient, executor: Executor) -> None:
        self._client = client
        self._executor = executor

    def read(self, wanted: Mapping[str, Collection[str]]) -> dict[str, Found]:
        """Return the entries with the wanted external ids, by collection. The requests are concurrent."""
        chunks = [(name, chunk) for name, keys in wanted.items() for chunk in _chunks(keys)]
        parts = map(self._read_chunk, chunks) if len(chunks) == 1 else self._executor.map(self._read_chunk, chunks)
        found: dict[str, Found] = {name: {} for name in wanted}
        for (name, _), part in zip(chunks, parts, strict=True):
            found[name] |= part
        return found

    def categories_of(self, item: str) -> set[str]:
        """Return Klaviyo's ids of the categories of an item. A list of items does not show them. Raises WorkerError."""
        path = f"{entry_path(ITEMS, item)}/categories?fields%5Bcatalog-category%5D=name"
        return {as_key(category.get("id")) for category in iter_resources(self._client, path)}

    def items_in(self, category: str, items: Iterable[str]) -> set[str]:
        """Return those of the items that are in a category. Raises WorkerError."""
        path = f"{entry_path(CATEGORIES, category)}/items?fields%5Bcatalog-item%5D=external_id"
        pages = (iter_resources(self._client, f"{path}&{_filter(chunk)}") for chunk in _chunks(items))
        return {external_id(as_key(item.get("id"))) for page in pages for item in page}

    def has_variant(self, item: str, sku: str) -> bool:
        """Return whether a variant belongs to an item. Raises WorkerError."""
        path = f"{entry_path(ITEMS, item)}/variants?{_filter([sku])}&{_QUERY[VARIANTS]}"
        return any(variant.get("id") == catalog_id(sku) for variant in iter_resources(self._client, path))

    def _read_chunk(self, chunk: tuple[str, list[str]]) -> Found:
        """Read entries with one filter. If it is rejected, blocked or too large, halve it to isolate the entry."""
        collection, keys = chunk
        try:
            found = self._list(collection, keys)
        except (Rejected, RequestBlocked, ResponseTooLarge):
            if len(keys) == 1:
                return {keys[0]: self._read_alone(collection, keys[0])}
            middle = len(keys) // 2
            first = self._read_chunk((collection, keys[:middle]))
            return first | self._read_chunk((collection, keys[middle:]))
        except WorkerError as error:
            return dict.fromkeys(keys, error)
        return {key: found.get(key) for key in keys}

    def _list(self, collection: str, keys: list[str]) -> Found:
        found: Found = {}
        for page in iter_pages(self._client, f"/api/{collection}?{_filter(keys)}&{_QUERY[collection]}"):
            included = _by_id(as_dicts(page.get("included")))
            for resource in as_dicts(page.get("data")):
                key = external_id(as_key(resource.get("id")))
                try:
                    found[key] = self._entry(collection, resource, included)
                except WorkerError as error:
                    found[key] = None if is_missing(error) else error
        return found

    def _read_alone(self, collection: str, key: str) -> Entry | WorkerError | None:
        """Read an entry by its path, because Klaviyo or a firewall does not accept its id in a filter."""
        try:
            document = self._client.call("GET", f"{entry_path(collection, key)}?{_QUERY[collection]}")
            included = _by_id(as_dicts(document.get("included")))
            return self._entry(collection, as_dict(document.get("data")), included)
        except WorkerError as error:
            return None if is_missing(error) else error

    def _entry(self, collection: str, resource: Json, included: Mapping[str, Json]) -> Entry:
        """Return an entry. List the variants of an item if those in the response are possibly not all of them.

        Raises WorkerError.
        """
        attributes = as_dict(resource.get("attributes"))
        if collection != ITEMS:
            return Entry(attributes)
        related = as_dict(as_dict(resource.get("relationships")).get("variants")).get("data")
        ids = [as_key(each.get("id")) for each in as_dicts(related)]
        # Klaviyo documents no limit for included variants, but lists at most 100 of them per page.
        is_complete = isinstance(related, list) and len(ids) < MAX_ENTRIES and all(each in included for each in ids)
        if not is_complete:
            path = f"{entry_path(ITEMS, external_id(as_key(resource.get('id'))))}/variants"
            included = _by_id(iter_resources(self._client, path))
            ids = list(included)
        return Entry(attributes, {external_id(each): included[each] for each in ids})


def is_missing(error: WorkerError) -> bool:
    """Return whether Klaviyo answered that it does not have the entry."""
    return isinstance(error, Rejected) and error.status == HTTPStatus.NOT_FOUND


def _by_id(resources: Iterable[Json]) -> dict[str, Json]:
    return {as_key(each.get("id")): as_dict(each.get("attributes")) for each in resources}


def _chunks(keys: Iterable[str]) -> Iterable[list[str]]:
    """Split external ids so that each filter is short enough for a URI."""
    return chunked(sorted(keys), lambda key: len(_literal(key)) + 1, MAX_FILTER_BYTES, MAX_ENTRIES)


def _filter(keys: Iterable[str]) -> str:
    return f"filter=any(ids,%5B{','.join(map(_literal, keys))}%5D)"


def _literal(key: str) -> str:
    return quote(orjson.dumps(catalog_id(key)), safe="$:")
