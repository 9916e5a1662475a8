"""The plan of carts."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from worker.commercetools import queries
from worker.enrich.plans import order_data_plan, version_fields
from worker.transform.carts import silence_reason

if TYPE_CHECKING:
    from worker.enrich.plans import Plan, PlanContext
    from worker.model import Enriched


def cart_plan(enriched: Enriched, context: PlanContext) -> Plan:
    """Add the cart as the order of the notification, and the data of its events if it can have some.

    A reading can lag: commercetools then shows the order of a cart that it still shows as active. Such a cart counts as
    ordered. An event after the order would remind the customer of what they have bought.
    """
    cart_id = enriched.notification.resource_id
    yield [(queries.CARTS, [cart_id])]
    cart = context.get(queries.CARTS, cart_id)
    enriched = replace(enriched, order=cart, **version_fields(enriched.notification, cart))
    if cart is None or silence_reason(cart):
        return enriched
    yield [(queries.ORDERS_BY_CART, [cart_id])]
    if context.get_optional(queries.ORDERS_BY_CART, cart_id) is not None:
        return replace(enriched, order=cart | {"cartState": "Ordered"})
    return (yield from order_data_plan(enriched, cart, context))
