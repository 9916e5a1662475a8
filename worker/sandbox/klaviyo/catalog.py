"""The custom catalog of a Klaviyo account: items, variants and categories."""

from __future__ import annotations

from collections import defaultdict
from threading import RLock
from typing import TYPE_CHECKING

from worker.sandbox.klaviyo.rules import REQUIRED, ApiError, check_catalog, invalid_input, reference_ids

if TYPE_CHECKING:
    from collections.abc import Sequence

    from worker.sandbox.http import Json

PREFIX = "$custom:::$default:::"

_KINDS = {"categories": "catalog-category", "items": "catalog-item", "variants": "catalog-variant"}


class Catalog:
    """Items, variants and categories by external id. Safe for many threads."""

    def __init__(self) -> None:
        self.items: dict[str, Json] = {}
        self.variants: dict[str, Json] = {}
        self.categories: dict[str, Json] = {}
        self.lock = RLock()
        self._by_item: dict[str, dict[str, Json]] = defaultdict(dict)  # item id -> variants by id

    def load(self, content: Json) -> None:
        """Add categories, items and variants (`item`: whose variant) by attributes, as another client wrote them.

        An attribute that Klaviyo requires and that is missing is the external id, a zero or an empty text.
        """
        for name, kind in _KINDS.items():
            for attributes in content.get(name, []):
                self.create_entry(kind, _creation(kind, attributes))

    def create_entry(self, kind: str, data: Json) -> Json:
        """Create a catalog entry. Raises ApiError if it is invalid, exists, or has an unknown item or category."""
        attributes = data["attributes"]
        check_catalog(kind, attributes, create=True)
        external_id = attributes["external_id"]
        with self.lock:
            entries = self._entries_by_id(kind)
            if external_id in entries:
                raise ApiError(409, "duplicate_resource", f"{_describe(kind, external_id)} already exists.")
            entry: Json = {"type": kind, "id": PREFIX + external_id, "attributes": dict(attributes)}
            entry |= self._relationships(kind, data, create=True)
            entries[external_id] = entry
            if kind == "catalog-variant":
                self._by_item[entry["item"]][entry["id"]] = entry
            return entry

    def update_entry(self, kind: str, entry_id: str, data: Json) -> Json:
        """Update some attributes of a catalog entry. Raises ApiError."""
        check_catalog(kind, data["attributes"], create=False)
        if data.get("id") != entry_id:
            raise invalid_input("'id' must match the path.", "/data/id")
        with self.lock:
            entry = self.entry(kind, entry_id)
            entry |= self._relationships(kind, data, create=False)
            entry["attributes"] |= data["attributes"]
            return entry

    def delete_entry(self, kind: str, entry_id: str) -> None:
        """Delete a catalog entry, and an item's variants with it. Raises ApiError if there is none."""
        with self.lock:
            entry = self.entry(kind, entry_id)
            del self._entries_by_id(kind)[entry_id.removeprefix(PREFIX)]
            if kind == "catalog-variant":
                del self._by_item[entry["item"]][entry_id]
            elif kind == "catalog-item":
                for variant in self._by_item.pop(entry_id, {}).values():
                    del self.variants[variant["attributes"]["external_id"]]
            elif kind == "catalog-category":
                for item in self.items.values():
                    item["categories"] = [each for each in item.get("categories", []) if each != entry_id]

    def entry(self, kind: str, entry_id: str) -> Json:
        """Return a catalog entry. Raises ApiError if there is none."""
        external_id = entry_id.removeprefix(PREFIX)
        found = self._entries_by_id(kind).get(external_id) if entry_id.startswith(PREFIX) else None
        if found is None:
            raise ApiError(404, "not_found", f"{_describe(kind, external_id)} does not exist.")
        return found

    def entries(self, kind: str, ids: Sequence[str] | None = None) -> list[Json]:
        """Return the catalog entries of a kind with these ids, or all of them."""
        with self.lock:
            entries = self._entries_by_id(kind)
            if ids is None:
                return list(entries.values())
            wanted = dict.fromkeys(each.removeprefix(PREFIX) for each in ids if each.startswith(PREFIX))
            return [entries[external_id] for external_id in wanted if external_id in entries]

    def variants_of(self, item_id: str) -> list[Json]:
        """Return an item's variants, or none if there is no such item."""
        with self.lock:
            return list(self._by_item.get(item_id, {}).values())

    def _entries_by_id(self, kind: str) -> dict[str, Json]:
        """Return the entries of a kind by external id."""
        return {"catalog-item": self.items, "catalog-variant": self.variants, "catalog-category": self.categories}[kind]

    def _relationships(self, kind: str, data: Json, *, create: bool) -> Json:
        relationships = data.get("relationships") or {}
        known = {"catalog-item": {"categories"}, "catalog-variant": {"item"} if create else set()}.get(kind, set())
        for name in relationships.keys() - known:
            raise invalid_input(
                f"'{name}' is not a valid field for the resource '{kind}'.", f"/data/relationships/{name}"
            )
        pointer = "/data/relationships"
        if kind == "catalog-variant" and create:
            (item,) = reference_ids(relationships.get("item"), "catalog-item", f"{pointer}/item", many=False)
            self.entry("catalog-item", item)
            return {"item": item}
        if "categories" in relationships:
            found = reference_ids(relationships["categories"], "catalog-category", f"{pointer}/categories")
            for category in found:
                self.entry("catalog-category", category)
            return {"categories": found}
        return {}


def _creation(kind: str, attributes: Json) -> Json:
    """Return the request that creates an entry with these attributes."""
    external_id = attributes["external_id"]
    defaults = {"title": external_id, "name": external_id, "sku": external_id, "url": "None", "description": ""}
    defaults |= {"price": 0.0, "inventory_quantity": 0.0}
    related: Json = {}
    if "item" in attributes:
        related["item"] = {"data": {"type": "catalog-item", "id": PREFIX + attributes["item"]}}
    if "categories" in attributes:
        ids = [PREFIX + each for each in attributes["categories"]]
        related["categories"] = {"data": [{"type": "catalog-category", "id": each} for each in ids]}
    required = {name: defaults[name] for name in REQUIRED[kind] if name in defaults}
    own = {name: value for name, value in attributes.items() if name not in related}
    return {"type": kind, "attributes": required | own, "relationships": related}


def _describe(kind: str, external_id: str) -> str:
    name = kind.removeprefix("catalog-")
    return f"{'An' if name == 'item' else 'A'} {name} with the external id `{external_id}`"
