"""New orders -> Placed Order, and an Ordered Product per line.

A handler is a generator function with `@handles`. It reads the enriched notification and yields operations. A precheck
reads only the notification. It raises Ignored if there is nothing to send, and then no data is fetched.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from worker.errors import Ignored
from worker.json_access import as_dict, as_id
from worker.transform import fields
from worker.transform.buyers import buyer_profile
from worker.transform.identity import email_of, identifiers
from worker.transform.line_items import items_of, lines_of
from worker.transform.order_events import (
    event_operation,
    is_in_the_past,
    order_id,
    order_of,
    order_omissions,
    order_properties,
    placed_at,
)
from worker.transform.order_totals import line_total, order_total
from worker.transform.registry import handles
from worker.transform.size_limits import own_first

if TYPE_CHECKING:
    from collections.abc import Iterable

    from worker.mapping import MappingConfig
    from worker.model import Enriched, Json, Notification, Operation

_PLACED = "Placed Order; Ordered Product per line"


def _check_customer(notification: Notification, _mapping: MappingConfig) -> None:
    if as_id(as_dict(notification.payload.get("oldCustomer")).get("id")):
        raise Ignored("the order had a customer before, and its event belongs to that one")


@handles(
    "OrderCustomerSet",
    resource="order",
    effect=f"{_PLACED}; only if the order had no customer before",
    precheck=_check_customer,
    omissions=order_omissions,
)
@handles(
    "OrderCreated",
    "OrderImported",
    "OrderCreatedFromRecurringOrder",
    resource="order",
    effect=_PLACED,
    omissions=order_omissions,
)
def order_placed(enriched: Enriched, mapping: MappingConfig) -> Iterable[Operation]:
    """Create a Placed Order event and, dated one second later, an Ordered Product event for every line."""
    order = order_of(enriched)
    profile = identifiers(order, enriched, mapping)
    time, backfill = placed_at(order, enriched), is_in_the_past(order, enriched, mapping)
    items = items_of(order, enriched, mapping)
    if not backfill:  # old orders come in no order of time
        yield from buyer_profile(order, profile, mapping)
    yield event_operation(
        metric=mapping.metrics.placed_order,
        unique_id=order_id(enriched),
        time=time,
        value=order_total(order, mapping),
        profile=profile,
        properties=order_properties(order, items, enriched, mapping),
        backfill=backfill,
    )
    order_ids = fields.compact({"OrderId": as_id(order.get("id")), "OrderNumber": as_id(order.get("orderNumber"))})
    after = fields.add_seconds(time, 1)
    for line, item in zip(lines_of(order), items, strict=True):
        raw = line if mapping.order.raw_line_item else {}
        yield event_operation(
            metric=mapping.metrics.ordered_product,
            unique_id=as_id(line.get("id")) or f"{order_id(enriched)}:{item.get('SKU', '')}",
            time=after,
            value=line_total(line, mapping),
            profile=profile,
            properties=own_first(item | _brand(item) | order_ids, raw),
            backfill=backfill,
        )


def _brand(item: Json) -> Json:
    """Return the brand under the name that it has in Ordered Product in Klaviyo's guide."""
    return {"ProductBrand": item["Brand"]} if "Brand" in item else {}


def _check_email(notification: Notification, _mapping: MappingConfig) -> None:
    payload = notification.payload
    if payload.get("oldEmail"):
        raise Ignored("the order had an email address before, and its event belongs to that one")
    if not payload.get("email"):
        raise Ignored("the message does not say that the order got its first email address")


@handles(
    "OrderCustomerEmailSet",
    resource="order",
    effect=f"{_PLACED}; only if the order had no email address before",
    precheck=_check_email,
    omissions=order_omissions,
)
def order_email_set(enriched: Enriched, mapping: MappingConfig) -> Iterable[Operation]:
    """Create the events of a new order that could not be created before, because its buyer was unknown.

    An order with an email in one of its addresses has its events already, on the profile of that one.
    """
    order = order_of(enriched)
    address_email = email_of(order | {"customerEmail": None})
    if not as_id(order.get("customerId")) and address_email not in ("", as_id(order.get("customerEmail"))):
        raise Ignored("an address of the order has another email address, and its event belongs to that one")
    return order_placed(enriched, mapping)
