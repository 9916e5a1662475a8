"""Category messages -> catalog categories. Their names in Klaviyo are their breadcrumbs."""

from __future__ import annotations

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
    """Upsert the category and its descendants. If commercetools no longer has the category, delete it."""
    category = enriched.category
    if category is None:
        yield Operation(OperationKind.DELETE_CATEGORY, enriched.notification.resource_id)
        return
    yield category_operation(OperationKind.UPSERT_CATEGORY, category, enriched.categories, mapping)
    for descendant in enriched.descendants[: mapping.category.max_descendants]:  # their breadcrumbs contain its name
        yield category_operation(OperationKind.UPSERT_CATEGORY, descendant, enriched.categories, mapping)
