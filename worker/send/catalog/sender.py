"""The sender for catalog entries: it reads what Klaviyo has, compares, and writes only the differences.

Klaviyo's catalog has no conditional writes and no upsert, and shows no state that can be trusted for long. The sender
therefore reads the entries of each batch, 100 per request, and believes the answer to a write more than the reading.
"""

from __future__ import annotations

from http import HTTPStatus
from threading import Lock
from typing import TYPE_CHECKING

import cachetools

from worker.errors import Rejected, Transient, WorkerError
from worker.model import OperationKind, SendResult
from worker.send.bodies import (
    VARIANT_KINDS,
    attributes_of,
    creation,
    differs,
    has_references,
    related,
    stock_of,
    stock_update,
    update,
)
from worker.send.catalog.batch import (
    CATEGORY_KINDS,
    ITEM_KINDS,
    CatalogBatch,
    has_moved,
    item_of,
    plan_deleted_item,
    plan_deletion,
    plan_item,
)
from worker.send.catalog.memberships import Memberships
from worker.send.catalog.reader import CATEGORIES, CatalogReader, is_missing
from worker.send.catalog.writer import CatalogWriter, Write
from worker.transform.catalog import external_id

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence
    from concurrent.futures import Executor

    from worker.klaviyo.client import KlaviyoClient
    from worker.model import Json, Operation
    from worker.send.jobs import BulkJobs

_CACHE_SIZE, _CACHE_SECONDS = 50_000, 600.0


class CatalogSender:
    """A sender for catalog operations. Safe for many threads.

    It remembers for a while which categories exist, because most products are in the same ones, and the stock that it
    wrote with variants: if that was from an outdated reading, the variant gets the present stock.
    """

    def __init__(self, client: KlaviyoClient, jobs: BulkJobs, executor: Executor, threshold: int) -> None:
        self._executor = executor
        self._reader = CatalogReader(client, executor)
        self._memberships = Memberships(self._reader, executor)
        self._writer = CatalogWriter(client, jobs, self._reader, executor, threshold)
        self._categories: cachetools.TTLCache[str, bool] = cachetools.TTLCache(_CACHE_SIZE, _CACHE_SECONDS)
        self._written_stock: cachetools.TTLCache[str, Json] = cachetools.TTLCache(_CACHE_SIZE, _CACHE_SECONDS)
        self._lock = Lock()

    def send(self, operations: Sequence[Operation]) -> list[SendResult]:
        """Send the operations and return their results in the same order.

        Several operations on one entry come from the same reading of commercetools, so one of them is sent.
        """
        keys = {operation.key for operation in operations if operation.kind is OperationKind.ENSURE_CATEGORY}
        with self._lock:
            remembered = frozenset(key for key in keys if key in self._categories)
        batch = CatalogBatch(operations, remembered)
        batch.read(self._reader)
        # A variant needs its item, and an item its categories. A variant that moves is deleted before it is created.
        self._run(batch, CATEGORY_KINDS, self._category)
        self._run_items(batch)
        self._delete_stale_variants(batch)
        self._run(batch, VARIANT_KINDS, self._variant)
        self._run(batch, {OperationKind.UPDATE_INVENTORY}, self._inventory)
        self._run(batch, {OperationKind.DELETE_ITEM}, plan_deleted_item)
        self._run(batch, {OperationKind.DELETE_VARIANT, OperationKind.DELETE_CATEGORY}, plan_deletion)
        self._run(batch, {OperationKind.MOVE_CATEGORY}, self._moved_category)
        return batch.results_of(operations)

    def _run(
        self,
        batch: CatalogBatch,
        kinds: Collection[OperationKind],
        plan: Callable[[CatalogBatch, Operation], Write | SendResult],
    ) -> None:
        """Plan the operations of some kinds, and send their writes."""
        planned = [plan(batch, operation) for operation in batch.of(kinds)]
        self._write(batch, [write for write in planned if isinstance(write, Write)])
        for operation, result in zip(batch.of(kinds), planned, strict=True):
            if isinstance(result, SendResult):
                batch.conclude(operation, result)

    def _write(self, batch: CatalogBatch, writes: Sequence[Write]) -> None:
        for write, result in zip(writes, self._writer.write(writes), strict=True):
            self._learn(write, result)
            batch.conclude(write.operation, self._judge(batch, write.operation, result))

    def _learn(self, write: Write, result: SendResult) -> None:
        """Remember what the result of a write shows."""
        operation = write.operation
        if write.collection == CATEGORIES:
            self._memberships.forget(operation.key)
        with self._lock:
            match operation.kind:
                case OperationKind.UPSERT_CATEGORY | OperationKind.ENSURE_CATEGORY if result.error is None:
                    self._categories[operation.key] = True
                case OperationKind.DELETE_CATEGORY:
                    self._categories.pop(operation.key, None)
                case OperationKind.UPSERT_VARIANT | OperationKind.ENSURE_VARIANT if result.error is None:
                    stock = stock_of(operation)
                    is_untracked = "inventory_quantity" not in stock
                    if write.verb == "create" or is_untracked or operation.key in self._written_stock:
                        self._written_stock[operation.key] = stock
                case OperationKind.UPDATE_INVENTORY:
                    self._written_stock.pop(operation.key, None)

    def _judge(self, batch: CatalogBatch, operation: Operation, result: SendResult) -> SendResult:
        """Return the result, but no rejection of an entry that refers to one that was only remembered to exist."""
        if not isinstance(result.error, Rejected):
            return result
        categories = {external_id(each) for each in related(operation, "categories")}
        with self._lock:
            for category in categories:
                self._categories.pop(category, None)
        if categories & batch.remembered or (result.error.status == HTTPStatus.NOT_FOUND and has_references(operation)):
            missing = Transient(f"{operation.kind.value}: an entry that it refers to has been deleted")
            return result._replace(error=missing)
        return result

    def _category(self, batch: CatalogBatch, operation: Operation) -> Write | SendResult:
        """Write the breadcrumb, unless the category has moved: then its products have to be written first."""
        if operation.kind is OperationKind.ENSURE_CATEGORY and operation.key in batch.remembered:
            return SendResult(None, 0)
        present = batch.category(operation)
        if isinstance(present, WorkerError):
            return SendResult(present, 1)
        if present is None:
            return Write(operation, "create", creation(operation))
        resource = update(operation)
        if operation.kind is OperationKind.ENSURE_CATEGORY or not differs(resource, present.attributes):
            with self._lock:
                self._categories[operation.key] = True
            return SendResult(None, 1)
        if operation.watches_move and has_moved(present.attributes, attributes_of(operation)):
            return SendResult(None, 1, follow_ups=frozenset({("category-products", operation.key)}))
        return Write(operation, "update", resource)

    def _moved_category(self, batch: CatalogBatch, operation: Operation) -> Write | SendResult:
        """Write the breadcrumb of a category that has moved. It is last, because it shows that the products are done.

        If anything is left to do, the breadcrumb stays: the next attempt sees by it that the category has moved.
        """
        if not batch.is_complete():
            return SendResult(Transient("the products of a category that has moved are not all written yet"), 0)
        present = batch.category(operation)
        if isinstance(present, WorkerError):
            return SendResult(present, 1)
        if present is None:
            return Write(operation, "create", creation(operation))
        return Write(operation, "update", update(operation))

    def _run_items(self, batch: CatalogBatch) -> None:
        """Write items. If the attributes of one are right, its categories are verified."""
        right: list[Operation] = []

        def plan(batch: CatalogBatch, operation: Operation) -> Write | SendResult:
            planned = plan_item(batch, operation)
            if planned is None:
                right.append(operation)
                return SendResult(None, 1)
            return planned

        self._run(batch, ITEM_KINDS, plan)
        hashed = [operation for operation in right if batch.has_category_ids_hash(operation.key)]
        others = [operation for operation in right if not batch.has_category_ids_hash(operation.key)]
        doubtful = [*others, *self._memberships.doubtful(hashed)]
        writes = []
        for operation, needed in zip(doubtful, self._executor.map(self._needs_categories, doubtful), strict=True):
            if isinstance(needed, WorkerError):
                batch.conclude(operation, SendResult(needed, 2))
            elif needed:
                writes.append(Write(operation, "update", update(operation)))
        self._write(batch, writes)

    def _needs_categories(self, operation: Operation) -> bool | WorkerError:
        """Return whether Klaviyo has other categories of an item."""
        try:
            return self._reader.categories_of(operation.key) != set(related(operation, "categories"))
        except WorkerError as error:  # an item that was just deleted is created
            return is_missing(error) or error

    def _delete_stale_variants(self, batch: CatalogBatch) -> None:
        """Delete the variants that commercetools no longer has.

        If it was not asked for all of them, the product is postponed: its messages are processed again, with a reading
        of these SKUs. They can have moved to another product.
        """
        operations = batch.of({OperationKind.DELETE_STALE_VARIANTS})
        stale = {operation.key: batch.stale_variants(operation) for operation in operations}
        deletions = {write.operation.key: write for found in stale.values() for write in found}
        results = dict(zip(deletions, self._writer.write(list(deletions.values())), strict=True))
        for operation in operations:
            skus = (write.operation.key for write in stale[operation.key])
            batch.conclude_stale(operation, {sku: results[sku] for sku in skus})

    def _variant(self, batch: CatalogBatch, operation: Operation) -> Write | SendResult:
        """Create a variant with its stock. Update an existing one without it: stock messages write that."""
        item = item_of(operation)
        if error := batch.error_of_item(item):
            return SendResult(error, 0)
        present = batch.variant_of(item, operation.key)
        if batch.is_postponed(item):
            return _stock_alone(batch, operation, present)
        resource = update(operation, self._stock_in_update(batch, operation))
        if present is None:
            return Write(operation, "create", creation(operation), resource)
        return Write(operation, "update", resource) if differs(resource, present) else SendResult(None, 1)

    def _stock_in_update(self, batch: CatalogBatch, operation: Operation) -> Json:
        """Return the stock that an update of a variant writes. Usually, that is none.

        It is the whole stock if the batch has a stock message of the variant, or if this process wrote another stock
        with the variant. It is the policy if the stock is not tracked: no stock message says so.
        """
        if (stock := batch.stock_updates.get(operation.key)) is not None:
            return stock
        stock = stock_of(operation)
        with self._lock:
            written = self._written_stock.get(operation.key)
        if written is not None and written != stock:
            return stock
        return {} if "inventory_quantity" in stock else stock

    def _inventory(self, batch: CatalogBatch, operation: Operation) -> Write | SendResult:
        """Update the stock of a variant. If Klaviyo has no such variant, ask for its product to be written."""
        present = batch.variant(operation.key)
        if isinstance(present, WorkerError):
            return SendResult(present, 1)
        if present is None:
            return SendResult(None, 1, follow_ups=frozenset({("sku", operation.key)}))
        resource = operation.resource or {}
        needed = differs(resource, present.attributes)
        return Write(operation, "update", resource) if needed else SendResult(None, 1)


def _stock_alone(batch: CatalogBatch, operation: Operation, present: Json | None) -> Write | SendResult:
    """Write the stock of a variant whose product is postponed, if the batch has a stock message of the variant."""
    stock = batch.stock_updates.get(operation.key)
    if stock is None:
        return SendResult(None, 1)
    if present is None:
        return SendResult(None, 1, follow_ups=frozenset({("sku", operation.key)}))
    resource = stock_update(operation, stock)
    return Write(operation, "update", resource) if differs(resource, present) else SendResult(None, 1)
