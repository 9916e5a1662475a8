"""Writes catalog entries: few of a kind individually, many in Klaviyo's bulk jobs."""

from __future__ import annotations

from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import TYPE_CHECKING, Literal

import orjson

from worker.errors import Rejected, Transient, WorkerError
from worker.model import Json, Operation, OperationKind, SendResult
from worker.send.bodies import VARIANT_KINDS, creation, related, update
from worker.send.jobs import BulkJobType, JobEntry
from worker.send.requests import COLLECTION, entry_path
from worker.telemetry.defects import describe_defect, report_defect
from worker.transform.catalog import catalog_id, external_id

if TYPE_CHECKING:
    from collections.abc import Sequence
    from concurrent.futures import Executor

    from worker.klaviyo.client import KlaviyoClient
    from worker.send.catalog.reader import CatalogReader
    from worker.send.jobs import BulkJobs

MAX_ENTRIES = 100  # per job: https://developers.klaviyo.com/en/reference/bulk_create_catalog_items
_TYPES = {  # collection -> JSON:API type, name of the list of entries in a job
    "catalog-categories": ("catalog-category", "categories"),
    "catalog-items": ("catalog-item", "items"),
    "catalog-variants": ("catalog-variant", "variants"),
}
Verb = Literal["create", "update", "delete"]


class MissingVariantError(Exception):
    """Klaviyo does not have the variant of a stock message."""


@dataclass(frozen=True, slots=True)
class Write:
    """A write of a catalog entry: the operation, what to do, and the resource in the request.

    `if_exists` is the resource of the update if an entry to create exists.
    """

    operation: Operation
    verb: Verb
    resource: Json = field(repr=False)
    if_exists: Json | None = field(default=None, repr=False)

    @property
    def collection(self) -> str:
        """Return the collection of the entry."""
        return COLLECTION[self.operation.kind]

    @property
    def path(self) -> str:
        """Return the path of the entry."""
        return entry_path(self.collection, self.operation.key)


class CatalogWriter:
    """A writer of catalog entries. Safe for many threads.

    Entries that fail in a job are written individually. That also handles those that another process has just created,
    deleted or moved to another item.
    """

    def __init__(
        self, client: KlaviyoClient, jobs: BulkJobs, reader: CatalogReader, executor: Executor, threshold: int
    ) -> None:
        self._client = client
        self._jobs = jobs
        self._reader = reader
        self._executor = executor
        self._threshold = threshold

    def write(self, writes: Sequence[Write]) -> list[SendResult]:
        """Write the entries and return the results in the same order. Every entry occurs once."""
        groups: dict[tuple[str, Verb], list[Write]] = defaultdict(list)
        for write in writes:
            groups[write.collection, write.verb].append(write)
        results: dict[int, SendResult] = {}
        for (collection, verb), group in groups.items():
            if len(group) > self._threshold:
                results |= self._run_job(collection, verb, group)
        single = [write for write in writes if id(write) not in results]
        results |= zip(map(id, single), self._write_individually(single), strict=True)
        return [results[id(write)] for write in writes]

    def _run_job(self, collection: str, verb: Verb, group: Sequence[Write]) -> dict[int, SendResult]:
        """Run a bulk job. Return the results that are known, by the identity of the write."""
        entries: dict[int, JobEntry] = {}
        for write in group:
            with suppress(TypeError):  # half a surrogate pair: writing it individually reports it
                entries[id(write)] = JobEntry(write.operation.key, orjson.dumps(write.resource))
        resource_type, member = _TYPES[collection]
        job_type = BulkJobType(f"{resource_type}-bulk-{verb}-job", member, MAX_ENTRIES)
        results = zip(entries, self._jobs.run(job_type, list(entries.values()), self._executor), strict=True)
        return {name: result for name, result in results if result is not None}

    def _write_individually(self, writes: Sequence[Write]) -> list[SendResult]:
        if len(writes) <= 1:  # in the calling thread, because a thread switch would only add latency
            return list(map(self._write_one, writes))
        return list(self._executor.map(self._write_one, writes))

    def _write_one(self, write: Write) -> SendResult:
        before = self._client.requests_sent()
        error: WorkerError | None = None
        follow_ups: frozenset[tuple[str, str]] = frozenset()
        try:
            self._send(write)
        except MissingVariantError:
            follow_ups = frozenset({("sku", write.operation.key)})
        except WorkerError as failure:
            error = failure
        except Exception as defect:  # noqa: BLE001 - a defect must not affect the other operations
            error = report_defect("send", describe_defect(defect))
        return SendResult(error, self._client.requests_sent() - before, follow_ups=follow_ups)

    def _send(self, write: Write) -> None:
        """Send a write. Klaviyo's answer decides whether the entry exists, whatever an earlier reading showed."""
        match write.verb:
            case "create":
                if not self._create(write.operation):
                    self._resolve_conflict(write)
            case "update":
                if not self._update(write.path, write.resource):
                    self._create_missing(write)
            case "delete":
                self._delete(write.path)

    def _create_missing(self, write: Write) -> None:
        """Create an entry that was deleted after it was read. Raises MissingVariantError for stock alone."""
        if write.operation.kind is OperationKind.UPDATE_INVENTORY:
            raise MissingVariantError
        if not self._create(write.operation):
            raise Transient(f"{write.operation.kind.value}: another process writes the entry at the same time")

    def _resolve_conflict(self, write: Write) -> None:
        """Update an entry that was created after it was read. Move a variant that belongs to another item."""
        operation, resource = write.operation, write.if_exists or update(write.operation)
        if operation.kind in {OperationKind.ENSURE_CATEGORY, OperationKind.ENSURE_ITEM}:
            return
        if operation.kind in VARIANT_KINDS and not self._is_at_its_item(operation):
            self._delete(write.path)  # Klaviyo cannot move a variant
            if self._create(operation):
                return
        elif not resource["attributes"] or self._update(write.path, resource):
            return
        raise Transient(f"{operation.kind.value}: another process writes the entry at the same time")

    def _is_at_its_item(self, operation: Operation) -> bool:
        (item,) = related(operation, "item")
        return self._reader.has_variant(external_id(item), operation.key)

    def _create(self, operation: Operation) -> bool:
        """Create an entry and return True. If it already exists, return False."""
        path = f"/api/{COLLECTION[operation.kind]}"
        return self._call("POST", path, creation(operation), HTTPStatus.CONFLICT)

    def _update(self, path: str, resource: Json) -> bool:
        """Update an entry and return True. If it does not exist, return False."""
        return self._call("PATCH", path, resource, HTTPStatus.NOT_FOUND)

    def _delete(self, path: str) -> None:
        """Delete an entry. It is a success if it does not exist."""
        self._call("DELETE", path, None, HTTPStatus.NOT_FOUND)

    def _call(self, method: str, path: str, resource: Json | None, expected: HTTPStatus) -> bool:
        """Send a request. Return False if Klaviyo answers with the expected status."""
        try:
            self._client.call(method, path, None if resource is None else {"data": resource})
        except Rejected as error:
            if error.status != expected:
                raise
            return False
        return True


def deletion(operation: Operation) -> Write:
    """Return the write that deletes the entry of an operation."""
    resource = {"type": _TYPES[COLLECTION[operation.kind]][0], "id": catalog_id(operation.key)}
    return Write(operation, "delete", resource)
