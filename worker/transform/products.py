"""Product and standalone price messages -> catalog items and variants, from the current product projection."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import orjson

from worker.errors import Ignored
from worker.json_access import as_dict, as_dicts, as_int, as_key, as_text, pick_ids
from worker.model import Json, Operation, OperationKind
from worker.transform import fields
from worker.transform.catalog import catalog_id, category_operation
from worker.transform.prices import catalog_price, price_metadata, prices_of
from worker.transform.registry import handles
from worker.transform.stock import stock

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from worker.mapping import MappingConfig
    from worker.model import Enriched, Notification

_EFFECT = "catalog item + variants upsert, or delete"


def _omissions(enriched: Enriched, mapping: MappingConfig) -> Iterator[str]:
    product = as_dict(enriched.product)
    written = [variant for _, variant in _variants(product)] if _is_readable(product) else []
    for variant in _all_variants(product) if written else ():
        name = f"variant {as_int(variant.get('id'))}"
        if variant not in written:
            yield f"{name}: it has no sku"
        elif catalog_price(prices_of(product, variant, enriched), mapping, enriched.as_of) is None:
            yield f"price of {name}: none fits currency, price.channel, price.country and the time; 0 if it is created"


def _is_live(notification: Notification, _mapping: MappingConfig) -> None:
    """Raise Ignored if the change is only in the staged projection, or if the product was created unpublished."""
    payload = notification.payload
    updated_prices = as_dicts(payload.get("updatedPrices"))  # of ProductPriceDiscountsSet
    if payload.get("staged") is True or (updated_prices and all(each.get("staged") is True for each in updated_prices)):
        raise Ignored("the change is staged: it becomes visible when the product is published")
    if as_dict(payload.get("productProjection")).get("published") is False:
        raise Ignored("the product is not published")


@handles(
    "ProductPublished",
    "ProductUnpublished",
    "ProductDeleted",
    "ProductCreated",
    "ProductPriceAdded",
    "ProductPriceChanged",
    "ProductPriceRemoved",
    "ProductPricesSet",
    "ProductPriceModeSet",
    "ProductPriceDiscountsSet",
    "ProductPriceExternalDiscountSet",
    "ProductVariantAdded",
    "ProductVariantDeleted",
    "ProductImageAdded",
    "ProductAddedToCategory",
    "ProductRemovedFromCategory",
    "ProductSlugChanged",
    "ResourceDeleted",
    resource="product",
    effect=_EFFECT,
    precheck=_is_live,
    omissions=_omissions,
)
def product_changed(enriched: Enriched, mapping: MappingConfig) -> Iterable[Operation]:
    """Write the current projection of the product. If the product is not published, delete it."""
    if enriched.product is None:
        return product_deletion(enriched.product_id)
    return _whole_product(enriched, mapping)


@handles(
    "StandalonePriceCreated",
    "StandalonePriceDeleted",
    "StandalonePriceValueChanged",
    "StandalonePriceDiscountSet",
    "StandalonePriceExternalDiscountSet",
    "StandalonePriceActiveChanged",
    "StandalonePriceStagedChangesApplied",
    "StandalonePriceValidFromSet",
    "StandalonePriceValidUntilSet",
    "StandalonePriceValidFromAndUntilSet",
    resource="standalone-price",
    effect=_EFFECT,
    precheck=_is_live,
    omissions=_omissions,
)
def standalone_price_changed(enriched: Enriched, mapping: MappingConfig) -> Iterable[Operation]:
    """Write the product that has the price's sku, from its current projection."""
    if not enriched.product_id:
        raise Ignored("no published product has the sku of the price")
    return product_changed(enriched, mapping)


def product_deletion(product_id: str) -> Iterable[Operation]:
    """Yield the operations that delete a product: its item and its variants."""
    yield Operation(OperationKind.DELETE_STALE_VARIANTS, product_id)
    yield Operation(OperationKind.DELETE_ITEM, product_id)


def product_operations(enriched: Enriched, mapping: MappingConfig) -> Iterable[Operation]:
    """Yield the operations that write a whole product: its categories, its item and its variants.

    Raises Ignored if its variants are not in the projection.
    """
    product = as_dict(enriched.product)
    if not _is_readable(product):
        raise Ignored(
            "the projection has no master variant: the project uses the catalog model Modular, which is not supported"
        )
    product_id = as_text(product.get("id"))
    for category in _categories(product_id, enriched):
        yield category_operation(OperationKind.ENSURE_CATEGORY, category, enriched.categories, mapping)
    yield Operation(OperationKind.UPSERT_ITEM, product_id, _item(product, enriched, mapping))
    for sku, variant in _variants(product):
        yield Operation(OperationKind.UPSERT_VARIANT, sku, _variant(sku, product, variant, enriched, mapping))


def _whole_product(enriched: Enriched, mapping: MappingConfig) -> Iterable[Operation]:
    yield from product_operations(enriched, mapping)
    product = as_dict(enriched.product)
    skus = frozenset(sku for sku, _ in _variants(product))
    yield Operation(OperationKind.DELETE_STALE_VARIANTS, as_text(product.get("id")), keep_skus=skus)


def _is_readable(product: Json) -> bool:
    """Return whether a projection contains its variants. Otherwise it does not show which variants the product has."""
    return isinstance(product.get("masterVariant"), dict)


def _all_variants(product: Json) -> list[Json]:
    return [as_dict(product.get("masterVariant")), *as_dicts(product.get("variants"))]


def _variants(product: Json) -> list[tuple[str, Json]]:
    """Return the variants that have a sku, by sku. If none has one, return the master variant by the product's id.

    Klaviyo's price-drop flow needs a variant.
    """
    with_sku = [(sku, variant) for variant in _all_variants(product) if (sku := as_key(variant.get("sku")))]
    return with_sku or [(as_text(product.get("id")), as_dict(product.get("masterVariant")))]


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


def _variant(sku: str, product: Json, variant: Json, enriched: Enriched, mapping: MappingConfig) -> Json:
    parent = {"type": "catalog-item", "id": catalog_id(as_text(product.get("id")))}
    return {
        "type": "catalog-variant",
        "attributes": {
            "external_id": sku,
            "sku": sku,
            **_common(product, variant, enriched, mapping),
            **stock(enriched.inventory.get(sku, ()), mapping),
        },
        "relationships": {"item": {"data": parent}},
    }


def _common(product: Json, variant: Json, enriched: Enriched, mapping: MappingConfig) -> Json:
    """Return the attributes that an item and its variants have in common. `price` is None if no price fits."""
    prices = prices_of(product, variant, enriched)
    return {
        "integration_type": "$custom",
        "catalog_type": "$default",
        "published": True,
        "title": fields.localized(product.get("name"), mapping.locale) or as_text(product.get("id")),
        "description": fields.localized(product.get("description"), mapping.locale),
        # Klaviyo requires a url. Without a template it is the text None, as in existing accounts.
        "url": _url(product, variant, mapping) or "None",
        "image_full_url": fields.image_url(variant) or None,  # null removes the image
        "price": catalog_price(prices, mapping, enriched.as_of),
        "custom_metadata": _metadata(product, *price_metadata(prices, mapping, enriched.as_of)),
    }


def _url(product: Json, variant: Json, mapping: MappingConfig) -> str:
    product_id, template = as_text(product.get("id")), mapping.product_url_template
    return fields.product_url(product.get("slug"), product_id, variant, mapping.locale, template)


def _metadata(product: Json, prices: Json, currencies: Json) -> Json:
    """Return all translations and prices as JSON texts, because Klaviyo accepts no nested metadata."""
    texts = {
        "title_json": _by_locale("title", product.get("name")),
        "slug_json": _by_locale("slug", product.get("slug")),
        "price_json": prices,
        "currency_json": currencies,
    }
    return {name: orjson.dumps(value).decode() for name, value in texts.items() if value}


def _by_locale(prefix: str, texts: Any) -> Json:
    return {f"{prefix}_{locale}": text for locale, text in as_dict(texts).items() if as_text(text)}
