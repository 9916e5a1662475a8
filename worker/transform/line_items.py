"""The line items of an order or a cart, as the entries of `Items`."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING

from worker.json_access import as_dict, as_dicts, as_int, as_key, as_text, unique
from worker.transform import fields
from worker.transform.order_totals import line_total
from worker.transform.prices import price_amount

if TYPE_CHECKING:
    from worker.mapping import MappingConfig
    from worker.model import Enriched, Json


def lines_of(order: Json) -> list[Json]:
    """Return the lines of an order or a cart: first the line items, then the custom line items."""
    return [*as_dicts(order.get("lineItems")), *as_dicts(order.get("customLineItems"))]


def items_of(order: Json, enriched: Enriched, mapping: MappingConfig) -> list[Json]:
    """Return the entries of `Items` for an order or a cart, one for each of `lines_of`."""
    locale = text_locale(order, mapping)
    items = [_line_item(line, locale, enriched, mapping) for line in as_dicts(order.get("lineItems"))]
    return items + [_custom_line_item(line, locale, mapping) for line in as_dicts(order.get("customLineItems"))]


def text_locale(order: Json, mapping: MappingConfig) -> str:
    """Return the locale of the texts that the buyer reads: that of the order or cart, else that of the shop."""
    own = as_text(order.get("locale")) if mapping.order.texts == "order" else ""
    return own or mapping.locale


def _line_item(line: Json, locale: str, enriched: Enriched, mapping: MappingConfig) -> Json:
    """Return the entry of `Items` for a line item."""
    variant = as_dict(line.get("variant"))
    product_id = as_text(line.get("productId"))
    return fields.compact(
        {
            "ProductID": product_id,
            "SKU": as_key(variant.get("sku")),
            "VariantID": as_int(variant.get("id")),
            "ProductName": fields.localized(line.get("name"), locale),
            "Quantity": as_int(line.get("quantity")),
            "ItemPrice": price_amount(line.get("price")),
            "RowTotal": fields.money(line_total(line, mapping)),
            "ProductURL": fields.product_url(
                line.get("productSlug"), product_id, variant, locale, mapping.product_url_template
            ),
            "ImageURL": fields.image_url(variant),
            "Categories": _category_names(product_id, enriched, mapping),
            "Brand": _brand(variant, product_id, enriched, mapping),
        }
    )


def _brand(variant: Json, product_id: str, enriched: Enriched, mapping: MappingConfig) -> str:
    """Return the brand of the variant, else of the product, in the shop's locale: see _category_names."""
    own = fields.attribute_text(fields.attribute(variant, mapping.order.brand_attribute), mapping.locale)
    return own or fields.attribute_text(enriched.product_brands.get(product_id), mapping.locale)


def _custom_line_item(line: Json, locale: str, mapping: MappingConfig) -> Json:
    """Return the entry of `Items` for a custom line item, such as gift wrapping or a fee."""
    return fields.compact(
        {
            "ProductID": as_text(line.get("slug")),
            "SKU": as_text(line.get("slug")),
            "ProductName": fields.localized(line.get("name"), locale),
            "Quantity": as_int(line.get("quantity")),
            "ItemPrice": fields.money(line.get("money")),
            "RowTotal": fields.money(line_total(line, mapping)),
        }
    )


def _category_names(product_id: str, enriched: Enriched, mapping: MappingConfig) -> list[str]:
    """Return the breadcrumbs of the product's categories and of each of their ancestors, in the shop's locale.

    Segments and filters compare these names, so they do not depend on the buyer's language.
    """
    ids = enriched.product_categories.get(product_id, ())
    found = [enriched.categories[category_id] for category_id in ids if category_id in enriched.categories]
    crumbs = (fields.breadcrumbs(category, enriched.categories, mapping.locale) for category in found)
    return unique(chain.from_iterable(crumbs))
