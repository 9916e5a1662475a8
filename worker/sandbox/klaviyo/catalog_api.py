"""The endpoints of the Klaviyo emulator for single catalog entries and for lists of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from worker.sandbox.klaviyo.catalog import PREFIX
from worker.sandbox.klaviyo.requests import (
    MAX_PAGE,
    check_parameters,
    not_found,
    paginate,
    parse_body,
    parse_filter,
    selected_fields,
)
from worker.sandbox.klaviyo.rules import invalid_input, require_resource

if TYPE_CHECKING:
    from collections.abc import Mapping

    from worker.sandbox.http import ApiRequest, Json
    from worker.sandbox.klaviyo.account import Account

KINDS = {
    "catalog-items": "catalog-item",
    "catalog-variants": "catalog-variant",
    "catalog-categories": "catalog-category",
}
_FILTERS: dict[str, dict[str, tuple[str, ...]]] = {  # kind -> field -> operators
    "catalog-item": {"ids": ("any",), "category.id": ("equals",), "title": ("contains",)},
    "catalog-variant": {"ids": ("any",), "item.id": ("equals",), "sku": ("equals",), "title": ("contains",)},
    "catalog-category": {"ids": ("any",), "item.id": ("equals",), "name": ("contains",)},
}
_RELATED = {  # kind of an entry, name of its list of others -> kind of these
    ("catalog-item", "variants"): "catalog-variant",
    ("catalog-item", "categories"): "catalog-category",
    ("catalog-category", "items"): "catalog-item",
}
_LIST_PARAMETERS = {"filter", "sort", "page[cursor]", "page[size]"}


class CatalogApi:
    """The endpoints of catalog items, variants and categories."""

    def __init__(self, account: Account) -> None:
        self._account = account

    def handle(self, request: ApiRequest, collection: str, rest: list[str]) -> tuple[int, Any]:
        """Return the status and the document of the response. `rest` is the path after the collection."""
        kind = KINDS[collection]
        account = self._account
        match (request.method, *rest):
            case ("POST",):
                entry = account.create_entry(kind, require_resource(parse_body(request), kind))
                return 201, {"data": _resource(entry)}
            case ("GET",):
                return 200, self._list(request, kind)
            case ("GET", entry_id):
                return 200, self._with_included(request, kind, {"data": _resource(account.entry(kind, entry_id))})
            case ("PATCH", entry_id):
                entry = account.update_entry(kind, entry_id, require_resource(parse_body(request), kind))
                return 200, {"data": _resource(entry)}
            case ("DELETE", entry_id):
                account.delete_entry(kind, entry_id)
                return 204, None
            case ("GET", entry_id, name) if (kind, name) in _RELATED:
                return 200, self._list(request, _RELATED[kind, name], self._related(kind, entry_id, name))
            case ("GET", entry_id, "relationships", name) if (kind, name) in _RELATED:
                page = self._list(request, _RELATED[kind, name], self._related(kind, entry_id, name))
                return 200, page | {"data": [{"type": each["type"], "id": each["id"]} for each in page["data"]]}
        raise not_found()

    def _related(self, kind: str, entry_id: str, name: str) -> list[Json]:
        """Return the variants or categories of an item, or the items of a category. Raises ApiError."""
        account = self._account
        entry = account.entry(kind, entry_id)
        if name == "variants":
            return account.variants_of(entry_id)
        if name == "categories":
            return account.entries("catalog-category", entry.get("categories", []))
        return [item for item in account.entries("catalog-item") if entry_id in item.get("categories", [])]

    def _list(self, request: ApiRequest, kind: str, related: list[Json] | None = None) -> Json:
        """Return a page of those related entries, or entries of this kind, that the filter selects. Raises ApiError."""
        includes = {"include"} if kind == "catalog-item" else set()
        check_parameters(request, _LIST_PARAMETERS | includes)
        name, values = parse_filter(request, _FILTERS[kind])
        entries = self._account.entries(kind, values if name == "ids" else None)
        if related is not None:
            members = {each["id"] for each in related}
            entries = [entry for entry in entries if entry["id"] in members]
        if name != "ids" and values:
            entries = [entry for entry in entries if self._matches(entry, name, values[0])]
        return self._with_included(request, kind, paginate(entries, request, MAX_PAGE, _resource))

    def _matches(self, entry: Json, name: str, value: str) -> bool:
        match name:
            case "category.id":
                return value in entry.get("categories", [])
            case "item.id":
                item = self._account.items.get(value.removeprefix(PREFIX), {})
                return entry.get("item") == value or entry["id"] in item.get("categories", [])
            case "sku":
                return bool(entry["attributes"].get("sku") == value)
            case _:
                return value in (entry["attributes"].get(name) or "")

    def _with_included(self, request: ApiRequest, kind: str, document: Json) -> Json:
        """Return the document with the selected fields, and with the variants of its items if they are asked for."""
        include = request.query.get("include", [""])[0]
        if include and (kind, include) != ("catalog-item", "variants"):
            raise invalid_input(f"'{include}' is not a valid include for the resource '{kind}'.", "")
        data = document["data"]
        resources = data if isinstance(data, list) else [data]
        shown = [selected_fields(request, kind, resource) for resource in resources]
        result = document | {"data": shown if isinstance(data, list) else shown[0]}
        if include:
            variants = {each["id"]: self._account.variants_of(each["id"]) for each in shown}
            result["data"] = [_with_variants(each, variants[each["id"]]) for each in shown]
            result["data"] = result["data"] if isinstance(data, list) else result["data"][0]
            included = [_resource(variant) for found in variants.values() for variant in found]
            result["included"] = [selected_fields(request, "catalog-variant", each) for each in included]
        return result


def _resource(entry: Mapping[str, Any]) -> Json:
    """Return a catalog entry in the format of the API. It names no related entries."""
    return {"type": entry["type"], "id": entry["id"], "attributes": entry["attributes"], "links": {"self": entry["id"]}}


def _with_variants(item: Json, variants: list[Json]) -> Json:
    data = [{"type": "catalog-variant", "id": variant["id"]} for variant in variants]
    return item | {"relationships": {"variants": {"data": data}}}
