"""The requests for operations: their paths and bodies."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import quote

from worker.model import Json, Operation, OperationKind
from worker.send.bodies import creation
from worker.transform.catalog import catalog_id
from worker.transform.profiles import without_clears

COLLECTION = {
    OperationKind.UPSERT_CATEGORY: "catalog-categories",
    OperationKind.ENSURE_CATEGORY: "catalog-categories",
    OperationKind.MOVE_CATEGORY: "catalog-categories",
    OperationKind.DELETE_CATEGORY: "catalog-categories",
    OperationKind.UPSERT_ITEM: "catalog-items",
    OperationKind.ENSURE_ITEM: "catalog-items",
    OperationKind.DELETE_ITEM: "catalog-items",
    OperationKind.DELETE_STALE_VARIANTS: "catalog-items",
    OperationKind.UPSERT_VARIANT: "catalog-variants",
    OperationKind.ENSURE_VARIANT: "catalog-variants",
    OperationKind.UPDATE_INVENTORY: "catalog-variants",
    OperationKind.DELETE_VARIANT: "catalog-variants",
}


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
        case _:
            return _catalog_request(operation)


def _profile(operation: Operation) -> Json:
    """Return the profile with its consents, which are written last."""
    resource = operation.resource or {"attributes": {}}
    agreed = {consent.property: consent.value for consent in operation.consents}
    if agreed:
        attributes = resource["attributes"]
        resource = resource | {"attributes": attributes | {"properties": attributes.get("properties", {}) | agreed}}
    return without_clears(resource)


def _catalog_request(operation: Operation) -> Request:
    collection = COLLECTION[operation.kind]
    path = entry_path(collection, operation.key)
    match operation.kind:
        case OperationKind.DELETE_STALE_VARIANTS:
            return Request("GET", path + "/variants", {"keep": sorted(operation.keep_skus)})
        case OperationKind.DELETE_ITEM | OperationKind.DELETE_CATEGORY | OperationKind.DELETE_VARIANT:
            return Request("DELETE", path)
        case OperationKind.UPDATE_INVENTORY:
            return Request("PATCH", path, {"data": operation.resource})
        case _:
            return Request("POST", f"/api/{collection}", {"data": creation(operation)})


def entry_path(collection: str, key: str) -> str:
    """Return the path of the catalog entry that has an external id."""
    return f"/api/{collection}/{quote(catalog_id(key), safe='$:')}"


def deletion_request(profile_id: str) -> Request:
    """Return the request for the deletion of a profile and its data. `profile_id` is Klaviyo's id."""
    profile = {"data": {"type": "profile", "id": profile_id, "attributes": {}}}
    data = {"type": "data-privacy-deletion-job", "attributes": {"profile": profile}}
    return Request("POST", "/api/data-privacy-deletion-jobs", {"data": data})
