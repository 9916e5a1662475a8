"""The resources in the requests that create, update and delete catalog entries, and whether an update is needed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from worker.model import Json, OperationKind
from worker.transform.catalog import catalog_id

if TYPE_CHECKING:
    from worker.model import Operation

STOCK = ("inventory_quantity", "inventory_policy")
VARIANT_KINDS = frozenset({OperationKind.UPSERT_VARIANT, OperationKind.ENSURE_VARIANT})
_CREATE_ONLY = frozenset({"external_id", "integration_type", "catalog_type"})
_REQUIRED_NUMBERS = ("price", "inventory_quantity")  # of a variant, when it is created
_EMPTY: tuple[Any, ...] = (None, "", [], {})


def attributes_of(operation: Operation) -> Json:
    """Return the attributes that an operation writes."""
    attributes: Json = (operation.resource or {}).get("attributes", {})
    return attributes


def related(operation: Operation, name: str) -> list[str]:
    """Return Klaviyo's ids of the entries to which a relationship of the operation's entry refers."""
    data = (operation.resource or {}).get("relationships", {}).get(name, {}).get("data") or []
    return [each["id"] for each in (data if isinstance(data, list) else [data])]


def has_references(operation: Operation) -> bool:
    """Return whether the operation's entry refers to other entries."""
    return any(related(operation, name) for name in ("categories", "item"))


def creation(operation: Operation) -> Json:
    """Return the resource that creates an entry. A variant needs numbers: without a price or stock they are 0."""
    resource = operation.resource or {}
    if operation.kind not in VARIANT_KINDS:
        return resource
    numbers = {name: resource["attributes"].get(name) or 0 for name in _REQUIRED_NUMBERS}
    return resource | {"attributes": resource["attributes"] | numbers}


def update(operation: Operation, stock: Json | None = None) -> Json:
    """Return the resource that updates an entry. A variant's stock is only in it if `stock` is given.

    ENSURE_VARIANT updates nothing but that stock. A variant without a price keeps the price that it has: 0 would start
    price-drop mails.
    """
    resource = operation.resource or {}
    attributes = {name: value for name, value in resource["attributes"].items() if name not in _CREATE_ONLY}
    update: Json = {"type": resource["type"], "id": catalog_id(operation.key)}
    if operation.kind not in VARIANT_KINDS:
        relationships = {"relationships": resource["relationships"]} if "relationships" in resource else {}
        return update | {"attributes": attributes} | relationships
    # Klaviyo accepts no relationships in the update of a variant.
    is_complete = operation.kind is OperationKind.UPSERT_VARIANT
    kept = {name: value for name, value in attributes.items() if is_complete and name not in STOCK}
    if kept.get("price", 0) is None:
        del kept["price"]
    return update | {"attributes": kept | (stock or {})}


def stock_update(operation: Operation, stock: Json) -> Json:
    """Return the resource that updates only the stock of a variant."""
    return {"type": "catalog-variant", "id": catalog_id(operation.key), "attributes": stock}


def stock_of(operation: Operation) -> Json:
    """Return the stock that an operation writes. A quantity that is not tracked is left as it is."""
    attributes = attributes_of(operation)
    return {name: attributes[name] for name in STOCK if attributes.get(name) is not None}


def differs(resource: Json, present: Json) -> bool:
    """Return whether an update with a resource would change an entry with the attributes `present`."""
    return any(not _is_same(value, present.get(name)) for name, value in resource["attributes"].items())


def _is_same(value: Any, present: Any) -> bool:
    return bool(value == present) or (value in _EMPTY and present in _EMPTY)
