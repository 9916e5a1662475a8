"""Operations that a message needs besides those on its own resource: related products, and gone categories."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING

from worker.errors import Ignored
from worker.model import Operation, OperationKind
from worker.transform.product_state import product_state

if TYPE_CHECKING:
    from collections.abc import Iterator

    from worker.mapping import MappingConfig
    from worker.model import Enriched

_ENSURED = {
    OperationKind.UPSERT_ITEM: OperationKind.ENSURE_ITEM,
    OperationKind.UPSERT_VARIANT: OperationKind.ENSURE_VARIANT,
}


def related_operations(enriched: Enriched, mapping: MappingConfig) -> Iterator[Operation]:
    """Yield the operations that write related products, and delete the categories that are gone.

    The products of a category that has moved are updated. Of others, only what is missing is created: what exists is
    written by their own messages, which possibly were later.
    """
    of_category = enriched.notification.resource_type == "category"
    for product in enriched.related:
        with suppress(Ignored):  # a product that cannot be written; its own message says why
            for operation in product_state(product, mapping):
                kind = operation.kind if of_category else _ENSURED.get(operation.kind, operation.kind)
                yield replace(operation, kind=kind)
    for (resource_type, name), version in enriched.versions.items():
        if resource_type == "category" and version is None and name != enriched.notification.resource_id:
            yield Operation(OperationKind.DELETE_CATEGORY, name)
