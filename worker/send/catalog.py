"""Catalog entries in bulk: jobs that create what is missing, update what exists, delete what is gone."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import TYPE_CHECKING
from urllib.parse import quote

import orjson

from worker.errors import Rejected, WorkerError
from worker.http.chunks import chunked
from worker.json_access import as_text
from worker.klaviyo.client import iter_resources
from worker.model import Json, Operation, OperationKind, SendResult
from worker.send.bulk import with_fallback
from worker.send.jobs import BulkJobType, JobEntry
from worker.send.requests import COLLECTION, entry_path, update_body
from worker.transform.catalog import catalog_id, external_id

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from concurrent.futures import Executor

    from worker.klaviyo.client import KlaviyoClient
    from worker.send.bulk import OneByOne
    from worker.send.jobs import BulkJobs
    from worker.send.one_by_one import SingleSender

MAX_ENTRIES = 100  # of a job: https://developers.klaviyo.com/en/reference/bulk_create_catalog_items
MAX_FILTER_BYTES = 6_000  # of a lookup, percent-encoded; keeps the URI under the 8 KB that proxies take
_TYPES = {
    "catalog-categories": ("catalog-category", "categories"),
    "catalog-items": ("catalog-item", "items"),
    "catalog-variants": ("catalog-variant", "variants"),
}
_FULL = frozenset({OperationKind.UPSERT_CATEGORY, OperationKind.UPSERT_ITEM, OperationKind.UPSERT_VARIANT})
_NOTHING_TO_DO = SendResult(None, 0)


class BulkCatalog:
    """Writes catalog entries in bulk. Which of them exist is asked first, many in a call.

    What a job could not do goes one by one: what was created or deleted meanwhile is sorted out there.
    """

    def __init__(
        self,
        client: KlaviyoClient,
        jobs: BulkJobs,
        single: SingleSender,
        executor: Executor,
        one_by_one: OneByOne,
        threshold: int,
    ) -> None:
        self._client = client
        self._jobs = jobs
        self._single = single
        self._executor = executor
        self._one_by_one = one_by_one
        self._threshold = threshold

    def select(self, operations: Sequence[Operation]) -> list[tuple[OperationKind, str]]:
        """Return the names of the operations that are to go in bulk: those of which there is more than a handful."""
        names = {(operation.kind, operation.key) for operation in operations if operation.kind in COLLECTION}
        sizes = Counter(kind for kind, _ in names)
        return [name for name in names if sizes[name[0]] > self._threshold]

    def send(self, operations: Sequence[Operation]) -> list[SendResult]:
        """Carry out operations of one phase; return what became of each, in their order."""
        groups: dict[str, list[Operation]] = defaultdict(list)
        for operation in operations:
            groups[COLLECTION[operation.kind]].append(operation)
        results: dict[tuple[OperationKind, str], SendResult] = {}
        for collection, group in groups.items():
            names = [(operation.kind, operation.key) for operation in group]
            results |= zip(names, self._work(collection, group), strict=True)
        return [results[operation.kind, operation.key] for operation in operations]

    def _work(self, collection: str, operations: list[Operation]) -> list[SendResult]:
        match operations[0].kind:
            case OperationKind.DELETE_STALE_VARIANTS:
                return self._delete_stale_variants(operations)
            case OperationKind.DELETE_ITEM | OperationKind.DELETE_CATEGORY | OperationKind.DELETE_VARIANT:
                return self._delete(collection, operations)
            case _:
                return self._write(collection, operations)

    def _write(self, collection: str, operations: list[Operation]) -> list[SendResult]:
        """Create what is missing and update what exists. Of two writes to an entry the full one counts for both."""
        writes = {operation.key: operation for operation in sorted(operations, key=lambda o: o.kind in _FULL)}
        try:
            existing = self._existing(collection, writes)
        except Rejected:
            return list(self._one_by_one(operations))
        except WorkerError as error:
            return [SendResult(error, 1)] * len(operations)
        done: dict[str, SendResult | None] = dict.fromkeys(existing, _NOTHING_TO_DO)
        creations = [
            o for key, o in writes.items() if key not in existing and o.kind is not OperationKind.UPDATE_INVENTORY
        ]
        updates = [o for key, o in writes.items() if key in existing and o.kind is not OperationKind.ENSURE_CATEGORY]
        for verb, group in (("create", creations), ("update", updates)):
            done |= zip((o.key for o in group), self._jobs.run(*_job(collection, verb, group)), strict=True)
        for operation in creations:
            created = done[operation.key]
            if created and created.error is None:
                self._single.remember(entry_path(operation))
        return with_fallback(operations, [done.get(operation.key) for operation in operations], self._one_by_one)

    def _existing(self, collection: str, writes: Mapping[str, Operation]) -> set[str]:
        """Return the keys of the entries that exist. Raises WorkerError."""
        existing = {key for key, operation in writes.items() if self._single.knows(entry_path(operation))}
        fields = f"fields%5B{_TYPES[collection][0]}%5D=id"
        for literals in _filters(key for key in writes if key not in existing):
            path = f"/api/{collection}?filter=any(ids,%5B{literals}%5D)&{fields}"
            existing |= {external_id(as_text(entry.get("id"))) for entry in iter_resources(self._client, path)}
        for key in existing & writes.keys():
            self._single.remember(entry_path(writes[key]))
        return existing

    def _delete(self, collection: str, operations: list[Operation]) -> list[SendResult]:
        for operation in operations:
            self._single.forget(entry_path(operation))
        return with_fallback(operations, self._jobs.run(*_job(collection, "delete", operations)), self._one_by_one)

    def _delete_stale_variants(self, operations: list[Operation]) -> list[SendResult]:
        """Delete the variants that commercetools no longer has, of all the items at once."""
        found = list(self._executor.map(self._stale_variants, operations))
        stale = {o.key: o for deletions in found if not isinstance(deletions, WorkerError) for o in deletions}
        is_many = len(stale) > self._threshold
        work = self._delete("catalog-variants", [*stale.values()]) if is_many else self._one_by_one([*stale.values()])
        deleted = dict(zip(stale, work, strict=True))
        return [
            SendResult(deletions, 1)
            if isinstance(deletions, WorkerError)
            else SendResult(next((e for o in deletions if (e := deleted[o.key].error)), None), 1 + len(deletions))
            for deletions in found
        ]

    def _stale_variants(self, operation: Operation) -> list[Operation] | WorkerError:
        try:
            return self._single.stale_variants(operation)
        except WorkerError as error:
            return error


def _job(collection: str, verb: str, operations: list[Operation]) -> tuple[BulkJobType, list[JobEntry]]:
    """Return a kind of job and its entries."""
    of_one, of_many = _TYPES[collection]
    entries = [JobEntry(operation.key, orjson.dumps(_resource(of_one, verb, operation))) for operation in operations]
    return BulkJobType(f"{of_one}-bulk-{verb}-job", of_many, MAX_ENTRIES), entries


def _resource(of_one: str, verb: str, operation: Operation) -> Json | None:
    if verb == "delete":
        return {"type": of_one, "id": catalog_id(operation.key)}
    if verb == "create" or operation.kind is OperationKind.UPDATE_INVENTORY:
        return operation.resource
    return update_body(operation)


def _filters(keys: Iterable[str]) -> Iterator[str]:
    """Yield lists of ids for `any(ids,[...])`, percent-encoded, each short enough for a URI."""
    literals = (quote(orjson.dumps(catalog_id(key)), safe="$:") for key in keys)
    chunks = chunked(literals, lambda literal: len(literal) + 1, MAX_FILTER_BYTES, MAX_ENTRIES)
    return map(",".join, chunks)
