"""Order messages -> order events.

A handler is a generator function with `@handles`. It reads the enriched notification and yields operations. A precheck
reads only the notification. It raises Ignored if there is nothing to send, and then no data is fetched.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from worker.errors import Ignored
from worker.json_access import as_dict, as_id, as_text
from worker.transform import fields
from worker.transform.identity import identifiers
from worker.transform.line_items import items_of, lines_of
from worker.transform.order_events import (
    event_operation,
    order_omissions,
    order_properties,
)
from worker.transform.order_totals import line_total, order_total
from worker.transform.registry import handles

if TYPE_CHECKING:
    from collections.abc import Iterable

    from worker.mapping import MappingConfig
    from worker.model import Enriched, Json, Notification, Operation

_PLACED = "Placed Order; Ordered Product per line"
_MAX_STATE_LENGTH = 32


def _omissions(enriched: Enriched, mapping: MappingConfig) -> Iterable[str]:
    return order_omissions(as_dict(enriched.order), enriched, mapping)


@handles(
    "OrderCreated",
    "OrderImported",
    "OrderCustomerSet",
    "OrderCreatedFromRecurringOrder",
    resource="order",
    effect=_PLACED,
    omissions=_omissions,
)
def order_placed(enriched: Enriched, mapping: MappingConfig) -> Iterable[Operation]:
    """Create a Placed Order event and, dated one second later, an Ordered Product event for every line."""
    order = _order(enriched)
    profile = identifiers(order, enriched, mapping)
    time = _created_at(order, enriched)
    items = items_of(order, enriched, mapping)
    yield event_operation(
        metric=mapping.metrics.placed_order,
        unique_id=_order_id(order, enriched),
        time=time,
        value=order_total(order, mapping),
        profile=profile,
        properties=order_properties(order, items, enriched, mapping),
    )
    order_ids = fields.compact({"OrderId": as_id(order.get("id")), "OrderNumber": as_id(order.get("orderNumber"))})
    for line, item in zip(lines_of(order), items, strict=True):
        raw = line if mapping.order.raw_line_item else {}
        yield event_operation(
            metric=mapping.metrics.ordered_product,
            unique_id=as_id(line.get("id")) or f"{_order_id(order, enriched)}:{item.get('SKU', '')}",
            time=fields.add_seconds(time, 1),
            value=line_total(line, mapping),
            profile=profile,
            properties=raw | item | order_ids,
        )


def _check_order_state(notification: Notification, mapping: MappingConfig) -> None:
    state = notification.payload.get("orderState")
    states = (*mapping.order.fulfilled_states, *mapping.order.cancelled_states)
    if isinstance(state, str) and state not in states:
        reason = f"no event for order state {_state_for_log(state)}"
        raise Ignored(f"{reason}: see order.fulfilled_states, order.cancelled_states")


@handles(
    "OrderStateChanged",
    resource="order",
    effect="Fulfilled Order or Cancelled Order, by state",
    precheck=_check_order_state,
    omissions=_omissions,
)
def order_state_changed(enriched: Enriched, mapping: MappingConfig) -> Iterable[Operation]:
    """Create a Fulfilled Order or Cancelled Order event, depending on the state in the message or in the order."""
    order = _order(enriched)
    payload = enriched.notification.payload
    state = fields.first_nonempty(as_text(payload.get("orderState")), as_text(order.get("orderState")))
    if state in mapping.order.fulfilled_states:
        yield _status_event(mapping.metrics.fulfilled_order, order, enriched, mapping)
    if state in mapping.order.cancelled_states:
        yield _status_event(mapping.metrics.cancelled_order, order, enriched, mapping)


def _check_shipment_state(notification: Notification, mapping: MappingConfig) -> None:
    state = notification.payload.get("shipmentState")
    if isinstance(state, str) and state not in mapping.order.fulfilled_shipment_states:
        raise Ignored(f"no event for shipment state {_state_for_log(state)}: see order.fulfilled_shipment_states")


@handles(
    "OrderShipmentStateChanged",
    resource="order",
    effect="Fulfilled Order, when shipped",
    precheck=_check_shipment_state,
    omissions=_omissions,
)
def order_shipment_state_changed(enriched: Enriched, mapping: MappingConfig) -> Iterable[Operation]:
    """Create a Fulfilled Order event if the order is shipped."""
    order = _order(enriched)
    payload = enriched.notification.payload
    state = fields.first_nonempty(as_text(payload.get("shipmentState")), as_text(order.get("shipmentState")))
    if state in mapping.order.fulfilled_shipment_states:
        yield _status_event(mapping.metrics.fulfilled_order, order, enriched, mapping)


def _status_event(metric: str, order: Json, enriched: Enriched, mapping: MappingConfig) -> Operation:
    return event_operation(
        metric=metric,
        unique_id=_order_id(order, enriched),
        time=enriched.notification.time or _created_at(order, enriched),
        value=order_total(order, mapping),
        profile=identifiers(order, enriched, mapping),
        properties=order_properties(order, items_of(order, enriched, mapping), enriched, mapping),
    )


def _order(enriched: Enriched) -> Json:
    if enriched.order is None:
        raise Ignored("commercetools no longer has the order")
    return enriched.order


def _order_id(order: Json, enriched: Enriched) -> str:
    return as_id(order.get("id")) or enriched.notification.resource_id


def _created_at(order: Json, enriched: Enriched) -> str:
    return as_id(order.get("createdAt")) or enriched.notification.time or ""


def _state_for_log(state: Any) -> str:
    """Return the state if it looks like one. Any other text can be personal data, which must not be logged."""
    return state if str(state).isalpha() and len(state) <= _MAX_STATE_LENGTH else "unknown to commercetools"
