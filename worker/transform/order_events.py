"""Parts of all order events: the operation, its profile and its properties."""

from __future__ import annotations

from decimal import Decimal
from itertools import chain
from typing import TYPE_CHECKING, Any

from worker.errors import Rejected
from worker.json_access import as_dict, as_dicts, as_id, as_int, as_text, unique
from worker.model import Json, Operation, OperationKind
from worker.transform import fields
from worker.transform.prices import price_amount
from worker.transform.size_limits import truncate

if TYPE_CHECKING:
    from collections.abc import Iterator

    from worker.mapping import MappingConfig
    from worker.model import Enriched


def event_operation(
    *, metric: str, unique_id: str, time: str, value: Any, profile: Json, properties: Json
) -> Operation:
    """Return the operation that creates an event. `value` is a commercetools money.

    The operation can be repeated: Klaviyo ignores an event if the profile already has an event with the same metric and
    `unique_id`.
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
    """Return the profile attributes that identify the customer. Raises Rejected if the order has neither of them."""
    found = fields.compact(_identifiers(order, enriched))
    if not found:
        raise Rejected("the order has neither customerEmail nor customerId: an event needs one of them")
    return found


def _identifiers(order: Json, enriched: Enriched) -> Json:
    customer = as_dict(enriched.customer)
    return {
        "email": fields.first_nonempty(as_id(order.get("customerEmail")), as_id(customer.get("email"))),
        "external_id": fields.first_nonempty(as_id(order.get("customerId")), as_id(customer.get("id"))),
    }


def order_properties(order: Json, items: list[Json], enriched: Enriched, mapping: MappingConfig) -> Json:
    """Return the properties of an order event, with the names that Klaviyo's flows and templates use."""
    custom = fields.filter_properties(as_dict(order.get("custom")).get("fields"), mapping.order.custom_fields)
    raw = fields.filter_properties(order, mapping.order.properties) if mapping.order.properties.include else {}
    return fields.compact(raw | custom | fields.compact(_own_properties(order, items, enriched)))


def order_omissions(order: Json, enriched: Enriched, mapping: MappingConfig) -> Iterator[str]:
    """Describe the data of an order that its events leave out."""
    if not order:
        return
    items = items_of(order, enriched, mapping)
    yield from fields.report_empty(_identifiers(order, enriched) | _own_properties(order, items, enriched))
    if without_sku := sum("SKU" not in item for item in items):
        yield f"SKU: {without_sku} of {len(items)} lines have none"
    yield from fields.report_filtered(
        as_dict(order.get("custom")).get("fields"), mapping.order.custom_fields, "order.custom_fields"
    )
    # Raw properties are opt-in, so properties that the mapping does not include are not reported.
    included = mapping.order.properties.include
    raw = order if "*" in included else {name: order[name] for name in included if name in order}
    yield from fields.report_filtered(raw, mapping.order.properties, "order.properties")


def _own_properties(order: Json, items: list[Json], enriched: Enriched) -> Json:
    return {
        "OrderId": as_id(order.get("id")),
        "OrderNumber": as_id(order.get("orderNumber")),
        "ItemNames": unique(item.get("ProductName", "") for item in items),
        "Categories": unique(name for item in items for name in item.get("Categories", ())),
        "Brands": unique(item.get("Brand", "") for item in items),
        "DiscountCode": ", ".join(_discount_codes(order, enriched)),
        "DiscountValue": fields.number(_discount_value(order)),
        "Items": items,
        "BillingAddress": fields.address_properties(order.get("billingAddress")),
        "ShippingAddress": fields.address_properties(order.get("shippingAddress")),
        "ShippingCosts": fields.number(_shipping_costs(order)),
        "TaxTotal": fields.money(as_dict(order.get("taxedPrice")).get("totalTax")),
        "Currency": fields.currency(order.get("totalPrice")),
    }


def items_of(order: Json, enriched: Enriched, mapping: MappingConfig) -> list[Json]:
    """Return the entries of `Items`: first the line items, then the custom line items."""
    items = [_line_item(line, enriched, mapping) for line in as_dicts(order.get("lineItems"))]
    return items + [_custom_line_item(line, mapping) for line in as_dicts(order.get("customLineItems"))]


def _line_item(line: Json, enriched: Enriched, mapping: MappingConfig) -> Json:
    """Return the entry of `Items` for a line item."""
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
            "ItemPrice": price_amount(line.get("price")),
            "RowTotal": fields.money(line.get("totalPrice")),
            "ProductURL": fields.product_url(line.get("productSlug"), product_id, variant, mapping),
            "ImageURL": fields.image_url(variant),
            "Categories": _category_names(product_id, enriched, mapping),
            "Brand": fields.attribute_text(brand, mapping.locale),
        }
    )


def _custom_line_item(line: Json, mapping: MappingConfig) -> Json:
    """Return the entry of `Items` for a custom line item, such as gift wrapping or a fee."""
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
    """Return the sum of the cart discounts on the lines (multiplied by their quantities) and on the total."""
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
    """Return the sum of the shipping costs of all shipping methods, after discounts."""
    infos = [order.get("shippingInfo"), *(entry.get("shippingInfo") for entry in as_dicts(order.get("shipping")))]
    prices = []
    for info in map(as_dict, infos):
        discounted = as_dict(info.get("discountedPrice")).get("value")
        prices.append(discounted if fields.amount(discounted) is not None else info.get("price"))
    return fields.total(prices)
