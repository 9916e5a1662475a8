"""Parts of all order events: the operation, its time, its profile and its properties."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from worker.budget import check_copies
from worker.errors import Ignored
from worker.json_access import as_dict, as_dicts, as_id, as_text, parse_time, unique
from worker.model import Json, Operation, OperationKind
from worker.transform import addresses, fields
from worker.transform.identity import describe_identifiers, identifiers
from worker.transform.line_items import items_of, lines_of
from worker.transform.order_totals import (
    applied_codes,
    discount_value,
    order_total,
    shipping_costs,
    shipping_infos,
    tax_total,
)
from worker.transform.region import country_of, store_of
from worker.transform.size_limits import EVENT_BYTES, own_first, truncate

if TYPE_CHECKING:
    from collections.abc import Iterator

    from worker.mapping import MappingConfig
    from worker.model import Enriched

_EARLIEST = datetime(1991, 1, 1, tzinfo=UTC)  # Klaviyo: "must be after the year 1990"
_DAY = timedelta(days=1)
_RFC_3339 = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|[+-]\d\d:\d\d)")


def order_of(enriched: Enriched) -> Json:
    """Return the order. Raises Ignored if commercetools no longer has it."""
    if enriched.order is None:
        raise Ignored("commercetools no longer has the order")
    return enriched.order


def order_id(enriched: Enriched) -> str:
    """Return the id of the order of an order message."""
    return as_id(as_dict(enriched.order).get("id")) or enriched.notification.resource_id


def order_event(
    enriched: Enriched,
    mapping: MappingConfig,
    *,
    metric: str,
    unique_id: str = "",
    value: Any = None,
    properties: Json | None = None,
    more: Json | None = None,
) -> Operation:
    """Return the operation for an event about an order at the time of the message.

    The defaults are the order's id, its total and its properties. `more` are further properties. Raises Ignored or
    Rejected as order_of and identifiers do.
    """
    order = order_of(enriched)
    return event_operation(
        metric=metric,
        unique_id=unique_id or order_id(enriched),
        time=event_time(enriched, enriched.notification.time, order.get("createdAt")),
        value=order_total(order, mapping) if value is None else value,
        profile=identifiers(order, enriched, mapping),
        properties=own_first(more or {}, shared_properties(enriched, mapping) if properties is None else properties),
    )


def shared_properties(enriched: Enriched, mapping: MappingConfig, copies: int = 1) -> Json:
    """Return the properties of the order for `copies` events, which together are as large as one event can be.

    Raises Rejected if there are too many copies.
    """
    check_copies(copies)
    order = order_of(enriched)
    properties = order_properties(order, items_of(order, enriched, mapping), enriched, mapping)
    return properties if copies <= 1 else truncate(properties, EVENT_BYTES // copies)[0]


def event_time(enriched: Enriched, *candidates: Any) -> str:
    """Return the first candidate that can be the time of an event, or "": then Klaviyo uses the time of receipt.

    Klaviyo rejects an event of an impossible time, and the year 1 or 2099 only means that no time was set. The future
    is what is more than a day later than the reading of commercetools.
    """
    for candidate in candidates:
        moment = parse_time(candidate)
        if moment is not None and _EARLIEST <= moment <= enriched.as_of + _DAY:
            text = as_text(candidate)
            return text if _RFC_3339.fullmatch(text) else moment.isoformat()
    return ""


def placed_at(order: Json, enriched: Enriched) -> str:
    """Return when an order was placed. An imported order says so in completedAt, others are completed later."""
    completed_at = order.get("completedAt") if _is_imported(order, enriched) else None
    return event_time(enriched, completed_at, order.get("createdAt"), enriched.notification.time)


def is_in_the_past(order: Json, enriched: Enriched, mapping: MappingConfig) -> bool:
    """Return whether an order is imported from the past, so that its events must start no flow.

    `order.imports` decides. With "auto", an order is in the past if it was completed more than a day before its import.
    """
    imports, notification = mapping.order.imports, enriched.notification
    if imports != "auto" or not _is_imported(order, enriched):
        return imports == "backfill" and _is_imported(order, enriched)
    imported_at = notification.time if notification.type == "OrderImported" else order.get("createdAt")
    completed, imported = parse_time(order.get("completedAt")), parse_time(imported_at)
    return completed is not None and imported is not None and imported - completed > _DAY


def _is_imported(order: Json, enriched: Enriched) -> bool:
    """Return whether an order is imported from another system. Later messages do not say so, but its times do."""
    completed, created = parse_time(order.get("completedAt")), parse_time(order.get("createdAt"))
    return enriched.notification.type == "OrderImported" or bool(completed and created and completed < created)


def event_operation(
    *,
    metric: str,
    unique_id: str,
    time: str,
    value: Any,
    profile: Json,
    properties: Json,
    backfill: bool = False,
) -> Operation:
    """Return the operation that creates an event. `value` is a commercetools money. `backfill` events start no flow.

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
    if backfill:
        attributes["backfill"] = True
    resource = {"type": "event", "attributes": {"properties": fitted, **attributes}}
    key = f"{metric}\0{unique_id}\0{profile.get('email')}\0{profile.get('external_id')}"
    return Operation(OperationKind.CREATE_EVENT, key, resource, truncated=truncated)


def order_properties(order: Json, items: list[Json], enriched: Enriched, mapping: MappingConfig) -> Json:
    """Return the properties of an order event, with the names that Klaviyo's flows and templates use."""
    custom = fields.custom_properties(order, mapping.order.custom_fields, mapping.locale)
    raw = fields.filter_properties(order, mapping.order.properties) if mapping.order.properties.include else {}
    return own_first(fields.compact(_own_properties(order, items, enriched, mapping)), raw | custom)


def order_omissions(enriched: Enriched, mapping: MappingConfig) -> Iterator[str]:
    """Describe the data of an order that its events leave out."""
    order = as_dict(enriched.order)
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
    infos = shipping_infos(order)
    return {
        "OrderId": as_id(order.get("id")),
        "OrderNumber": as_id(order.get("orderNumber")),
        "ItemNames": unique(item.get("ProductName", "") for item in items),
        "Categories": unique(name for item in items for name in item.get("Categories", ())),
        "Brands": unique(item.get("Brand", "") for item in items),
        "DiscountCode": ", ".join(discount_codes(order, enriched)),
        "DiscountValue": fields.number(discount_value(order, lines_of(order))),
        "Items": items,
        "BillingAddress": addresses.address_properties(order.get("billingAddress")),
        "ShippingAddress": addresses.address_properties(_shipping_address(order)),
        "ShippingMethod": next(filter(None, (as_text(info.get("shippingMethodName")) for info in infos)), ""),
        "ShippingCosts": fields.number(shipping_costs(order, mapping)),
        "TaxTotal": fields.number(tax_total(order)),
        "Currency": fields.currency(order.get("totalPrice")),
        "Store": store_of(order),
        "Country": country_of(order),
    }


def discount_codes(order: Json, enriched: Enriched) -> list[str]:
    """Return the discount codes that apply to an order or a cart."""
    return unique(enriched.discount_codes.get(code, "") for code in applied_codes(order))


def _shipping_address(order: Json) -> Any:
    """Return the shipping address, which is that of the first shipping method with `shippingMode: Multiple`."""
    entries = (order, *as_dicts(order.get("shipping")))
    return next(filter(None, (entry.get("shippingAddress") for entry in entries)), None)
