"""The state of a product in Klaviyo's catalog: its categories, its item and its variants."""

from __future__ import annotations

from hashlib import sha256
from typing import TYPE_CHECKING, Any

import orjson

from worker.errors import Ignored
from worker.json_access import as_dict, as_dicts, as_key, as_text, pick_ids
from worker.model import Json, Operation, OperationKind
from worker.transform import fields
from worker.transform.catalog import CATEGORY_IDS_HASH, catalog_id, category_operation
from worker.transform.prices import CurrentPrices, prices_of
from worker.transform.stock import stock

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from worker.mapping import MappingConfig
    from worker.model import Enriched


def product_state(enriched: Enriched, mapping: MappingConfig) -> Iterator[Operation]:
    """Yield the operations that make Klaviyo's item and variants equal to the product. None: it is not published.

    Variants that commercetools does not have are deleted if their SKUs were looked up. Raises Ignored if the
    projection does not contain the product's variants.
    """
    product_id, skus = enriched.product_id, frozenset[str]()
    if enriched.product is not None:
        yield from _product_operations(enriched, mapping)
        skus = frozenset(sku for sku, _ in variants_by_sku(enriched.product))
    checked = frozenset(name for kind, name in enriched.notification.seen if kind == "sku")
    yield Operation(OperationKind.DELETE_STALE_VARIANTS, product_id, keep_skus=skus, checked_skus=checked)
    if enriched.product is None:
        yield Operation(OperationKind.DELETE_ITEM, product_id)


def _product_operations(enriched: Enriched, mapping: MappingConfig) -> Iterable[Operation]:
    """Yield the operations that write a whole product: its categories, its item and its variants.

    Raises Ignored if its variants are not in the projection.
    """
    product = as_dict(enriched.product)
    if not is_readable(product):
        raise Ignored(
            "the projection has no master variant: the project uses the catalog model Modular, which is not supported"
        )
    product_id = as_text(product.get("id"))
    categories = _categories(product_id, enriched)
    for category in categories:
        yield category_operation(OperationKind.ENSURE_CATEGORY, category, enriched.categories, mapping)
    shared, metadata = _shared(product, mapping), _translations(product)
    written = [
        (sku, variant, _attributes(shared, metadata, variant, enriched, mapping))
        for sku, variant in variants_by_sku(product)
    ]
    without_price = sum(own["price"] is None for _, _, own in written)
    gaps = ["price"] * without_price + ["sku"] * (len(all_variants(product)) - len(written))
    master = product["masterVariant"]
    of_master = next((own for _, variant, own in written if variant is master), None)
    item = _item(product_id, master, of_master or _attributes(shared, metadata, master, enriched, mapping), categories)
    yield Operation(OperationKind.UPSERT_ITEM, product_id, item, gaps=gaps)
    for sku, _, own in written:
        yield Operation(OperationKind.UPSERT_VARIANT, sku, _variant(sku, product_id, own, enriched, mapping))


def is_readable(product: Json) -> bool:
    """Return whether a projection contains its variants. Otherwise it does not show which variants the product has."""
    return isinstance(product.get("masterVariant"), dict)


def all_variants(product: Json) -> list[Json]:
    """Return the variants of a projection, the master variant first."""
    return [as_dict(product.get("masterVariant")), *as_dicts(product.get("variants"))]


def variants_by_sku(product: Json) -> list[tuple[str, Json]]:
    """Return the variants that have a sku, by sku. If none has one, return the master variant by the product's id.

    Klaviyo's price-drop flow needs a variant.
    """
    with_sku = [(sku, variant) for variant in all_variants(product) if (sku := as_key(variant.get("sku")))]
    return with_sku or [(as_text(product.get("id")), as_dict(product.get("masterVariant")))]


def _categories(product_id: str, enriched: Enriched) -> list[Json]:
    """Return the categories of a product and their ancestors, parents first."""
    found: dict[str, Json] = {}
    for category_id in enriched.product_categories.get(product_id, ()):
        category = enriched.categories.get(category_id)
        path = [*pick_ids(as_dict(category).get("ancestors")), category_id]
        found |= {entry: enriched.categories[entry] for entry in path if entry in enriched.categories}
    return list(found.values())


def _item(product_id: str, master: Json, attributes: Json, categories: Iterable[Json]) -> Json:
    """Return the item. Its metadata has a hash of its categories, because no list of items in Klaviyo shows them."""
    ids = [as_text(category.get("id")) for category in categories]
    related = {"categories": {"data": [{"type": "catalog-category", "id": catalog_id(category)} for category in ids]}}
    metadata = attributes["custom_metadata"] | {CATEGORY_IDS_HASH: _hash(ids)}
    own = {
        "external_id": product_id,
        **attributes,
        "custom_metadata": metadata,
        "images": fields.image_urls(master),
    }
    return {"type": "catalog-item", "attributes": own, "relationships": related}


def _variant(sku: str, product_id: str, attributes: Json, enriched: Enriched, mapping: MappingConfig) -> Json:
    related = {"item": {"data": {"type": "catalog-item", "id": catalog_id(product_id)}}}
    own = {"external_id": sku, "sku": sku, **attributes, **stock(enriched.inventory.get(sku, ()), mapping)}
    return {"type": "catalog-variant", "attributes": own, "relationships": related}


def _shared(product: Json, mapping: MappingConfig) -> Json:
    """Return the attributes that the item has in common with all its variants."""
    return {
        "integration_type": "$custom",
        "catalog_type": "$default",
        "published": True,
        "title": fields.localized(product.get("name"), mapping.locale) or as_text(product.get("id")),
        "description": fields.localized(product.get("description"), mapping.locale),
    }


def _translations(product: Json) -> Json:
    """Return the metadata that the item has in common with all its variants."""
    titles, slugs = _by_locale("title", product.get("name")), _by_locale("slug", product.get("slug"))
    return _texts(title_json=titles, slug_json=slugs)


def _attributes(shared: Json, metadata: Json, variant: Json, enriched: Enriched, mapping: MappingConfig) -> Json:
    """Return the attributes of a variant, or of the item if it is the master variant. Both have the same names.

    `price` is None if no price fits.
    """
    product = as_dict(enriched.product)
    prices = CurrentPrices(prices_of(product, variant, enriched.standalone_prices), mapping, enriched.as_of)
    amounts, currencies = prices.metadata()
    return shared | {
        # Klaviyo requires a url. Without a template it is the text None, as in existing accounts.
        "url": _url(product, variant, mapping) or "None",
        "image_full_url": fields.image_url(variant) or None,  # null removes the image
        "price": prices.catalog_price(),
        "custom_metadata": metadata | _texts(price_json=amounts, currency_json=currencies),
    }


def _url(product: Json, variant: Json, mapping: MappingConfig) -> str:
    product_id, template = as_text(product.get("id")), mapping.product_url_template
    return fields.product_url(product.get("slug"), product_id, variant, mapping.locale, template)


def _hash(ids: Iterable[str]) -> str:
    """Return a short text that differs for different sets of ids. All ids could exceed Klaviyo's limit of 100 KB."""
    return sha256("\n".join(sorted(ids)).encode()).hexdigest()[:32]


def _texts(**values: Json) -> Json:
    """Return the values that are not empty as JSON texts, because Klaviyo accepts no nested metadata."""
    return {name: orjson.dumps(value).decode() for name, value in values.items() if value}


def _by_locale(prefix: str, texts: Any) -> Json:
    return {f"{prefix}_{locale}": text for locale, text in as_dict(texts).items() if as_text(text)}
