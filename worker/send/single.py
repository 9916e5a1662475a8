"""The sender for individual operations. It resolves conflicts."""

from __future__ import annotations

from http import HTTPStatus
from threading import Lock
from typing import TYPE_CHECKING

import cachetools

from worker.errors import Rejected, Transient, WorkerError
from worker.json_access import as_key
from worker.klaviyo.client import iter_resources
from worker.model import Operation, OperationKind, SendResult
from worker.send.erasure import Eraser
from worker.send.identifiers import write_record
from worker.send.requests import COLLECTION, create_body, entry_path, reference_paths, update_body
from worker.telemetry.defects import describe_defect, report_defect
from worker.transform.catalog import external_id

if TYPE_CHECKING:
    from collections.abc import Callable

    from worker.klaviyo.client import KlaviyoClient
    from worker.send.profiles import Profiles

# The cache of existing catalog entries. A miss costs one request.
_CACHE_SIZE = 50_000
_CACHE_SECONDS = 600.0


class SingleSender:
    """A sender for individual operations. It remembers which catalog entries exist. Safe for many threads."""

    def __init__(self, client: KlaviyoClient, profiles: Profiles) -> None:
        self._client = client
        self._eraser = Eraser(client)
        self._profiles = profiles
        self._existing: cachetools.TTLCache[str, bool] = cachetools.TTLCache(_CACHE_SIZE, _CACHE_SECONDS)
        self._lock = Lock()
        self._methods: dict[OperationKind, Callable[[Operation], None]] = {
            OperationKind.CREATE_EVENT: self._create_event,
            OperationKind.UPSERT_PROFILE: self._send_profile,
            OperationKind.UPSERT_GUEST: self._send_profile,
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
        """Send an operation and return its result."""
        if operation.kind is OperationKind.DELETE_PROFILE:
            return self._eraser.erase(operation)
        before = self._client.requests_sent()
        error: WorkerError | None = None
        try:
            self._methods[operation.kind](operation)
        except WorkerError as failure:
            error = failure
        except Exception as defect:  # noqa: BLE001 - a defect must not affect the other operations
            error = report_defect("send", describe_defect(defect))
        return SendResult(error, self._client.requests_sent() - before)

    def stale_variants(self, operation: Operation) -> list[Operation]:
        """Return deletions for the item's variants in Klaviyo whose SKU is not in `keep_skus`. Raises WorkerError."""
        try:
            found = list(
                iter_resources(self._client, f"{entry_path(operation)}/variants?fields%5Bcatalog-variant%5D=id")
            )
        except Rejected as error:
            if error.status != HTTPStatus.NOT_FOUND:
                raise
            return []
        keys = [external_id(as_key(variant.get("id"))) for variant in found]
        return [Operation(OperationKind.DELETE_VARIANT, key) for key in keys if key not in operation.keep_skus]

    def is_known(self, entry: str) -> bool:
        """Return whether the catalog entry at this path is known to exist."""
        with self._lock:
            return entry in self._existing

    def remember(self, entry: str) -> None:
        """Remember that the catalog entry at this path exists."""
        with self._lock:
            self._existing[entry] = True

    def forget(self, entry: str) -> None:
        """Forget that the catalog entry at this path exists."""
        with self._lock:
            self._existing.pop(entry, None)

    def _create_event(self, operation: Operation) -> None:
        write_record(self._client, "POST", "/api/events", operation.resource or {})

    def _send_profile(self, operation: Operation) -> None:
        for result in self._profiles.send([operation]):
            if result.error:
                raise result.error

    def _upsert(self, operation: Operation) -> None:
        """Create the entry, or update it if it exists. If it is known to exist, try the update first."""
        entry = entry_path(operation)
        if self.is_known(entry) and self._update(operation):
            return
        if not self._create(operation) and not self._update(operation):
            raise Transient(f"{operation.kind.value}: another process has just deleted the entry")
        self.remember(entry)

    def _ensure(self, operation: Operation) -> None:
        """Create the entry. If it exists, leave it unchanged."""
        entry = entry_path(operation)
        if not self.is_known(entry):
            self._create(operation)
            self.remember(entry)

    def _create(self, operation: Operation) -> bool:
        """Create the entry and return True. If it already exists, return False.

        Raises Transient if it refers to an entry that was remembered, but that Klaviyo no longer has. The entry is
        forgotten, so that the next attempt creates it.
        """
        try:
            self._client.call("POST", f"/api/{COLLECTION[operation.kind]}", {"data": create_body(operation)})
        except Rejected as error:
            if error.status == HTTPStatus.NOT_FOUND and self._forget_references(operation):
                raise Transient(f"{operation.kind.value}: an entry that it refers to has been deleted") from None
            if error.status != HTTPStatus.CONFLICT:
                raise
            return False
        return True

    def _forget_references(self, operation: Operation) -> bool:
        """Forget the entries to which the operation's entry refers. Return whether one of them was known to exist."""
        known = [path for path in reference_paths(operation) if self.is_known(path)]
        for path in known:
            self.forget(path)
        return bool(known)

    def _update(self, operation: Operation) -> bool:
        """Update the entry and return True. If it does not exist, return False."""
        try:
            self._client.call("PATCH", entry_path(operation), {"data": update_body(operation)})
        except Rejected as error:
            if error.status != HTTPStatus.NOT_FOUND:
                raise
            return False
        return True

    def _update_inventory(self, operation: Operation) -> None:
        """Update the stock of a variant. If Klaviyo has no such variant, send the fallback operations."""
        try:
            self._client.call("PATCH", entry_path(operation), {"data": operation.resource})
        except Rejected as error:
            if error.status != HTTPStatus.NOT_FOUND:
                raise
            for fallback in operation.fallback() if operation.fallback else ():
                self._methods[fallback.kind](fallback)

    def _delete_stale_variants(self, operation: Operation) -> None:
        for variant in self.stale_variants(operation):
            self._delete(variant)

    def _delete(self, operation: Operation) -> None:
        path = entry_path(operation)
        self.forget(path)
        try:
            self._client.call("DELETE", path)
        except Rejected as error:
            if error.status != HTTPStatus.NOT_FOUND:  # 404: already deleted
                raise
