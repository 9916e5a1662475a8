"""Product messages -> catalog items and variants, from the current product projection."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import orjson

from worker.json_access import as_dict, as_dicts, as_int, as_text, pick_ids
from worker.model import Json, Operation, OperationKind
from worker.transform import fields
from worker.transform.catalog import catalog_id, category_operation
from worker.transform.prices import catalog_price, price_metadata
from worker.transform.registry import handles

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from worker.mapping import MappingConfig
    from worker.model import Enriched


def _omissions(enriched: Enriched, mapping: MappingConfig) -> Iterator[str]:
    for variant in _variants(as_dict(enriched.product)) if enriched.product else ():
        name = f"variant {as_int(variant.get('id'))}"
        if not as_text(variant.get("sku")):
            yield f"{name}: it has no sku"
        elif as_dicts(variant.get("prices")) and not catalog_price(variant, mapping, enriched.as_of):
            yield f"price of {name}: none fits currency, price.channel, price.country and the time, so 0"


@handles(
    "ProductPublished",
    "ProductUnpublished",
    "ProductDeleted",
    "ResourceDeleted",
    resource="product",
    effect="catalog item + variants upsert, or delete",
    omissions=_omissions,
)
def product_changed(enriched: Enriched, mapping: MappingConfig) -> Iterable[Operation]:
    """Write the current projection of the product. If the product is not published, delete it."""
    if enriched.product is None:
        product_id = enriched.notification.resource_id
        yield Operation(OperationKind.DELETE_STALE_VARIANTS, product_id)
        yield Operation(OperationKind.DELETE_ITEM, product_id)
        return
    yield from product_operations(enriched, mapping)
    yield Operation(
        OperationKind.DELETE_STALE_VARIANTS,
        as_text(enriched.product.get("id")),
        keep_skus=frozenset(_skus(enriched.product)),
    )


def product_operations(enriched: Enriched, mapping: MappingConfig) -> Iterable[Operation]:
    """Yield the operations that write a whole product: its categories, its item and its variants."""
    product = as_dict(enriched.product)
    product_id = as_text(product.get("id"))
    for category in _categories(product_id, enriched):
        yield category_operation(OperationKind.ENSURE_CATEGORY, category, enriched.categories, mapping)
    yield Operation(OperationKind.UPSERT_ITEM, product_id, _item(product, enriched, mapping))
    for variant in _variants(product):
        sku = as_text(variant.get("sku"))
        if sku:
            yield Operation(OperationKind.UPSERT_VARIANT, sku, _variant(product, variant, enriched, mapping))


def available_quantity(entries: Iterable[Json], channel: str) -> int | None:
    """Return the stock in a supply channel, or None if no entry has that channel. "": the stock without a channel."""
    for entry in entries:
        if as_text(as_dict(entry.get("supplyChannel")).get("id")) == channel:
            return as_int(entry.get("availableQuantity"))
    return None


def _variants(product: Json) -> list[Json]:
    return [as_dict(product.get("masterVariant")), *as_dicts(product.get("variants"))]


def _skus(product: Json) -> Iterable[str]:
    return (sku for sku in (as_text(variant.get("sku")) for variant in _variants(product)) if sku)


def _categories(product_id: str, enriched: Enriched) -> list[Json]:
    """Return the categories of a product and their ancestors, parents first."""
    found: dict[str, Json] = {}
    for category_id in enriched.product_categories.get(product_id, ()):
        category = enriched.categories.get(category_id)
        path = [*pick_ids(as_dict(category).get("ancestors")), category_id]
        found |= {entry: enriched.categories[entry] for entry in path if entry in enriched.categories}
    return list(found.values())


def _item(product: Json, enriched: Enriched, mapping: MappingConfig) -> Json:
    product_id = as_text(product.get("id"))
    master = as_dict(product.get("masterVariant"))
    categories = [catalog_id(as_text(category.get("id"))) for category in _categories(product_id, enriched)]
    return {
        "type": "catalog-item",
        "attributes": {"external_id": product_id, **_common(product, master, enriched, mapping)},
        "relationships": {
            "categories": {"data": [{"type": "catalog-category", "id": category} for category in categories]}
        },
    }


def _variant(product: Json, variant: Json, enriched: Enriched, mapping: MappingConfig) -> Json:
    sku = as_text(variant.get("sku"))
    parent = {"type": "catalog-item", "id": catalog_id(as_text(product.get("id")))}
    return {
        "type": "catalog-variant",
        "attributes": {
            "external_id": sku,
            "sku": sku,
            **_common(product, variant, enriched, mapping),
            "inventory_quantity": _stock(variant, enriched, mapping),
            "inventory_policy": 1,
        },
        "relationships": {"item": {"data": parent}},
    }


def _common(product: Json, variant: Json, enriched: Enriched, mapping: MappingConfig) -> Json:
    """Return the attributes that an item and its variants have in common."""
    return {
        "integration_type": "$custom",
        "catalog_type": "$default",
        "published": True,
        "title": fields.localized(product.get("name"), mapping.locale) or as_text(product.get("id")),
        "description": fields.localized(product.get("description"), mapping.locale),
        # Klaviyo requires a url. Without a template it is the text None, as in existing accounts.
        "url": _url(product, variant, mapping) or "None",
        "image_full_url": fields.image_url(variant) or None,  # null removes the image
        "price": catalog_price(variant, mapping, enriched.as_of),
        "custom_metadata": _metadata(product, variant),
    }


def _url(product: Json, variant: Json, mapping: MappingConfig) -> str:
    product_id, template = as_text(product.get("id")), mapping.product_url_template
    return fields.product_url(product.get("slug"), product_id, variant, mapping.locale, template)


def _metadata(product: Json, variant: Json) -> Json:
    """Return all translations and prices as JSON texts, because Klaviyo accepts no nested metadata."""
    prices, currencies = price_metadata(variant)
    texts = {
        "title_json": _by_locale("title", product.get("name")),
        "slug_json": _by_locale("slug", product.get("slug")),
        "price_json": prices,
        "currency_json": currencies,
    }
    return {name: orjson.dumps(value).decode() for name, value in texts.items() if value}


def _by_locale(prefix: str, texts: Any) -> Json:
    return {f"{prefix}_{locale}": text for locale, text in as_dict(texts).items() if as_text(text)}


def _stock(variant: Json, enriched: Enriched, mapping: MappingConfig) -> int:
    """Return the stock in the inventory entries, otherwise in the projection (which can be stale), otherwise 0."""
    channel = mapping.inventory.channel
    in_channel = available_quantity(enriched.inventory.get(as_text(variant.get("sku")), ()), channel)
    availability = as_dict(variant.get("availability"))
    projected = as_dict(as_dict(availability.get("channels")).get(channel)) if channel else availability
    return in_channel if in_channel is not None else as_int(projected.get("availableQuantity")) or 0
