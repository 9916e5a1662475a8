"""Operations one by one: what exists is updated, what is gone created, conflicts are resolved."""

from __future__ import annotations

from threading import Lock
from typing import TYPE_CHECKING
from urllib.parse import quote

import cachetools
import orjson

from worker.errors import Rejected, Transient, WorkerError
from worker.json_access import as_text
from worker.klaviyo.client import iter_resources
from worker.model import Json, Operation, OperationKind, SendResult
from worker.send.identifiers import IDENTIFIER_PRIORITY, drop_identifier, invalid_identifier
from worker.send.requests import COLLECTION, deletion_request, entry_path, update_body
from worker.telemetry.log import log
from worker.transform.catalog import external_id

if TYPE_CHECKING:
    from collections.abc import Callable

    from worker.klaviyo.client import KlaviyoClient

_REMEMBERED, _REMEMBERED_SECONDS = 50_000, 600.0  # catalog entries known to exist; forgetting one costs a call
_NOT_FOUND, _CONFLICT = 404, 409


class SingleSender:
    """Carries out one operation at a time. Safe for many threads; remembers which catalog entries exist."""

    def __init__(self, client: KlaviyoClient) -> None:
        self._client = client
        self._exists: cachetools.TTLCache[str, bool]
        self._exists = cachetools.TTLCache(_REMEMBERED, _REMEMBERED_SECONDS)
        self._lock = Lock()
        self._special: dict[OperationKind, Callable[[Operation], None]] = {
            OperationKind.CREATE_EVENT: self._create_event,
            OperationKind.UPSERT_PROFILE: self._upsert_profile,
            OperationKind.DELETE_PROFILE: self._delete_profile,
            OperationKind.UPSERT_CATEGORY: self._upsert,
            OperationKind.ENSURE_CATEGORY: self._ensure,
            OperationKind.UPSERT_ITEM: self._upsert,
            OperationKind.UPSERT_VARIANT: self._upsert,
            OperationKind.UPDATE_INVENTORY: self._update_inventory,
            OperationKind.DELETE_STALE_VARIANTS: self._delete_stale_variants,
            OperationKind.DELETE_ITEM: self._delete,
            OperationKind.DELETE_CATEGORY: self._delete,
            OperationKind.DELETE_VARIANT: self._delete,
        }

    def send(self, operation: Operation) -> SendResult:
        """Carry out an operation; return what became of it."""
        before, error = self._client.requests_sent(), None
        try:
            self._special[operation.kind](operation)
        except WorkerError as failure:
            error = failure
        return SendResult(error, self._client.requests_sent() - before)

    def stale_variants(self, operation: Operation) -> list[Operation]:
        """Return the deletions of the item's variants in Klaviyo that commercetools no longer has."""
        try:
            found = list(
                iter_resources(self._client, f"{entry_path(operation)}/variants?fields%5Bcatalog-variant%5D=id")
            )
        except Rejected as error:
            if error.status != _NOT_FOUND:
                raise
            return []
        keys = [external_id(as_text(variant.get("id"))) for variant in found]
        return [Operation(OperationKind.DELETE_VARIANT, key) for key in keys if key not in operation.keep_skus]

    def knows(self, entry: str) -> bool:
        """Tell whether the catalog entry at this path was seen lately."""
        with self._lock:
            return entry in self._exists

    def remember(self, entry: str) -> None:
        """Note that a catalog entry exists."""
        with self._lock:
            self._exists[entry] = True

    def forget(self, entry: str) -> None:
        """Note that a catalog entry may be gone."""
        with self._lock:
            self._exists.pop(entry, None)

    def _create_event(self, operation: Operation) -> None:
        self._write_profile("POST", "/api/events", operation.resource or {})

    def _upsert_profile(self, operation: Operation) -> None:
        """Import the profile. A 409 names another profile with one of its identifiers: write to that one.

        When that conflicts too, the identifiers belong to several profiles, and Klaviyo merges none of them
        by itself: give up the weaker ones rather than the update.
        """
        resource = operation.resource or {}
        try:
            return self._import(resource)
        except Rejected as error:
            if error.status != _CONFLICT:
                raise
            duplicate = error.duplicate_id
        try:
            if duplicate:
                path = f"/api/profiles/{quote(duplicate, safe='')}"
                return self._write_profile("PATCH", path, resource | {"id": duplicate})
        except Rejected as error:
            if error.status != _CONFLICT:
                raise
        return self._import_strongest(resource)

    def _import_strongest(self, resource: Json) -> None:
        """Import with the phone number left out, then with nothing but the strongest identifier."""
        attributes = dict(resource["attributes"])
        strongest = next(name for name in IDENTIFIER_PRIORITY if name in attributes)
        without_phone = {n: v for n, v in attributes.items() if n != "phone_number" or n == strongest}
        alone = {n: v for n, v in without_phone.items() if n != "external_id" or n == strongest}
        try:
            self._import(resource | {"attributes": without_phone})
        except Rejected as error:
            if error.status != _CONFLICT:
                raise
            self._import(resource | {"attributes": alone})

    def _import(self, resource: Json) -> None:
        self._write_profile("POST", "/api/profile-import", resource)

    def _write_profile(self, method: str, path: str, resource: Json) -> None:
        """Write a profile or an event, without an invalid email or phone where something else identifies it."""
        try:
            self._client.call(method, path, {"data": resource})
        except Rejected as error:
            identifier = invalid_identifier(error)
            rest = drop_identifier(resource, identifier) if identifier else None
            if rest is None:
                raise
            log.warning("identifier_left_out", extra={"identifier": identifier, "resource": resource["type"]})
            self._write_profile(method, path, rest)

    def _delete_profile(self, operation: Operation) -> None:
        """Request the deletion of every profile with this external_id: the endpoint itself takes none."""
        literal = orjson.dumps(operation.key).decode()
        path = f"/api/profiles?filter={quote(f'equals(external_id,{literal})')}&fields%5Bprofile%5D=id"
        for profile in iter_resources(self._client, path):
            request = deletion_request(as_text(profile.get("id")))
            self._client.call(request.method, request.path, request.body)

    def _upsert(self, operation: Operation) -> None:
        """Create, or update what exists; what this process has seen exist is updated at once."""
        entry = entry_path(operation)
        if self.knows(entry):
            try:
                self._update(operation)
            except Rejected as error:
                if error.status != _NOT_FOUND:
                    raise
            else:
                return
        if not self._created(operation):
            try:
                self._update(operation)
            except Rejected as error:
                if error.status != _NOT_FOUND:
                    raise
                raise Transient(f"another process deleted {operation.kind.value} meanwhile") from None
        self.remember(entry)

    def _ensure(self, operation: Operation) -> None:
        """Create what is missing and leave alone what is there."""
        entry = entry_path(operation)
        if not self.knows(entry):
            self._created(operation)
            self.remember(entry)

    def _created(self, operation: Operation) -> bool:
        """Create the entry; False when it exists."""
        try:
            self._client.call("POST", f"/api/{COLLECTION[operation.kind]}", {"data": operation.resource})
        except Rejected as error:
            if error.status != _CONFLICT:
                raise
            return False
        return True

    def _update(self, operation: Operation) -> None:
        self._client.call("PATCH", entry_path(operation), {"data": update_body(operation)})

    def _update_inventory(self, operation: Operation) -> None:
        """Update the stock. Klaviyo lacks the variant: write the product, or nothing when it has none."""
        try:
            self._client.call("PATCH", entry_path(operation), {"data": operation.resource})
        except Rejected as error:
            if error.status != _NOT_FOUND:
                raise
            for other in operation.fallback() if operation.fallback else ():
                self._special[other.kind](other)

    def _delete_stale_variants(self, operation: Operation) -> None:
        for variant in self.stale_variants(operation):
            self._delete(variant)

    def _delete(self, operation: Operation) -> None:
        path = entry_path(operation)
        self.forget(path)
        try:
            self._client.call("DELETE", path)
        except Rejected as error:
            if error.status != _NOT_FOUND:  # gone already: that is what was wanted
                raise
