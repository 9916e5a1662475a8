"""Product and standalone price messages -> catalog items and variants, from the current product projection."""

from __future__ import annotations

from typing import TYPE_CHECKING

from worker.errors import Ignored
from worker.json_access import as_dict, as_dicts, as_int
from worker.transform.prices import CurrentPrices, prices_of
from worker.transform.product_state import all_variants, is_readable, product_state, variants_by_sku
from worker.transform.registry import handles

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from worker.mapping import MappingConfig
    from worker.model import Enriched, Notification, Operation

_EFFECT = "catalog item + variants upsert, or delete"


def _omissions(enriched: Enriched, mapping: MappingConfig) -> Iterator[str]:
    product = as_dict(enriched.product)
    written = [variant for _, variant in variants_by_sku(product)] if is_readable(product) else []
    for variant in all_variants(product) if written else ():
        name = f"variant {as_int(variant.get('id'))}"
        if variant not in written:
            yield f"{name}: it has no sku"
            continue
        prices = prices_of(product, variant, enriched.standalone_prices)
        if CurrentPrices(prices, mapping, enriched.as_of).catalog_price() is None:
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
    return product_state(enriched, mapping)


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
