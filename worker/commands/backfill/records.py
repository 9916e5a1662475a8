"""What a backfill reads, and the messages the worker would have had for it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import orjson

from worker.commercetools import queries
from worker.json_access import as_dict, as_text, pick_ids
from worker.model import Json, Operation, OperationKind

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from datetime import datetime

_STATES = {"OrderStateChanged": "orderState", "OrderShipmentStateChanged": "shipmentState"}


@dataclass(frozen=True, slots=True)
class Collection:
    """The resources of a kind, and the messages that stand for one of them."""

    query: queries.Query
    resource_type: str
    dated_by: str  # the field that --since and --until are about
    batch: int  # messages at the most: some seconds of Klaviyo's limits, or what fills its jobs
    messages: Callable[[Json], Iterable[Json]]


def _message(kind: str, resource_type: str, resource_id: str, time: object = None, **more: object) -> Json:
    return {
        "notificationType": "Message",
        "type": kind,
        "resource": {"typeId": resource_type, "id": resource_id},
        "createdAt": time,
        **more,
    }


def _created(kind: str, resource_type: str, resource: Json) -> Iterable[Json]:
    yield _message(kind, resource_type, as_text(resource.get("id")))


def _order(order: Json) -> Iterable[Json]:
    """Yield an order's history, as far as the order shows it: handlers ignore what counts for nothing.

    commercetools does not say when an order came into its state: no later than its last change.
    """
    order_id, changed_at = as_text(order.get("id")), order.get("lastModifiedAt")
    yield _message("OrderCreated", "order", order_id, order.get("createdAt"))
    for kind, name in _STATES.items():
        if state := as_text(order.get(name)):
            yield _message(kind, "order", order_id, changed_at, **{name: state})
    for payment_id in pick_ids(as_dict(order.get("paymentInfo")).get("payments")):
        yield _message("PaymentTransactionAdded", "payment", payment_id, changed_at)  # no transaction: all of them


_CUSTOMERS, _PRODUCTS = replace(queries.CUSTOMERS, expand=()), queries.PRODUCTS  # projections: what is published
_CHANGED = "lastModifiedAt"
_CATEGORY = partial(_created, "CategoryCreated", "category")  # ResourceUpdated would send all descendants of each
COLLECTIONS = {
    "customers": Collection(_CUSTOMERS, "customer", _CHANGED, 1_000, partial(_created, "CustomerCreated", "customer")),
    "orders": Collection(queries.ORDERS, "order", "createdAt", 60, _order),
    "products": Collection(_PRODUCTS, "product", _CHANGED, 100, partial(_created, "ProductPublished", "product")),
    "categories": Collection(queries.CATEGORIES, "category", _CHANGED, 100, _CATEGORY),
}


@dataclass(frozen=True, slots=True)
class Selection:
    """Which records of a collection: all, those of a time (since <= it < until), or those named."""

    name: str
    since: datetime | None = None
    until: datetime | None = None
    ids: tuple[str, ...] = ()

    @property
    def collection(self) -> Collection:
        """Return what they are of."""
        return COLLECTIONS[self.name]

    @property
    def where(self) -> str:
        """Return the predicate of commercetools for the time; "": none."""
        bounds = ((">=", self.since), ("<", self.until))
        field = self.collection.dated_by
        return " and ".join(f'{field} {sign} "{_written(moment)}"' for sign, moment in bounds if moment)


def _written(moment: datetime) -> str:
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def bodies(selection: Selection, resource: Json) -> list[bytes]:
    """Return a record's messages as a queue would hold them."""
    return [orjson.dumps(message) for message in selection.collection.messages(resource)]


def as_history(operation: Operation) -> Operation:
    """Return the operation with its event marked, so that no flow begins: Klaviyo's `backfill`, revision 2026-07-15."""
    if operation.kind is not OperationKind.CREATE_EVENT or operation.resource is None:
        return operation
    resource = operation.resource
    return replace(operation, resource=resource | {"attributes": resource["attributes"] | {"backfill": True}})
