"""The plans of payments, and of orders that get one."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from worker.commercetools import queries
from worker.enrich.plans import order_data_plan, version_fields
from worker.json_access import as_dict, as_text, pick_ids
from worker.transform.identity import names_buyer

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence

    from worker.enrich.plans import Lookup, Plan, PlanContext
    from worker.model import Enriched, Json


def payment_plan(enriched: Enriched, context: PlanContext) -> Plan:
    """Add the payment and its first order with all payments. If no order names a buyer, add the payment's customer."""
    payment_id = enriched.notification.resource_id
    yield [(queries.PAYMENTS, [payment_id]), (queries.ORDERS_BY_PAYMENT, [payment_id])]
    payment = context.get(queries.PAYMENTS, payment_id)
    order = _first_order(payment_id, context)
    has_owner = order is not None and names_buyer(order)
    customer_id = "" if has_owner else as_text(as_dict(as_dict(payment).get("customer")).get("id"))
    yield [(queries.CUSTOMERS, [customer_id])]
    customer = context.get_optional(queries.CUSTOMERS, customer_id)
    shown = version_fields(enriched.notification, payment)
    if payment is not None and order is None:
        shown["missing"] = "order of the payment"
    enriched = replace(enriched, payment=payment, order=order, customer=customer, **shown)
    enriched = yield from _add_payments(enriched, context)
    return (yield from order_data_plan(enriched, order, context))


def order_payment_plan(enriched: Enriched, context: PlanContext) -> Plan:
    """Add the order with all payments, and those of them that the message adds.

    A payment of several orders belongs to the first one.
    """
    notification = enriched.notification
    reference = notification.payload.get("paymentRef") or notification.payload.get("payment")  # its former name
    named = as_text(as_dict(reference).get("id"))
    yield [(queries.ORDERS, [notification.resource_id]), (queries.ORDERS_BY_PAYMENT, [named])]
    order = context.get(queries.ORDERS, notification.resource_id)
    enriched = replace(enriched, order=order, **version_fields(notification, order))
    enriched = yield from _add_payments(enriched, context)
    added = [payment for payment in enriched.payments if not named or payment.get("id") == named]
    ids = pick_ids(added)
    yield [(queries.ORDERS_BY_PAYMENT, ids)]
    own = [payment for payment in added if _first_order(as_text(payment["id"]), context, order) is order]
    return (yield from order_data_plan(replace(enriched, added_payments=own), order, context))


def _first_order(payment_id: str, context: PlanContext, order: Json | None = None) -> Json | None:
    """Return the first order of a payment, or None. A query for the payment possibly does not show `order` yet."""
    known = context.get_all(queries.ORDERS_BY_PAYMENT, payment_id)
    if order is not None:
        known = [order, *(each for each in known if each.get("id") != order.get("id"))]
    return min(known, key=lambda each: (as_text(each.get("createdAt")), as_text(each.get("id"))), default=None)


def _add_payments(enriched: Enriched, context: PlanContext) -> Generator[Sequence[Lookup], None, Enriched]:
    """Add the payments of the order, without those that commercetools does not show."""
    ids = pick_ids(as_dict(as_dict(enriched.order).get("paymentInfo")).get("payments"))
    yield [(queries.PAYMENTS, ids)]
    payments = [context.get_optional(queries.PAYMENTS, payment) for payment in ids]
    if None in payments:
        enriched = replace(enriched, missing=enriched.missing or "payment of the order")
    return replace(enriched, payments=[payment for payment in payments if payment is not None])
