"""Parts of all order events: the operation, its profile and its properties."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from worker.json_access import as_dict, as_dicts, as_id, as_text, unique
from worker.model import Json, Operation, OperationKind
from worker.transform import fields
from worker.transform.identity import describe_identifiers
from worker.transform.line_items import items_of, lines_of
from worker.transform.order_totals import discount_value, shipping_costs, tax_total
from worker.transform.region import country_of, store_of
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


def order_properties(order: Json, items: list[Json], enriched: Enriched, mapping: MappingConfig) -> Json:
    """Return the properties of an order event, with the names that Klaviyo's flows and templates use."""
    custom = fields.custom_properties(order, mapping.order.custom_fields, mapping.locale)
    raw = fields.filter_properties(order, mapping.order.properties) if mapping.order.properties.include else {}
    return fields.compact(raw | custom | fields.compact(_own_properties(order, items, enriched, mapping)))


def order_omissions(order: Json, enriched: Enriched, mapping: MappingConfig) -> Iterator[str]:
    """Describe the data of an order that its events leave out."""
    if not order:
        return
    items = items_of(order, enriched, mapping)
    found = describe_identifiers(order, enriched) | _own_properties(order, items, enriched, mapping)
    yield from fields.report_empty(found)
    if without_sku := sum("SKU" not in item for item in items):
        yield f"SKU: {without_sku} of {len(items)} lines have none"
    yield from fields.report_filtered(
        as_dict(order.get("custom")).get("fields"), mapping.order.custom_fields, "order.custom_fields"
    )
    # Raw properties are opt-in, so properties that the mapping does not include are not reported.
    included = mapping.order.properties.include
    raw = order if "*" in included else {name: order[name] for name in included if name in order}
    yield from fields.report_filtered(raw, mapping.order.properties, "order.properties")


def _own_properties(order: Json, items: list[Json], enriched: Enriched, mapping: MappingConfig) -> Json:
    return {
        "OrderId": as_id(order.get("id")),
        "OrderNumber": as_id(order.get("orderNumber")),
        "ItemNames": unique(item.get("ProductName", "") for item in items),
        "Categories": unique(name for item in items for name in item.get("Categories", ())),
        "Brands": unique(item.get("Brand", "") for item in items),
        "DiscountCode": ", ".join(_discount_codes(order, enriched)),
        "DiscountValue": fields.number(discount_value(order, lines_of(order))),
        "Items": items,
        "BillingAddress": fields.address_properties(order.get("billingAddress")),
        "ShippingAddress": fields.address_properties(order.get("shippingAddress")),
        "ShippingCosts": fields.number(shipping_costs(order, mapping)),
        "TaxTotal": fields.number(tax_total(order)),
        "Currency": fields.currency(order.get("totalPrice")),
        "Store": store_of(order),
        "Country": country_of(order),
    }


def _discount_codes(order: Json, enriched: Enriched) -> list[str]:
    references = [as_dict(info.get("discountCode")) for info in as_dicts(order.get("discountCodes"))]
    return unique(enriched.discount_codes.get(as_text(ref.get("id")), "") for ref in references)
