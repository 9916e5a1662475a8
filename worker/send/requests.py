"""The requests for operations: their paths and bodies."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import quote

from worker.model import Json, Operation, OperationKind
from worker.transform.catalog import catalog_id
from worker.transform.profiles import without_clears

COLLECTION = {
    OperationKind.UPSERT_CATEGORY: "catalog-categories",
    OperationKind.ENSURE_CATEGORY: "catalog-categories",
    OperationKind.DELETE_CATEGORY: "catalog-categories",
    OperationKind.UPSERT_ITEM: "catalog-items",
    OperationKind.DELETE_ITEM: "catalog-items",
    OperationKind.DELETE_STALE_VARIANTS: "catalog-items",
    OperationKind.UPSERT_VARIANT: "catalog-variants",
    OperationKind.UPDATE_INVENTORY: "catalog-variants",
    OperationKind.DELETE_VARIANT: "catalog-variants",
}
_REFERENCES = {"categories": "catalog-categories", "item": "catalog-items"}  # relationship -> collection
_CREATE_ONLY = frozenset({"external_id", "integration_type", "catalog_type"})
_NUMBERS = frozenset({"price", "inventory_quantity"})  # of a variant: None is 0 if it is created, else left as it is


@dataclass(frozen=True, slots=True)
class Request:
    """An HTTP request to Klaviyo."""

    method: str
    path: str
    body: Json | None = None


def request_for(operation: Operation) -> Request:
    """Return a request that represents an operation in the output of commands.

    It usually is the first request that the operation sends.
    """
    match operation.kind:
        case OperationKind.CREATE_EVENT:
            return Request("POST", "/api/events", {"data": operation.resource})
        case OperationKind.UPSERT_PROFILE | OperationKind.UPSERT_GUEST:
            return Request("POST", "/api/profile-import", {"data": _profile(operation)})
        case OperationKind.DELETE_PROFILE:
            return deletion_request(f"the profile with external_id {operation.key}")
        case OperationKind.DELETE_STALE_VARIANTS:
            return Request("GET", entry_path(operation) + "/variants", {"keep": sorted(operation.keep_skus)})
        case OperationKind.DELETE_ITEM | OperationKind.DELETE_CATEGORY | OperationKind.DELETE_VARIANT:
            return Request("DELETE", entry_path(operation))
        case OperationKind.UPDATE_INVENTORY:
            return Request("PATCH", entry_path(operation), {"data": operation.resource})
        case _:
            return Request("POST", f"/api/{COLLECTION[operation.kind]}", {"data": create_body(operation)})


def _profile(operation: Operation) -> Json:
    """Return the profile with its consents, which are written last."""
    resource = operation.resource or {"attributes": {}}
    agreed = {consent.property: consent.value for consent in operation.consents}
    if agreed:
        attributes = resource["attributes"]
        resource = resource | {"attributes": attributes | {"properties": attributes.get("properties", {}) | agreed}}
    return without_clears(resource)


def entry_path(operation: Operation) -> str:
    """Return the path of the catalog entry that an operation writes."""
    return _path(COLLECTION[operation.kind], catalog_id(operation.key))


def _path(collection: str, entry_id: str) -> str:
    return f"/api/{collection}/{quote(entry_id, safe='$:')}"


def reference_paths(operation: Operation) -> list[str]:
    """Return the paths of the catalog entries to which the operation's entry refers: its categories or its item."""
    paths = []
    for name, relationship in (operation.resource or {}).get("relationships", {}).items():
        found = relationship["data"]
        paths += [_path(_REFERENCES[name], each["id"]) for each in (found if isinstance(found, list) else [found])]
    return paths


def create_body(operation: Operation) -> Json:
    """Return the JSON:API object that creates an entry. A variant without a price or without stock gets 0."""
    resource = operation.resource or {}
    if operation.kind is not OperationKind.UPSERT_VARIANT:
        return resource
    attributes = {n: 0 if v is None and n in _NUMBERS else v for n, v in resource["attributes"].items()}
    return resource | {"attributes": attributes}


def update_body(operation: Operation) -> Json:
    """Return the JSON:API object for the update of an existing entry by an UPSERT_* operation."""
    resource = operation.resource or {}
    attributes = {n: v for n, v in resource["attributes"].items() if n not in _CREATE_ONLY}
    if operation.kind is OperationKind.UPSERT_VARIANT:
        attributes = {n: v for n, v in attributes.items() if v is not None or n not in _NUMBERS}
    update = {"type": resource["type"], "id": catalog_id(operation.key), "attributes": attributes}
    # Klaviyo accepts no relationships in the update of a variant.
    if operation.kind is not OperationKind.UPSERT_VARIANT and "relationships" in resource:
        update["relationships"] = resource["relationships"]
    return update


def deletion_request(profile_id: str) -> Request:
    """Return the request for the deletion of a profile and its data. `profile_id` is Klaviyo's id."""
    profile = {"data": {"type": "profile", "id": profile_id, "attributes": {}}}
    data = {"type": "data-privacy-deletion-job", "attributes": {"profile": profile}}
    return Request("POST", "/api/data-privacy-deletion-jobs", {"data": data})
