"""The plans of products, their stock and their standalone prices. Each reads the whole state of a catalog entry."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain
from typing import TYPE_CHECKING

from worker.commercetools import queries
from worker.enrich.plans import Lookup, category_ids, find_categories, version_fields
from worker.json_access import as_dict, as_key, as_text, unique
from worker.transform.prices import has_standalone_prices
from worker.transform.product_state import all_variants

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence

    from worker.enrich.plans import Plan, PlanContext
    from worker.model import Enriched, Json, Notification


def product_plan(enriched: Enriched, context: PlanContext) -> Plan:
    """Add the product, and the data of its catalog entry."""
    product_id = enriched.notification.resource_id
    yield [(queries.PRODUCTS, [product_id])]
    product = published(context.get(queries.PRODUCTS, product_id))
    return (yield from catalog_entry_plan(enriched, product_id, product, context))


def catalog_entry_plan(enriched: Enriched, product_id: str, product: Json | None, context: PlanContext) -> Plan:
    """Add the data of the catalog entry of a notification's product."""
    enriched = yield from _catalog_data_plan(enriched, product_id, product, context)
    return _with_versions(enriched, enriched.product)


def inventory_entry_plan(enriched: Enriched, context: PlanContext) -> Plan:
    """Add all inventory entries of the sku.

    They show whether the notification's entry exists. An entry that is read by its id only names the sku, because the
    two readings can differ. The product is read only if Klaviyo does not have the variant: see related.py.
    """
    notification = enriched.notification
    sku = yield from _sku_of(notification, queries.INVENTORY, context)
    yield [(queries.INVENTORY_BY_SKU, [sku])]
    entries = context.get_all(queries.INVENTORY_BY_SKU, sku)
    enriched = replace(enriched, sku=sku, inventory={sku: entries})
    own = (entry for entry in entries if as_text(entry.get("id")) == notification.resource_id)
    return _with_versions(enriched, next(own, None))


def standalone_price_plan(enriched: Enriched, context: PlanContext) -> Plan:
    """Add the product that has the sku of the price, with the data of its catalog entry.

    The prices of the sku are written, so they show whether the notification's price exists, and its version.
    """
    price_id = enriched.notification.resource_id
    sku = yield from _sku_of(enriched.notification, queries.STANDALONE_PRICES, context)
    enriched = yield from _with_product_of(sku, replace(enriched, sku=sku), context)
    if (written := enriched.standalone_prices.get(sku)) is None:
        return _with_versions(enriched, context.get(queries.STANDALONE_PRICES, price_id))
    return _with_versions(enriched, next((price for price in written if as_text(price.get("id")) == price_id), None))


def _sku_of(
    notification: Notification, query: queries.Query, context: PlanContext
) -> Generator[Sequence[Lookup], None, str]:
    """Return the sku of the notification's resource; "" if neither the resource nor the notification has one."""
    yield [(query, [notification.resource_id])]
    payload = notification.payload
    sources = (
        context.get(query, notification.resource_id),
        payload,  # of InventoryEntryDeleted and StandalonePriceDeleted
        payload.get("resourceUserProvidedIdentifiers"),
    )
    return next(filter(None, (as_key(as_dict(source).get("sku")) for source in sources)), "")


def _with_product_of(sku: str, enriched: Enriched, context: PlanContext) -> Generator[Sequence[Lookup], None, Enriched]:
    """Add the published product that has a sku, and the data of its catalog entry.

    If no product has the sku any more, this is the product that an earlier reading of the message found: possibly the
    message has written it since it was deleted.
    """
    seen = [name for kind, name in enriched.notification.seen if kind == "product"]
    yield [(queries.PRODUCTS_BY_SKU, [sku]), (queries.PRODUCTS, seen)]
    found = [
        context.get_optional(queries.PRODUCTS_BY_SKU, sku),
        *(context.get(queries.PRODUCTS, name) for name in seen),
    ]
    product = next(filter(None, map(published, found)), None)
    product_id = as_text(as_dict(product).get("id")) or next(iter(seen), "")
    return (yield from _catalog_data_plan(enriched, product_id, product, context))


def _catalog_data_plan(
    enriched: Enriched, product_id: str, product: Json | None, context: PlanContext
) -> Generator[Sequence[Lookup], None, Enriched]:
    """Add a product and the data of its item: its categories, the stock of its variants, their standalone prices."""
    if product is None:
        return replace(enriched, product_id=product_id)
    skus = unique(as_key(variant.get("sku")) for variant in all_variants(product))
    priced_skus = skus if has_standalone_prices(product) else []
    own = category_ids(product)
    seen = [name for kind, name in enriched.notification.seen if kind == "category"]  # usually also the ancestors
    others = [
        (queries.INVENTORY_BY_SKU, skus),
        (queries.STANDALONE_PRICES_BY_SKU, priced_skus),
        (queries.CATEGORIES, seen),
    ]
    categories = yield from find_categories(queries.CATEGORIES, [own], context, others)
    is_shown = all(category in categories for category in own)
    return replace(
        enriched,
        product_id=product_id,
        product=product,
        missing="" if is_shown else "category of the product",
        product_categories={product_id: own},
        categories=categories,
        inventory={**enriched.inventory, **{sku: context.get_all(queries.INVENTORY_BY_SKU, sku) for sku in skus}},
        standalone_prices={sku: context.get_all(queries.STANDALONE_PRICES_BY_SKU, sku) for sku in priced_skus},
    )


def _with_versions(enriched: Enriched, resource: Json | None) -> Enriched:
    """Add the versions of the notification's resource and of everything that the catalog entry is made of."""
    others = {
        "inventory-entry": chain.from_iterable(enriched.inventory.values()),
        "standalone-price": chain.from_iterable(enriched.standalone_prices.values()),
        "category": enriched.categories.values(),
        "product": [] if enriched.product is None else [enriched.product],
    }
    shown = version_fields(enriched.notification, resource, **others)
    shown["missing"] = shown["missing"] or enriched.missing
    if enriched.product_id and enriched.product is None:
        shown["versions"]["product", enriched.product_id] = None
        shown["missing"] = shown["missing"] or "product"
    return replace(enriched, **shown)


def published(product: Json | None) -> Json | None:
    """Return a product if it is published. The current projection of another product is not in the catalog."""
    return None if product is None or product.get("published") is False else product
