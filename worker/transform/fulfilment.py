"""States and deliveries of an order -> Fulfilled Order and Cancelled Order.

Both events have the order's id as unique_id. An order that is shipped, then delivered, then complete is therefore
fulfilled once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from worker.errors import Ignored
from worker.json_access import as_dict, as_text
from worker.transform import fields
from worker.transform.order_events import order_event, order_of, order_omissions
from worker.transform.registry import handles
from worker.transform.shipments import parcels_of, tracking_properties

if TYPE_CHECKING:
    from collections.abc import Iterable

    from worker.mapping import MappingConfig
    from worker.model import Enriched, Notification, Operation

_ORDER_STATES = frozenset({"Open", "Confirmed", "Complete", "Cancelled"})
_SHIPMENT_STATES = frozenset(
    {"Shipped", "Delivered", "Ready", "Pending", "Delayed", "Partial", "Backorder", "Canceled"}
)
_FULFILLED_OR_CANCELLED = "Fulfilled Order or Cancelled Order"


def _check_order_state(notification: Notification, mapping: MappingConfig) -> None:
    state = notification.payload.get("orderState")
    states = (*mapping.order.fulfilled_states, *mapping.order.cancelled_states)
    if isinstance(state, str) and state not in states:
        reason = f"no event for order state {_state_for_log(state)}"
        raise Ignored(f"{reason}: see order.fulfilled_states, order.cancelled_states")


@handles(
    "OrderStateChanged",
    resource="order",
    effect=f"{_FULFILLED_OR_CANCELLED}, by state",
    precheck=_check_order_state,
    omissions=order_omissions,
)
def order_state_changed(enriched: Enriched, mapping: MappingConfig) -> Iterable[Operation]:
    """Create a Fulfilled Order or Cancelled Order event, depending on the state in the message or in the order."""
    state = _current(enriched, "orderState")
    if state in mapping.order.fulfilled_states:
        yield _fulfilled(enriched, mapping)
    if state in mapping.order.cancelled_states:
        yield _cancelled(enriched, mapping)


def _check_shipment_state(notification: Notification, mapping: MappingConfig) -> None:
    state = notification.payload.get("shipmentState")
    if isinstance(state, str) and state not in mapping.order.fulfilled_shipment_states:
        raise Ignored(f"no event for shipment state {_state_for_log(state)}: see order.fulfilled_shipment_states")


@handles(
    "OrderShipmentStateChanged",
    resource="order",
    effect="Fulfilled Order, when shipped or delivered",
    precheck=_check_shipment_state,
    omissions=order_omissions,
)
def order_shipment_state_changed(enriched: Enriched, mapping: MappingConfig) -> Iterable[Operation]:
    """Create a Fulfilled Order event if the order is shipped, or delivered without having been shipped."""
    if _current(enriched, "shipmentState") in mapping.order.fulfilled_shipment_states:
        yield _fulfilled(enriched, mapping)


@handles(
    "OrderStateTransition",
    resource="order",
    effect=f"{_FULFILLED_OR_CANCELLED}, by workflow state",
    omissions=order_omissions,
    switches=("order.fulfilled_workflow_states", "order.cancelled_workflow_states"),
)
def order_state_transition(enriched: Enriched, mapping: MappingConfig) -> Iterable[Operation]:
    """Create a Fulfilled Order or Cancelled Order event, depending on the key of the workflow state in the message."""
    key = as_text(as_dict(enriched.workflow_state).get("key"))
    if key not in (*mapping.order.fulfilled_workflow_states, *mapping.order.cancelled_workflow_states):
        raise Ignored("no event for this workflow state: see order.fulfilled_workflow_states")
    if key in mapping.order.fulfilled_workflow_states:
        yield _fulfilled(enriched, mapping)
    if key in mapping.order.cancelled_workflow_states:
        yield _cancelled(enriched, mapping)


@handles(
    "DeliveryAdded",
    resource="order",
    effect="Fulfilled Order, at the first delivery",
    omissions=order_omissions,
    switches=("order.fulfilled_by_delivery",),
)
def delivery_added(enriched: Enriched, mapping: MappingConfig) -> Iterable[Operation]:
    """Create a Fulfilled Order event, for shops that add deliveries and do not change the state of the order."""
    yield _fulfilled(enriched, mapping)


def _fulfilled(enriched: Enriched, mapping: MappingConfig) -> Operation:
    tracking = tracking_properties(parcels_of(order_of(enriched)), mapping)
    return order_event(enriched, mapping, metric=mapping.metrics.fulfilled_order, more=tracking)


def _cancelled(enriched: Enriched, mapping: MappingConfig) -> Operation:
    return order_event(enriched, mapping, metric=mapping.metrics.cancelled_order)


def _current(enriched: Enriched, name: str) -> str:
    """Return the state in the message, or that of the order if the message does not contain it."""
    order, payload = order_of(enriched), enriched.notification.payload
    return fields.first_nonempty(as_text(payload.get(name)), as_text(order.get(name)))


def _state_for_log(state: str) -> str:
    """Return a state of commercetools. Any other text can be personal data, which must not be logged."""
    return state if state in _ORDER_STATES | _SHIPMENT_STATES else "unknown to commercetools"
