"""Category messages -> catalog categories. Their names in Klaviyo are their breadcrumbs."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from worker.model import Operation, OperationKind
from worker.transform.catalog import category_operation
from worker.transform.registry import handles

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from worker.mapping import MappingConfig
    from worker.model import Enriched


def _omissions(enriched: Enriched, mapping: MappingConfig) -> Iterator[str]:
    if enriched.descendants and len(enriched.descendants) == mapping.category.max_descendants:
        limit = mapping.category.max_descendants
        yield f"descendants after the first {limit}, if any: limited by category.max_descendants"
    if enriched.related and len(enriched.related) >= mapping.category.max_products:
        yield f"products after the first {mapping.category.max_products}, if any: limited by category.max_products"


@handles(
    "CategoryCreated",
    "ResourceCreated",
    "ResourceUpdated",
    "ResourceDeleted",
    resource="category",
    effect="catalog category upsert (including descendants), or delete",
    omissions=_omissions,
)
def category_changed(enriched: Enriched, mapping: MappingConfig) -> Iterable[Operation]:
    """Upsert the category and its descendants. If commercetools no longer has the category, delete it.

    If it has other ancestors in Klaviyo, the products in it and below it are written as related products.
    """
    category = enriched.category
    if category is None:
        yield Operation(OperationKind.DELETE_CATEGORY, enriched.notification.resource_id)
        return
    has_moved = ("category-products", enriched.notification.resource_id) in enriched.notification.seen
    kind = OperationKind.MOVE_CATEGORY if has_moved else OperationKind.UPSERT_CATEGORY
    own = category_operation(kind, category, enriched.categories, mapping)
    yield replace(own, watches_move=mapping.category.max_products > 0)
    for descendant in enriched.descendants[: mapping.category.max_descendants]:  # their breadcrumbs contain its name
        yield category_operation(OperationKind.UPSERT_CATEGORY, descendant, enriched.categories, mapping)
