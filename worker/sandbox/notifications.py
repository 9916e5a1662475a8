"""Notifications in commercetools' format."""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from worker.sandbox.http import Json

PROJECT = "sandbox-shop"
AT = "2026-11-23T10:00:00.123Z"


def message(
    kind: str,
    resource_type: str,
    resource_id: str,
    *,
    created_at: str = AT,
    sequence: int = 1,
    identifiers: Json | None = None,
    **fields: Any,
) -> Json:
    """Return a Message notification. `fields` are the fields of its type.

    Resource and `sequence` identify a message: the same pair again is a duplicate.
    """
    return {
        "notificationType": "Message",
        "projectKey": PROJECT,
        "id": str(uuid.uuid5(uuid.NAMESPACE_OID, f"{kind} {resource_id} {sequence}")),
        "version": 1,
        "sequenceNumber": sequence,
        "resource": {"typeId": resource_type, "id": resource_id},
        "resourceVersion": sequence,
        "resourceUserProvidedIdentifiers": identifiers or {},
        "type": kind,
        "createdAt": created_at,
        "lastModifiedAt": created_at,
        **fields,
    }


def change(
    kind: str,
    resource_type: str,
    resource_id: str,
    *,
    version: int | None = None,
    modified_at: str = AT,
    **fields: Any,
) -> Json:
    """Return a ResourceCreated, ResourceUpdated or ResourceDeleted notification."""
    version = version or (1 if kind == "ResourceCreated" else 2)
    return {
        "notificationType": kind,
        "projectKey": PROJECT,
        "resource": {"typeId": resource_type, "id": resource_id},
        "resourceUserProvidedIdentifiers": {},
        "version": version,
        "modifiedAt": modified_at,
        **({"oldVersion": version - 1} if kind == "ResourceUpdated" else {}),
        **fields,
    }


def event(kind: str = "ImportContainerCreated", resource_type: str = "import-api", **data: Any) -> Json:
    """Return an Event notification. It has no project and no resource."""
    return {
        "id": str(uuid.uuid5(uuid.NAMESPACE_OID, f"{kind} {sorted(data)}")),
        "notificationType": "Event",
        "type": kind,
        "resourceType": resource_type,
        "data": data,
        "createdAt": AT,
    }


def payload_not_included(kind: str, resource_type: str, resource_id: str) -> Json:
    """Return a message that was too large for the queue: it lacks the fields of its type."""
    notification = message(kind, resource_type, resource_id)
    del notification["type"]
    return notification | {"payloadNotIncluded": {"reason": "Payload too large.", "payloadType": kind}}
