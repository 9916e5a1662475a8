"""The bulk sender for catalog entries. It uses Klaviyo's jobs that create, update and delete entries."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import quote

import orjson

from worker.errors import JobUnfinished, Rejected, RequestBlocked, WorkerError
from worker.http.chunks import chunked
from worker.json_access import as_key
from worker.klaviyo.client import iter_resources
from worker.model import Json, Operation, OperationKind, SendResult
from worker.send.bulk import with_fallback
from worker.send.jobs import BulkJobType, JobEntry
from worker.send.requests import COLLECTION, create_body, entry_path, update_body
from worker.transform.catalog import catalog_id, external_id

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from concurrent.futures import Executor

    from worker.klaviyo.client import KlaviyoClient
    from worker.send.bulk import BulkResult, OperationId, SendIndividually
    from worker.send.jobs import BulkJobs
    from worker.send.single import SingleSender

MAX_ENTRIES = 100  # per job: https://developers.klaviyo.com/en/reference/bulk_create_catalog_items
MAX_FILTER_BYTES = 6_000  # percent-encoded; proxies accept URIs of up to 8 KB
_TYPES = {  # collection -> JSON:API type, name of the list of entries in a job
    "catalog-categories": ("catalog-category", "categories"),
    "catalog-items": ("catalog-item", "items"),
    "catalog-variants": ("catalog-variant", "variants"),
}
_FULL_WRITES = frozenset({OperationKind.UPSERT_CATEGORY, OperationKind.UPSERT_ITEM, OperationKind.UPSERT_VARIANT})
_NO_REQUESTS = SendResult(None, 0)


class BulkCatalog:
    """The bulk sender for catalog entries. Before it writes entries, it looks up which of them exist.

    Failed entries are sent individually. That also handles entries that another process has just created or deleted.
    """

    def __init__(
        self,
        client: KlaviyoClient,
        jobs: BulkJobs,
        single: SingleSender,
        executor: Executor,
        send_individually: SendIndividually,
        threshold: int,
    ) -> None:
        self._client = client
        self._jobs = jobs
        self._single = single
        self._executor = executor
        self._send_individually = send_individually
        self._threshold = threshold

    def select(self, operations: Sequence[Operation]) -> list[OperationId]:
        """Return the ids of the operations of those kinds that have more operations than the threshold."""
        names = {(operation.kind, operation.key) for operation in operations if operation.kind in COLLECTION}
        sizes = Counter(kind for kind, _ in names)
        return [name for name in names if sizes[name[0]] > self._threshold]

    def send(self, operations: Sequence[Operation]) -> list[SendResult]:
        """Send operations of one phase and return their results in the same order."""
        groups: dict[str, list[Operation]] = defaultdict(list)
        for operation in operations:
            groups[COLLECTION[operation.kind]].append(operation)
        results: dict[OperationId, SendResult] = {}
        for collection, group in groups.items():
            names = [(operation.kind, operation.key) for operation in group]
            results |= zip(names, self._send_group(collection, group), strict=True)
        return [results[operation.kind, operation.key] for operation in operations]

    def _send_group(self, collection: str, operations: list[Operation]) -> list[SendResult]:
        match operations[0].kind:
            case OperationKind.DELETE_STALE_VARIANTS:
                return self._delete_stale_variants(operations)
            case OperationKind.DELETE_ITEM | OperationKind.DELETE_CATEGORY | OperationKind.DELETE_VARIANT:
                return self._delete(collection, operations)
            case _:
                return self._write(collection, operations)

    def _write(self, collection: str, operations: list[Operation]) -> list[SendResult]:
        """Create missing entries and update existing entries.

        If an entry has a full and a partial write, only the full write is sent.
        """
        writes = {operation.key: operation for operation in sorted(operations, key=lambda o: o.kind in _FULL_WRITES)}
        try:
            existing = self._find_existing(collection, writes)
        except (Rejected, RequestBlocked):
            return list(self._send_individually(operations))
        except WorkerError as error:
            return [SendResult(error, 1)] * len(operations)
        results = self._run_write_jobs(collection, writes, existing)
        return with_fallback(
            operations, [results.get(operation.key) for operation in operations], self._send_individually
        )

    def _run_write_jobs(
        self, collection: str, writes: Mapping[str, Operation], existing: set[str]
    ) -> dict[str, BulkResult]:
        """Run the jobs that create and update entries. Return the results by key. A missing result is unknown."""
        results: dict[str, BulkResult] = dict.fromkeys(existing, _NO_REQUESTS)
        creations = [
            o for key, o in writes.items() if key not in existing and o.kind is not OperationKind.UPDATE_INVENTORY
        ]
        updates = [o for key, o in writes.items() if key in existing and o.kind is not OperationKind.ENSURE_CATEGORY]
        for verb, group in (("create", creations), ("update", updates)):
            results |= zip((o.key for o in group), self._jobs.run(*_job(collection, verb, group)), strict=True)
        for operation in creations:
            result = results[operation.key]
            if result and result.error is None:
                self._single.remember(entry_path(operation))
        return results

    def _find_existing(self, collection: str, writes: Mapping[str, Operation]) -> set[str]:
        """Return the keys of the entries that exist in Klaviyo. Raises WorkerError."""
        existing = {key for key, operation in writes.items() if self._single.is_known(entry_path(operation))}
        fields = f"fields%5B{_TYPES[collection][0]}%5D=id"
        for literals in _filters(key for key in writes if key not in existing):
            path = f"/api/{collection}?filter=any(ids,%5B{literals}%5D)&{fields}"
            existing |= {external_id(as_key(entry.get("id"))) for entry in iter_resources(self._client, path)}
        for key in existing & writes.keys():
            self._single.remember(entry_path(writes[key]))
        return existing

    def _delete(self, collection: str, operations: list[Operation]) -> list[SendResult]:
        for operation in operations:
            self._single.forget(entry_path(operation))
        return with_fallback(
            operations, self._jobs.run(*_job(collection, "delete", operations)), self._send_individually
        )

    def _delete_stale_variants(self, operations: list[Operation]) -> list[SendResult]:
        """Delete the variants that commercetools no longer has. The deletions of all items are sent together."""
        stale_variants = list(self._executor.map(self._stale_variants, operations))
        deletions = {deletion.key: deletion for stale in stale_variants for deletion in stale.deletions}
        if len(deletions) > self._threshold:
            results: Iterable[SendResult] = self._delete("catalog-variants", list(deletions.values()))
        else:
            results = self._send_individually(list(deletions.values()))
        result_of = dict(zip(deletions, results, strict=True))
        return [stale.result(result_of) for stale in stale_variants]

    def _stale_variants(self, operation: Operation) -> _StaleVariants:
        try:
            return _StaleVariants(self._single.stale_variants(operation))
        except WorkerError as error:
            return _StaleVariants([], error)


class _StaleVariants(NamedTuple):
    """The deletions of an item's stale variants, or the error that prevented their lookup."""

    deletions: list[Operation]
    error: WorkerError | None = None

    def result(self, result_of: Mapping[str, SendResult]) -> SendResult:
        """Return the item's result: an error and the number of requests. JobUnfinished precedes other errors.

        `result_of` has the result of each deletion, by SKU.
        """
        errors = [self.error, *(result_of[deletion.key].error for deletion in self.deletions)]
        errors.sort(key=lambda error: not isinstance(error, JobUnfinished))
        return SendResult(next(filter(None, errors), None), 1 + len(self.deletions))


def _job(collection: str, verb: str, operations: list[Operation]) -> tuple[BulkJobType, list[JobEntry]]:
    """Return the type of a job and its entries."""
    resource_type, member = _TYPES[collection]
    entries = [
        JobEntry(operation.key, orjson.dumps(_resource(resource_type, verb, operation))) for operation in operations
    ]
    return BulkJobType(f"{resource_type}-bulk-{verb}-job", member, MAX_ENTRIES), entries


def _resource(resource_type: str, verb: str, operation: Operation) -> Json | None:
    if verb == "delete":
        return {"type": resource_type, "id": catalog_id(operation.key)}
    if operation.kind is OperationKind.UPDATE_INVENTORY:
        return operation.resource
    if verb == "create":
        return create_body(operation)
    return update_body(operation)


def _filters(keys: Iterable[str]) -> Iterator[str]:
    """Yield percent-encoded lists of ids for `any(ids,[...])`, each short enough for a URI."""
    literals = (quote(orjson.dumps(catalog_id(key)), safe="$:") for key in keys)
    chunks = chunked(literals, lambda literal: len(literal) + 1, MAX_FILTER_BYTES, MAX_ENTRIES)
    return map(",".join, chunks)
