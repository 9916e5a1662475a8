"""Order messages -> order events."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING, Any

from worker.errors import Ignored
from worker.json_access import as_dict, as_dicts, as_text
from worker.transform import fields
from worker.transform.order_events import all_line_properties, event_operation, identifiers, omissions, order_properties
from worker.transform.registry import handles

if TYPE_CHECKING:
    from collections.abc import Iterable

    from worker.mapping import MappingConfig
    from worker.model import Enriched, Json, Notification, Operation

_PLACED = "Placed Order; Ordered Product per line"


def _omissions(enriched: Enriched, mapping: MappingConfig) -> Iterable[str]:
    return omissions(as_dict(enriched.order), enriched, mapping)


def _omissions_of_placed(enriched: Enriched, mapping: MappingConfig) -> Iterable[str]:
    billing = as_dict(enriched.order).get("billingAddress")
    return chain(_omissions(enriched, mapping), fields.report_invalid_phone(billing))


@handles(
    "OrderImported",
    "OrderCustomerSet",
    "OrderCreatedFromRecurringOrder",
    resource="order",
    effect=_PLACED,
    omissions=_omissions_of_placed,
)
@handles("OrderCreated", resource="order", effect=_PLACED, once_per_resource=True, omissions=_omissions_of_placed)
def order_placed(enriched: Enriched, mapping: MappingConfig) -> Iterable[Operation]:
    """Placed Order, and an Ordered Product a second later for every line."""
    order = _order(enriched)
    profile = identifiers(order, enriched)
    time = _created_at(order, enriched)
    lines = all_line_properties(order, enriched, mapping)
    yield event_operation(
        metric=mapping.metrics.placed_order,
        unique_id=_id(order, enriched),
        time=time,
        value=order.get("totalPrice"),
        profile=profile | _billing_profile(order),
        properties=order_properties(order, lines, enriched, mapping),
    )
    raw_lines = chain(as_dicts(order.get("lineItems")), as_dicts(order.get("customLineItems")))
    for line, properties in zip(raw_lines, lines, strict=True):
        order_fields = {"OrderId": as_text(order.get("id")), "OrderNumber": as_text(order.get("orderNumber"))}
        raw = line if mapping.order.raw_line_item else {}
        yield event_operation(
            metric=mapping.metrics.ordered_product,
            unique_id=as_text(line.get("id")) or f"{_id(order, enriched)}:{properties.get('SKU', '')}",
            time=fields.add_seconds(time, 1),
            value=line.get("totalPrice"),
            profile=profile,
            properties=raw | properties | fields.compact(order_fields),
        )


def _check_order_state(notification: Notification, mapping: MappingConfig) -> None:
    state = notification.payload.get("orderState")
    wanted = {*mapping.order.fulfilled_states, *mapping.order.cancelled_states}
    if isinstance(state, str) and state not in wanted:
        raise Ignored(
            f"no event for order state {_safe_state(state)}: see order.fulfilled_states, order.cancelled_states"
        )


@handles(
    "OrderStateChanged",
    resource="order",
    effect="Fulfilled Order or Cancelled Order, by state",
    precheck=_check_order_state,
    omissions=_omissions,
)
def order_state_changed(enriched: Enriched, mapping: MappingConfig) -> Iterable[Operation]:
    """Fulfilled Order or Cancelled Order; a payload that was not included leaves the order's own state."""
    order = _order(enriched)
    state = fields.first_nonempty(
        as_text(enriched.notification.payload.get("orderState")), as_text(order.get("orderState"))
    )
    if state in mapping.order.fulfilled_states:
        yield _status_event(mapping.metrics.fulfilled_order, order, enriched, mapping)
    if state in mapping.order.cancelled_states:
        yield _status_event(mapping.metrics.cancelled_order, order, enriched, mapping)


def _check_shipment_state(notification: Notification, mapping: MappingConfig) -> None:
    state = notification.payload.get("shipmentState")
    if isinstance(state, str) and state not in mapping.order.fulfilled_shipment_states:
        raise Ignored(f"no event for shipment state {_safe_state(state)}: see order.fulfilled_shipment_states")


@handles(
    "OrderShipmentStateChanged",
    resource="order",
    effect="Fulfilled Order, when shipped",
    precheck=_check_shipment_state,
    omissions=_omissions,
)
def order_shipment_state_changed(enriched: Enriched, mapping: MappingConfig) -> Iterable[Operation]:
    """Fulfilled Order once the shipment is under way."""
    order = _order(enriched)
    payload = enriched.notification.payload
    state = fields.first_nonempty(as_text(payload.get("shipmentState")), as_text(order.get("shipmentState")))
    if state in mapping.order.fulfilled_shipment_states:
        yield _status_event(mapping.metrics.fulfilled_order, order, enriched, mapping)


def _status_event(metric: str, order: Json, enriched: Enriched, mapping: MappingConfig) -> Operation:
    return event_operation(
        metric=metric,
        unique_id=_id(order, enriched),
        time=enriched.notification.time or _created_at(order, enriched),
        value=order.get("totalPrice"),
        profile=identifiers(order, enriched),
        properties=order_properties(order, all_line_properties(order, enriched, mapping), enriched, mapping),
    )


def _order(enriched: Enriched) -> Json:
    if enriched.order is None:
        raise Ignored("commercetools no longer has the order")
    return enriched.order


def _id(order: Json, enriched: Enriched) -> str:
    return as_text(order.get("id")) or enriched.notification.resource_id


def _created_at(order: Json, enriched: Enriched) -> str:
    return as_text(order.get("createdAt")) or enriched.notification.time or ""


def _billing_profile(order: Json) -> Json:
    """Return what the billing address tells of the buyer."""
    billing = as_dict(order.get("billingAddress"))
    return fields.compact(
        {
            "first_name": as_text(billing.get("firstName")),
            "last_name": as_text(billing.get("lastName")),
            "phone_number": fields.phone(billing),
            "location": fields.location(billing),
        }
    )


def _safe_state(state: Any) -> str:
    """Return a state for a log line: only what looks like commercetools' own vocabulary."""
    return state if str(state).isalpha() and len(state) <= 32 else "unknown to commercetools"  # noqa: PLR2004
