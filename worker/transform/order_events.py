"""What all order events share: the profile, the properties, the operation."""

from __future__ import annotations

from decimal import Decimal
from itertools import chain
from typing import TYPE_CHECKING, Any

from worker.errors import Rejected
from worker.json_access import as_dict, as_dicts, as_int, as_text, unique
from worker.model import Json, Operation, OperationKind
from worker.transform import fields
from worker.transform.fields import product_url
from worker.transform.size_limits import truncate

if TYPE_CHECKING:
    from collections.abc import Iterator

    from worker.mapping import MappingConfig
    from worker.model import Enriched


def event_operation(
    *, metric: str, unique_id: str, time: str, value: Any, profile: Json, properties: Json
) -> Operation:
    """Return the operation that records one event. `value` is a commercetools money.

    `unique_id` makes a repeated event harmless: Klaviyo keeps the first per profile and metric.
    """
    fitted, truncated = truncate(properties)
    attributes = fields.compact(
        {
            "time": time,
            "value": fields.money(value),
            "value_currency": fields.currency(value),
            "unique_id": unique_id,
            "metric": {"data": {"type": "metric", "attributes": {"name": metric}}},
            "profile": {"data": {"type": "profile", "attributes": profile}},
        }
    )
    resource = {"type": "event", "attributes": {"properties": fitted, **attributes}}
    key = "\0".join((metric, unique_id, *(str(profile.get(name)) for name in ("email", "external_id"))))
    return Operation(OperationKind.CREATE_EVENT, key, resource, truncated=truncated)


def identifiers(order: Json, enriched: Enriched) -> Json:
    """Return whose event it is. Raises Rejected when the order names nobody."""
    known = fields.compact(_identifiers(order, enriched))
    if not known:
        raise Rejected("the order has neither customerEmail nor customerId: Klaviyo cannot tell whose event it is")
    return known


def _identifiers(order: Json, enriched: Enriched) -> Json:
    customer = as_dict(enriched.customer)
    return {
        "email": fields.first_nonempty(as_text(order.get("customerEmail")), as_text(customer.get("email"))),
        "external_id": fields.first_nonempty(as_text(order.get("customerId")), as_text(customer.get("id"))),
    }


def order_properties(order: Json, lines: list[Json], enriched: Enriched, mapping: MappingConfig) -> Json:
    """Return the properties of every order event, as Klaviyo's flows and templates name them."""
    custom = fields.filter_properties(as_dict(order.get("custom")).get("fields"), mapping.order.custom_fields)
    raw = fields.filter_properties(order, mapping.order.properties) if mapping.order.properties.include else {}
    return fields.compact(raw | custom | fields.compact(_own_properties(order, lines, enriched)))


def omissions(order: Json, enriched: Enriched, mapping: MappingConfig) -> Iterator[str]:
    """Tell what order events do without."""
    if not order:
        return
    lines = all_line_properties(order, enriched, mapping)
    yield from fields.report_empty(_identifiers(order, enriched) | _own_properties(order, lines, enriched))
    if lacking := sum("SKU" not in line for line in lines):
        yield f"SKU: {lacking} of {len(lines)} lines have none"
    yield from fields.report_filtered(
        as_dict(order.get("custom")).get("fields"), mapping.order.custom_fields, "order.custom_fields"
    )
    wanted = mapping.order.properties.include  # of the raw ones, what is not named there is not missed
    raw = order if "*" in wanted else {name: order[name] for name in wanted if name in order}
    yield from fields.report_filtered(raw, mapping.order.properties, "order.properties")


def _own_properties(order: Json, lines: list[Json], enriched: Enriched) -> Json:
    return {
        "OrderId": as_text(order.get("id")),
        "OrderNumber": as_text(order.get("orderNumber")),
        "ItemNames": unique(line.get("ProductName", "") for line in lines),
        "Categories": unique(name for line in lines for name in line.get("Categories", ())),
        "Brands": unique(line.get("Brand", "") for line in lines),
        "DiscountCode": ", ".join(_discount_codes(order, enriched)),
        "DiscountValue": fields.number(_discount_value(order)),
        "Items": lines,
        "BillingAddress": fields.address_properties(order.get("billingAddress")),
        "ShippingAddress": fields.address_properties(order.get("shippingAddress")),
        "ShippingCosts": fields.number(_shipping_costs(order)),
        "TaxTotal": fields.money(as_dict(order.get("taxedPrice")).get("totalTax")),
        "Currency": fields.currency(order.get("totalPrice")),
    }


def all_line_properties(order: Json, enriched: Enriched, mapping: MappingConfig) -> list[Json]:
    """Return the entries of `Items`: line items, then custom line items."""
    lines = [line_properties(line, enriched, mapping) for line in as_dicts(order.get("lineItems"))]
    return lines + [custom_line_properties(line, mapping) for line in as_dicts(order.get("customLineItems"))]


def line_properties(line: Json, enriched: Enriched, mapping: MappingConfig) -> Json:
    """Return a line item as an entry of `Items`."""
    variant = as_dict(line.get("variant"))
    product_id = as_text(line.get("productId"))
    brand = fields.attribute(variant, mapping.order.brand_attribute)
    return fields.compact(
        {
            "ProductID": product_id,
            "SKU": as_text(variant.get("sku")),
            "VariantID": as_int(variant.get("id")),
            "ProductName": fields.localized(line.get("name"), mapping.locale),
            "Quantity": as_int(line.get("quantity")),
            "ItemPrice": _item_price(line),
            "RowTotal": fields.money(line.get("totalPrice")),
            "ProductURL": product_url(line.get("productSlug"), product_id, variant, mapping),
            "ImageURL": fields.image_url(variant),
            "Categories": _category_names(product_id, enriched, mapping),
            "Brand": fields.attribute_text(brand, mapping.locale),
        }
    )


def custom_line_properties(line: Json, mapping: MappingConfig) -> Json:
    """Return a custom line item (gift wrapping, a fee) as an entry of `Items`."""
    return fields.compact(
        {
            "ProductID": as_text(line.get("slug")),
            "SKU": as_text(line.get("slug")),
            "ProductName": fields.localized(line.get("name"), mapping.locale),
            "Quantity": as_int(line.get("quantity")),
            "ItemPrice": fields.money(line.get("money")),
            "RowTotal": fields.money(line.get("totalPrice")),
        }
    )


def _item_price(line: Json) -> float | None:
    price = as_dict(line.get("price"))
    discounted = fields.money(as_dict(price.get("discounted")).get("value"))
    return fields.money(price.get("value")) if discounted is None else discounted


def _category_names(product_id: str, enriched: Enriched, mapping: MappingConfig) -> list[str]:
    """Return the breadcrumbs of the product's categories and of each of their ancestors."""
    ids = enriched.product_categories.get(product_id, ())
    found = [enriched.categories[category_id] for category_id in ids if category_id in enriched.categories]
    crumbs = (fields.breadcrumbs(category, enriched.categories, mapping.locale) for category in found)
    return unique(chain.from_iterable(crumbs))


def _discount_codes(order: Json, enriched: Enriched) -> list[str]:
    references = [as_dict(info.get("discountCode")) for info in as_dicts(order.get("discountCodes"))]
    return unique(enriched.discount_codes.get(as_text(ref.get("id")), "") for ref in references)


def _discount_value(order: Json) -> Decimal | None:
    """Add up what cart discounts took off the lines, times quantity, and off the total."""
    lines = [*as_dicts(order.get("lineItems")), *as_dicts(order.get("customLineItems"))]
    parts = [
        discount * (as_int(part.get("quantity")) or 0)
        for line in lines
        for part in as_dicts(line.get("discountedPricePerQuantity"))
        for included in as_dicts(as_dict(part.get("discountedPrice")).get("includedDiscounts"))
        if (discount := fields.amount(included.get("discountedAmount"))) is not None
    ]
    on_total = fields.amount(as_dict(order.get("discountOnTotalPrice")).get("discountedAmount"))
    parts += [] if on_total is None else [on_total]
    return sum(parts, Decimal(0)) if parts else None


def _shipping_costs(order: Json) -> Decimal | None:
    """Return what shipping costs after discounts, over all shipping methods."""
    infos = [order.get("shippingInfo"), *(entry.get("shippingInfo") for entry in as_dicts(order.get("shipping")))]
    prices = []
    for info in map(as_dict, infos):
        discounted = as_dict(info.get("discountedPrice")).get("value")
        prices.append(discounted if fields.amount(discounted) is not None else info.get("price"))
    return fields.total(prices)
