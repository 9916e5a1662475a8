"""Returns of an order -> Returned Order."""

from __future__ import annotations

from hashlib import sha256
from typing import TYPE_CHECKING

from worker.budget import check_returned_items
from worker.json_access import as_dict, as_dicts, as_id, as_int
from worker.transform import fields
from worker.transform.line_items import items_of, lines_of
from worker.transform.order_events import order_event, order_id, order_of, order_omissions, shared_properties
from worker.transform.order_totals import line_share
from worker.transform.registry import handles

if TYPE_CHECKING:
    from collections.abc import Iterable

    from worker.mapping import MappingConfig
    from worker.model import Enriched, Json, Operation


@handles(
    "ReturnInfoAdded",
    resource="order",
    effect="Returned Order",
    omissions=order_omissions,
    switches=("metrics.returned_order",),
)
def return_added(enriched: Enriched, mapping: MappingConfig) -> Iterable[Operation]:
    """Create a Returned Order event for the return in the message, or for all returns if it contains none.

    The unique_id is the return's tracking id, or a hash of the ids of its items. The value is what the buyer has paid
    for the returned items.
    """
    order = order_of(enriched)
    added = as_dict(enriched.notification.payload.get("returnInfo"))
    infos = [added] if added else as_dicts(order.get("returnInfo"))
    properties = shared_properties(enriched, mapping, len(infos))
    items = _items_by_line(order, enriched, mapping)
    for info in infos:
        returned = _returned_items(info, items, mapping)
        tracking_id = as_id(info.get("returnTrackingId"))
        yield order_event(
            enriched,
            mapping,
            metric=mapping.metrics.returned_order,
            unique_id=tracking_id or _hash(info, enriched),
            value=_total([price for _, price in returned]),
            properties=properties,
            more=fields.compact(
                {"ReturnTrackingId": tracking_id, "ReturnedItems": [item for item, price in returned if price]}
            ),
        )


def _items_by_line(order: Json, enriched: Enriched, mapping: MappingConfig) -> dict[str, tuple[Json, Json]]:
    """Return by its id each line of the order, with its entry of `Items`."""
    pairs = zip(lines_of(order), items_of(order, enriched, mapping), strict=True)
    return {as_id(line.get("id")): (line, item) for line, item in pairs}


def _returned_items(info: Json, items: dict[str, tuple[Json, Json]], mapping: MappingConfig) -> list[tuple[Json, Json]]:
    """Return the entries of `ReturnedItems` for a return, each with its price as a money ({} if it is unknown)."""
    returned = as_dicts(info.get("items"))
    check_returned_items(len(returned))
    return [_returned(item, items, mapping) for item in returned]


def _returned(returned: Json, items: dict[str, tuple[Json, Json]], mapping: MappingConfig) -> tuple[Json, Json]:
    line, item = items.get(_line_id(returned), ({}, {}))
    quantity = as_int(returned.get("quantity"))
    price = line_share(line, quantity, mapping)
    return fields.compact(item | {"Quantity": quantity, "RowTotal": fields.money(price)}), price


def _line_id(returned: Json) -> str:
    return as_id(returned.get("lineItemId")) or as_id(returned.get("customLineItemId"))


def _total(prices: list[Json]) -> Json:
    """Return the sum of moneys in minor units, which have one currency; {} if no price is known."""
    known = [price for price in prices if price]
    return known[0] | {"centAmount": sum(price["centAmount"] for price in known)} if known else {}


def _hash(info: Json, enriched: Enriched) -> str:
    """Return an id for a return without a tracking id. It does not depend on the states of the items."""
    items = as_dicts(info.get("items"))
    ids = sorted(as_id(item.get("id")) or f"{_line_id(item)}:{item.get('quantity')}" for item in items)
    return sha256("\0".join([order_id(enriched), *ids]).encode()).hexdigest()
