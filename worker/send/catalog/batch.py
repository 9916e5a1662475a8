"""The catalog operations of a batch: what Klaviyo has of their entries, and their results so far."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from worker.errors import JobUnfinished, WorkerError
from worker.json_access import as_dict
from worker.model import Operation, OperationKind, SendResult
from worker.send.bodies import VARIANT_KINDS, attributes_of, creation, differs, related, update
from worker.send.catalog.reader import CATEGORIES, ITEMS, VARIANTS, Entry
from worker.send.catalog.writer import Write, deletion
from worker.transform.catalog import CATEGORY_IDS_HASH, external_id

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence

    from worker.model import Json
    from worker.send.bulk import OperationId
    from worker.send.catalog.reader import CatalogReader, Found

ITEM_KINDS = frozenset({OperationKind.UPSERT_ITEM, OperationKind.ENSURE_ITEM})
CATEGORY_KINDS = frozenset({OperationKind.UPSERT_CATEGORY, OperationKind.ENSURE_CATEGORY})
_STRONGER = {  # an operation that makes another one on the same entry unnecessary
    OperationKind.ENSURE_CATEGORY: (OperationKind.UPSERT_CATEGORY,),
    OperationKind.ENSURE_ITEM: (OperationKind.UPSERT_ITEM,),
    OperationKind.ENSURE_VARIANT: (OperationKind.UPSERT_VARIANT,),
    OperationKind.UPDATE_INVENTORY: (OperationKind.UPSERT_VARIANT, OperationKind.ENSURE_VARIANT),  # which write it, too
}


class CatalogBatch:
    """The distinct operations of a batch. It belongs to one thread.

    `remembered` are the categories that need not be read, because they existed a short time ago.
    """

    def __init__(self, operations: Sequence[Operation], remembered: frozenset[str]) -> None:
        self._operations = _distinct(operations)
        self.stock_updates = {o.key: attributes_of(o) for o in operations if o.kind is OperationKind.UPDATE_INVENTORY}
        self.remembered = remembered
        self._found: dict[str, Found] = {}
        self._results: dict[OperationId, SendResult] = {}
        self._postponed: set[str] = set()

    def read(self, reader: CatalogReader) -> None:
        """Read what Klaviyo has of the entries."""
        categories, items, variants = set(), set(), set()
        for kind, key in self._operations:
            if kind is OperationKind.ENSURE_CATEGORY:
                categories |= {key} - self.remembered
            elif kind in {OperationKind.UPSERT_CATEGORY, OperationKind.MOVE_CATEGORY}:
                categories.add(key)
            elif kind in ITEM_KINDS | {OperationKind.DELETE_ITEM, OperationKind.DELETE_STALE_VARIANTS}:
                items.add(key)
            elif kind is OperationKind.UPDATE_INVENTORY:
                variants.add(key)
        items |= {item_of(each) for each in self._operations.values() if each.kind in VARIANT_KINDS}
        self._found = reader.read({CATEGORIES: categories, ITEMS: items, VARIANTS: variants})
        stale = self.of({OperationKind.DELETE_STALE_VARIANTS})
        self._postponed = {operation.key for operation in stale if self.unchecked_variants(operation)}

    def of(self, kinds: Collection[OperationKind]) -> list[Operation]:
        """Return the operations of some kinds."""
        return [operation for operation in self._operations.values() if operation.kind in kinds]

    def conclude(self, operation: Operation, result: SendResult) -> None:
        """Set the result of an operation."""
        self._results[operation.kind, operation.key] = result

    def results_of(self, operations: Iterable[Operation]) -> list[SendResult]:
        """Return the results in the order of the operations. An unnecessary operation has that of the stronger one."""
        return [
            next(
                self._results[kind, operation.key]
                for kind in (operation.kind, *_STRONGER.get(operation.kind, ()))
                if (kind, operation.key) in self._results
            )
            for operation in operations
        ]

    def is_complete(self) -> bool:
        """Return whether the operations so far have neither an error nor follow-ups."""
        return not any(result.error or result.follow_ups for result in self._results.values())

    def is_postponed(self, item_key: str) -> bool:
        """Return whether a product must not be written yet: some of its variants in Klaviyo have to be asked for."""
        return item_key in self._postponed

    def category(self, operation: Operation) -> Entry | WorkerError | None:
        """Return the category of an operation; None if Klaviyo does not have it."""
        return self._found[CATEGORIES][operation.key]

    def item(self, key: str) -> Entry | WorkerError | None:
        """Return an item; None if Klaviyo does not have it."""
        return self._found[ITEMS][key]

    def has_category_ids_hash(self, key: str) -> bool:
        """Return whether the metadata of an item in Klaviyo shows the categories that it was last written with."""
        item = self.item(key)
        return isinstance(item, Entry) and CATEGORY_IDS_HASH in as_dict(item.attributes.get("custom_metadata"))

    def error_of_item(self, key: str) -> WorkerError | None:
        """Return the error that prevented reading or writing an item; None if there is none."""
        item = self.item(key)
        if isinstance(item, WorkerError):
            return item
        results = (self._results.get((kind, key)) for kind in ITEM_KINDS)
        return next((result.error for result in results if result and result.error), None)

    def error_of_categories(self, operation: Operation) -> WorkerError | None:
        """Return the error that prevented writing a category of an item; None if there is none."""
        keys = map(external_id, related(operation, "categories"))
        results = (self._results.get((kind, key)) for key in keys for kind in CATEGORY_KINDS)
        return next((result.error for result in results if result and result.error), None)

    def variant_of(self, item_key: str, sku: str) -> Json | None:
        """Return a variant's attributes; None if the item does not have it."""
        item = self.item(item_key)
        return None if item is None or isinstance(item, WorkerError) else item.variants.get(sku)

    def variant(self, sku: str) -> Entry | WorkerError | None:
        """Return the variant of a stock message; None if Klaviyo does not have it."""
        return self._found[VARIANTS][sku]

    def unchecked_variants(self, operation: Operation) -> set[str]:
        """Return the SKUs of an item's stale variants for which commercetools was not asked."""
        item = self.item(operation.key)
        if item is None or isinstance(item, WorkerError):
            return set()
        return item.variants.keys() - operation.keep_skus - operation.checked_skus

    def stale_variants(self, operation: Operation) -> list[Write]:
        """Return the deletions of an item's variants that commercetools does not have, as far as it was asked."""
        item = self.item(operation.key)
        if item is None or isinstance(item, WorkerError):
            return []
        if self.is_postponed(operation.key):
            return []
        stale = item.variants.keys() - operation.keep_skus
        return [deletion(Operation(OperationKind.DELETE_VARIANT, sku)) for sku in sorted(stale)]

    def conclude_stale(self, operation: Operation, results: Mapping[str, SendResult]) -> None:
        """Set the result of the deletion of stale variants. `results` has those of the variants, by SKU.

        The other stale variants are left for the next reading. JobUnfinished precedes other errors.
        """
        item = self.item(operation.key)
        if item is None or isinstance(item, WorkerError):
            self.conclude(operation, SendResult(item, 1))
            return
        for sku, result in results.items():
            if result.error is None:
                del item.variants[sku]
        errors = sorted(
            (result.error for result in results.values() if result.error),
            key=lambda error: not isinstance(error, JobUnfinished),
        )
        follow_ups = frozenset(("sku", sku) for sku in self.unchecked_variants(operation))
        self.conclude(operation, SendResult(next(iter(errors), None), 1 + len(results), follow_ups=follow_ups))


def item_of(operation: Operation) -> str:
    """Return the external id of the item of a variant."""
    return external_id(related(operation, "item")[0])


def plan_item(batch: CatalogBatch, operation: Operation) -> Write | SendResult | None:
    """Return what to do with an item; None if that depends on its categories, which a list does not show."""
    if error := batch.error_of_item(operation.key) or batch.error_of_categories(operation):
        return SendResult(error, 1)
    item = batch.item(operation.key)
    assert not isinstance(item, WorkerError)
    if item is None:
        return Write(operation, "create", creation(operation))
    if operation.kind is OperationKind.ENSURE_ITEM or batch.is_postponed(operation.key):
        return SendResult(None, 1)
    resource = update(operation)
    compared = resource if batch.has_category_ids_hash(operation.key) else _without_hash(resource)
    return Write(operation, "update", resource) if differs(compared, item.attributes) else None


def _without_hash(resource: Json) -> Json:
    """Return an item without the hash of its categories: that Klaviyo's item has none is no difference."""
    attributes = resource["attributes"]
    metadata = as_dict(attributes.get("custom_metadata")).items()
    shown = {name: value for name, value in metadata if name != CATEGORY_IDS_HASH}
    return {"attributes": attributes | {"custom_metadata": shown}}


def plan_deleted_item(batch: CatalogBatch, operation: Operation) -> Write | SendResult:
    """Return the deletion of an item. It keeps variants that are not deleted: Klaviyo would delete them with it."""
    item = batch.item(operation.key)
    if item is None or isinstance(item, WorkerError):
        return SendResult(item, 1)
    return SendResult(None, 1) if item.variants else deletion(operation)


def plan_deletion(_batch: CatalogBatch, operation: Operation) -> Write:
    """Return the deletion of an entry."""
    return deletion(operation)


def has_moved(present: Json, wanted: Json) -> bool:
    """Return whether the ancestors in a category's breadcrumb differ."""
    old, new = (str(each.get("name") or "").rpartition(" > ")[0] for each in (present, wanted))
    return old != new


def _distinct(operations: Sequence[Operation]) -> dict[OperationId, Operation]:
    """Return one operation per kind and key, without those that a stronger one makes unnecessary.

    Operations on one entry come from the same reading of commercetools. Only the SKUs that were asked for can differ.
    """
    distinct: dict[OperationId, Operation] = {}
    for operation in operations:
        name = operation.kind, operation.key
        checked = distinct[name].checked_skus if name in distinct else None
        distinct[name] = replace(operation, checked_skus=operation.checked_skus | checked) if checked else operation
    return {
        (kind, key): operation
        for (kind, key), operation in distinct.items()
        if not any((stronger, key) in distinct for stronger in _STRONGER.get(kind, ()))
    }
