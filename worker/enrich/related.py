"""Resources that a message has to write besides its own one.

A write to Klaviyo can show that more has to be written: the product of a SKU whose variant is missing, the product to
which a SKU has moved, the products of a category that has moved. It names them as follow-ups, and the message is
processed again. The resources that an earlier reading of the message found are read again, too: if one is gone, the
message has possibly written it after another worker had deleted it.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from typing import TYPE_CHECKING

from worker.commercetools import queries
from worker.enrich.products import catalog_entry_plan, published
from worker.json_access import as_text
from worker.model import Enriched, Notification

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Sequence

    from worker.enrich.plans import Lookup, Plan, PlanContext
    from worker.model import Json, ResourceKey


def with_related(plan: Callable[[Enriched, PlanContext], Plan]) -> Callable[[Enriched, PlanContext], Plan]:
    """Return a plan that also adds what is related to the resource."""

    def extended(enriched: Enriched, context: PlanContext) -> Plan:
        enriched = yield from plan(enriched, context)
        if not enriched.notification.seen:
            return enriched
        enriched = yield from _with_gone_categories(enriched, context)
        products = yield from _related_products(enriched, context)
        related = yield from _together(
            catalog_entry_plan(_enriched_for(product_id, enriched), product_id, product, context)
            for product_id, product in products.items()
        )
        if not related:
            return enriched
        versions: dict[ResourceKey, int | None] = dict(enriched.versions)
        missing = enriched.missing
        for each in related:
            versions |= each.versions
            missing = missing or each.missing
        return replace(enriched, related=related, versions=versions, missing=missing)

    return extended


def _related_products(
    enriched: Enriched, context: PlanContext
) -> Generator[Sequence[Lookup], None, dict[str, Json | None]]:
    """Return the related products by id; None for one that is not published any more."""
    seen: dict[str, list[str]] = defaultdict(list)
    for kind, name in enriched.notification.seen:
        seen[kind].append(name)
    moved = seen["category-products"] and [*seen["category-products"], *_ids(enriched.descendants)]
    limit = context.mapping.category.max_products
    own = enriched.product_id or enriched.notification.resource_id
    ids = [product_id for product_id in seen["product"] if product_id != own]
    yield [(queries.PRODUCTS_BY_SKU, seen["sku"]), (queries.PRODUCTS, ids), (queries.PRODUCTS_BY_CATEGORY, moved)]
    found: dict[str, Json | None] = dict.fromkeys(ids)
    found |= _by_id(context.get(queries.PRODUCTS, product_id) for product_id in ids)
    found |= _by_id(context.get_optional(queries.PRODUCTS_BY_SKU, sku) for sku in seen["sku"])
    in_moved = _by_id(each for category in moved for each in context.get_all(queries.PRODUCTS_BY_CATEGORY, category))
    found |= dict(sorted(in_moved.items())[:limit])
    found.pop(own, None)
    return found


def _with_gone_categories(enriched: Enriched, context: PlanContext) -> Plan:
    """Add the categories that an earlier reading found and that are gone now."""
    known = {name for kind, name in enriched.versions if kind == "category"}
    seen = [name for kind, name in enriched.notification.seen if kind == "category" and name not in known]
    yield [(queries.CATEGORIES, seen)]
    gone = [category for category in seen if context.get(queries.CATEGORIES, category) is None]
    if not gone:
        return enriched
    versions = {**enriched.versions, **{("category", category): None for category in gone}}
    return replace(enriched, versions=versions, missing=enriched.missing or "category")


def _together(plans: Iterable[Plan]) -> Generator[Sequence[Lookup], None, list[Enriched]]:
    """Run plans in step and return their results in order."""
    running = list(plans)
    results: dict[int, Enriched] = {}
    while len(results) < len(running):
        lookups: list[Lookup] = []
        for index, plan in enumerate(running):
            if index not in results:
                try:
                    lookups += next(plan)
                except StopIteration as end:
                    results[index] = end.value
        yield lookups
    return [results[index] for index in range(len(running))]


def _enriched_for(product_id: str, enriched: Enriched) -> Enriched:
    seen = enriched.notification.seen
    notification = Notification("ResourceUpdated", "product", product_id, None, {}, seen)
    return Enriched(notification, enriched.as_of)


def _by_id(products: Iterable[Json | None]) -> dict[str, Json]:
    return {as_text(product.get("id")): product for product in map(published, products) if product is not None}


def _ids(resources: Iterable[Json]) -> list[str]:
    return [as_text(resource.get("id")) for resource in resources]
