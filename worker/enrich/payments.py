"""The plan of payments."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from worker.commercetools import queries
from worker.enrich.plans import order_data_plan, with_version
from worker.json_access import as_dict, as_text

if TYPE_CHECKING:
    from worker.enrich.plans import Plan, PlanContext
    from worker.model import Enriched


def payment_plan(enriched: Enriched, context: PlanContext) -> Plan:
    """Add the payment and its first order, or the payment's customer if it has no order."""
    notification = enriched.notification
    payment_id = notification.resource_id
    yield [(queries.PAYMENTS, [payment_id]), (queries.ORDERS_BY_PAYMENT, [payment_id])]
    payment = context.get(queries.PAYMENTS, payment_id)
    orders = context.get_all(queries.ORDERS_BY_PAYMENT, payment_id)
    order = min(orders, key=lambda order: as_text(order.get("createdAt")), default=None)
    customer_id = "" if order else as_text(as_dict(as_dict(payment).get("customer")).get("id"))
    yield [(queries.CUSTOMERS, [customer_id])]
    customer = context.get_optional(queries.CUSTOMERS, customer_id)
    enriched = with_version(replace(enriched, payment=payment, order=order, customer=customer), payment)
    if payment is not None and order is None:
        enriched = replace(enriched, missing="order of the payment")
    return (yield from order_data_plan(enriched, context))
