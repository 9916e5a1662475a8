"""The records that a backfill reads, and the notifications that represent them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING

import orjson

from worker.commercetools import queries
from worker.json_access import as_dict, as_dicts, as_text, pick_ids
from worker.model import Json, Operation, OperationKind
from worker.transform.order_totals import shipping_infos

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from datetime import datetime

_STATE_FIELDS = {"OrderStateChanged": "orderState", "OrderShipmentStateChanged": "shipmentState"}


@dataclass(frozen=True, slots=True)
class RecordKind:
    """A kind of resource, and how to represent one resource as notifications."""

    query: queries.Query
    resource_type: str
    time_field: str  # the field that --since and --until compare
    max_batch: int  # messages that Klaviyo's rate limits allow in a few seconds, or that fit in one bulk job
    notifications: Callable[[Json], Iterable[Json]]


def _notification(kind: str, resource_type: str, resource_id: str, time: object = None, **fields: object) -> Json:
    return {
        "notificationType": "Message",
        "type": kind,
        "resource": {"typeId": resource_type, "id": resource_id},
        "createdAt": time,
        **fields,
    }


def _created(kind: str, resource_type: str, resource: Json) -> Iterable[Json]:
    yield _notification(kind, resource_type, as_text(resource.get("id")))


def _shipments(order_id: str, order: Json) -> Iterable[Json]:
    """Yield notifications for the deliveries and parcels of an order."""
    for info in shipping_infos(order):
        for delivery in as_dicts(info.get("deliveries")):
            yield _notification("DeliveryAdded", "order", order_id, delivery.get("createdAt"), delivery=delivery)
            for parcel in as_dicts(delivery.get("parcels")):
                added_at = parcel.get("createdAt")
                yield _notification("ParcelAddedToDelivery", "order", order_id, added_at, parcel=parcel)


def _order_history(order: Json) -> Iterable[Json]:
    """Yield notifications for an order's history. Handlers ignore states, deliveries and others that have no event.

    commercetools does not report when an order entered its state, so the time of the last change is used: the latest
    possible time. Deliveries have their own time, so they come before the states that can have the same event.
    """
    order_id, changed_at = as_text(order.get("id")), order.get("lastModifiedAt")
    yield _notification("OrderCreated", "order", order_id, order.get("createdAt"))
    yield from _shipments(order_id, order)
    for kind, name in _STATE_FIELDS.items():
        if state := as_text(order.get(name)):
            yield _notification(kind, "order", order_id, changed_at, **{name: state})
    if workflow_state := as_dict(order.get("state")):
        yield _notification("OrderStateTransition", "order", order_id, changed_at, state=workflow_state)
    for info in as_dicts(order.get("returnInfo")):
        returned_at = info.get("returnDate") or changed_at
        yield _notification("ReturnInfoAdded", "order", order_id, returned_at, returnInfo=info)
    for payment_id in pick_ids(as_dict(order.get("paymentInfo")).get("payments")):
        # without a transaction id, the handler sends all transactions
        yield _notification("PaymentTransactionAdded", "payment", payment_id, changed_at)


_CUSTOMERS, _PRODUCTS = replace(queries.CUSTOMERS, expand=()), queries.PRODUCTS  # projections: published products only
_CHANGED = "lastModifiedAt"
_CATEGORY = partial(_created, "CategoryCreated", "category")  # ResourceUpdated would also send all descendants
_STOCK = partial(_created, "ResourceUpdated", "inventory-entry")
RECORD_KINDS = {
    "customers": RecordKind(_CUSTOMERS, "customer", _CHANGED, 1_000, partial(_created, "CustomerCreated", "customer")),
    "orders": RecordKind(queries.ORDERS, "order", "createdAt", 60, _order_history),
    "products": RecordKind(_PRODUCTS, "product", _CHANGED, 100, partial(_created, "ProductPublished", "product")),
    "categories": RecordKind(queries.CATEGORIES, "category", _CHANGED, 100, _CATEGORY),
    "inventory": RecordKind(queries.INVENTORY, "inventory-entry", _CHANGED, 1_000, _STOCK),
}


@dataclass(frozen=True, slots=True)
class RecordSelection:
    """The records to send: all of a kind, those with since <= time < until, or those with the given ids."""

    name: str
    since: datetime | None = None
    until: datetime | None = None
    ids: tuple[str, ...] = ()

    @property
    def kind(self) -> RecordKind:
        """Return the kind of the records."""
        return RECORD_KINDS[self.name]

    @property
    def where(self) -> str:
        """Return commercetools' query predicate for the times; "" for all records."""
        bounds = ((">=", self.since), ("<", self.until))
        return " and ".join(f'{self.kind.time_field} {sign} "{_format_time(time)}"' for sign, time in bounds if time)


def _format_time(time: datetime) -> str:
    return time.isoformat(timespec="milliseconds").replace("+00:00", "Z")


@dataclass(slots=True, eq=False)
class BackfillRecord:
    """A record in progress."""

    id: str
    pending: int  # messages without an outcome
    is_sent: bool = False
    failure: str = ""  # reason of its first failed message


@dataclass(slots=True, eq=False)
class RecordDelivery:
    """A message of a record, which is not on a queue. Therefore nothing counts its attempts."""

    record: BackfillRecord
    body: bytes = field(repr=False)
    tries: int = 0  # that have failed
    attempt: int | None = None
    published_at: datetime | None = None

    @property
    def id(self) -> str:
        """Return the id of the record."""
        return self.record.id

    @property
    def attributes(self) -> Mapping[str, str]:
        """Return no attributes."""
        return {}


def notifications_for(selection: RecordSelection, resource: Json) -> list[bytes]:
    """Return the notifications for a resource, each as the body of a message."""
    return [orjson.dumps(notification) for notification in selection.kind.notifications(resource)]


def mark_as_backfill(operation: Operation) -> Operation:
    """Return an event with Klaviyo's attribute `backfill` (revision 2026-07-15), which starts no flow.

    Other operations are returned unchanged.
    """
    if operation.kind is not OperationKind.CREATE_EVENT or operation.resource is None:
        return operation
    resource = operation.resource
    return replace(operation, resource=resource | {"attributes": resource["attributes"] | {"backfill": True}})
