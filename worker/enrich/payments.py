"""The plan of payments."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from worker.commercetools import queries
from worker.enrich.plans import order_data_plan, with_version
from worker.json_access import as_dict, as_text
from worker.transform.identity import names_buyer

if TYPE_CHECKING:
    from worker.enrich.plans import Plan, PlanContext
    from worker.model import Enriched


def payment_plan(enriched: Enriched, context: PlanContext) -> Plan:
    """Add the payment and its first order. If no order names a buyer, add the payment's customer."""
    notification = enriched.notification
    payment_id = notification.resource_id
    yield [(queries.PAYMENTS, [payment_id]), (queries.ORDERS_BY_PAYMENT, [payment_id])]
    payment = context.get(queries.PAYMENTS, payment_id)
    orders = context.get_all(queries.ORDERS_BY_PAYMENT, payment_id)
    order = min(orders, key=lambda order: as_text(order.get("createdAt")), default=None)
    has_owner = order is not None and names_buyer(order)
    customer_id = "" if has_owner else as_text(as_dict(as_dict(payment).get("customer")).get("id"))
    yield [(queries.CUSTOMERS, [customer_id])]
    customer = context.get_optional(queries.CUSTOMERS, customer_id)
    enriched = with_version(replace(enriched, payment=payment, order=order, customer=customer), payment)
    if payment is not None and order is None:
        enriched = replace(enriched, missing="order of the payment")
    return (yield from order_data_plan(enriched, context))
