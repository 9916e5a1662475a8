"""Messages about payments -> Refunded Order events, one per refund."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain
from typing import TYPE_CHECKING

from worker.budget import check_refunds, limit_paths
from worker.errors import Ignored
from worker.json_access import as_dict, as_dicts, as_id, as_text
from worker.transform import fields
from worker.transform.identity import identifiers
from worker.transform.line_items import items_of
from worker.transform.order_events import event_operation, event_time, order_omissions, order_properties
from worker.transform.registry import handles
from worker.transform.size_limits import EVENT_BYTES, own_first, truncate

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from worker.mapping import MappingConfig
    from worker.model import Enriched, Json, Notification, Operation

_EFFECT = "Refunded Order, per refund transaction"
_NO_REFUND = "no refund in a state that counts: see payment.refund_types, payment.refund_states"


def _check_transaction(notification: Notification, mapping: MappingConfig) -> None:
    payload = notification.payload
    transaction = as_dict(payload.get("transaction"))
    if transaction and transaction.get("type") not in mapping.payment.refund_types:
        raise Ignored("the transaction is no refund: see payment.refund_types")
    state = transaction.get("state", payload.get("state"))
    if isinstance(state, str) and state not in mapping.payment.refund_states:
        raise Ignored("no event for a transaction in this state: see payment.refund_states")


def _check_created(notification: Notification, mapping: MappingConfig) -> None:
    payment = notification.payload.get("payment")
    if isinstance(payment, dict) and not any(_is_refund(t, mapping) for t in as_dicts(payment.get("transactions"))):
        raise Ignored(f"the payment was created with {_NO_REFUND}")


def _omissions(enriched: Enriched, mapping: MappingConfig) -> Iterator[str]:
    are_refunds = [_is_refund(transaction, mapping) for transaction in _transactions(enriched)]
    if others := are_refunds.count(False):
        yield f"{others} of {len(are_refunds)} transactions: {_NO_REFUND}"
    yield from order_omissions(enriched, mapping)


@handles(
    "PaymentTransactionAdded",
    "PaymentTransactionStateChanged",
    resource="payment",
    effect=_EFFECT,
    precheck=_check_transaction,
    omissions=_omissions,
)
@handles("PaymentCreated", resource="payment", effect=_EFFECT, precheck=_check_created, omissions=_omissions)
def payment_changed(enriched: Enriched, mapping: MappingConfig) -> Iterable[Operation]:
    """Create a Refunded Order event for every refund that the message is about, with the refund's amount.

    The refund that stands first among those of the order has the order's id as unique_id, the others have their own.
    """
    return _refund_events(enriched, mapping)


@handles(
    "OrderPaymentAdded",
    resource="order",
    effect="Refunded Order, per refund transaction of a payment without a customer",
    omissions=_omissions,
)
def order_payment_added(enriched: Enriched, mapping: MappingConfig) -> Iterable[Operation]:
    """Create a Refunded Order event for every refund that the payment had before the order got it.

    If the payment names a customer, its own messages created these events.
    """
    if enriched.order is None:
        raise Ignored("commercetools no longer has the order")
    if not enriched.added_payments:
        raise Ignored("the order no longer has the payment, or an earlier order has it too")
    if all(_names_customer(payment) for payment in enriched.added_payments):
        raise Ignored("the payment names a customer, so its own messages have sent its refunds")
    return _refund_events(enriched, mapping)


def _refund_events(enriched: Enriched, mapping: MappingConfig) -> Iterator[Operation]:
    """Yield the events of the refunds.

    Every event has the properties of the order. If these are large, they are truncated so that all copies together are
    as large as one event can be. Raises Rejected if there are too many refunds.
    """
    refunds = [transaction for transaction in _transactions(enriched) if _is_refund(transaction, mapping)]
    if not refunds:
        raise Ignored(f"the payment has {_NO_REFUND}")
    if enriched.order is None and enriched.customer is None:
        raise Ignored("no order has this payment and it names no customer: a refund needs one of them")
    check_refunds(len(refunds))
    order = as_dict(enriched.order)
    profile = identifiers(order, enriched, mapping)
    properties = order_properties(order, items_of(order, enriched, mapping), enriched, mapping)
    properties, truncated = truncate(properties, EVENT_BYTES // len(refunds))
    first = _first_refund(enriched, mapping)
    for transaction in refunds:
        own_id = as_id(transaction.get("id"))
        refund = _refund_properties(transaction, mapping)
        operation = event_operation(
            metric=mapping.metrics.refunded_order,
            unique_id=(as_id(order.get("id")) if own_id == first else "") or own_id,
            time=event_time(enriched, transaction.get("timestamp"), enriched.notification.time),
            value=transaction.get("amount"),
            profile=profile,
            properties=own_first(refund, properties),
        )
        yield replace(operation, truncated=limit_paths(dict.fromkeys([*truncated, *operation.truncated])))


def _transactions(enriched: Enriched) -> list[Json]:
    """Return the transactions that the message is about. Their state is the one that the message states.

    If a message lacks its payload, these are all transactions of its payments.
    """
    payload = enriched.notification.payload
    if added := as_dict(payload.get("transaction")):
        return [added]
    if enriched.notification.type == "OrderPaymentAdded":
        payments = [payment for payment in enriched.added_payments if not _names_customer(payment)]
        return list(chain.from_iterable(as_dicts(payment.get("transactions")) for payment in payments))
    payment = as_dict(payload.get("payment")) or as_dict(enriched.payment)
    changed_id, state = as_text(payload.get("transactionId")), payload.get("state")
    found = [t for t in as_dicts(payment.get("transactions")) if not changed_id or t.get("id") == changed_id]
    return [transaction | {"state": state} for transaction in found] if state else found


def _names_customer(payment: Json) -> bool:
    return bool(as_text(as_dict(payment.get("customer")).get("id")))


def _first_refund(enriched: Enriched, mapping: MappingConfig) -> str:
    """Return the id of the transaction that stands first among all refunds of the order, or "".

    Its state does not matter, so that the answer stays the same when states change.
    """
    transactions = chain.from_iterable(as_dicts(payment.get("transactions")) for payment in enriched.payments)
    refunds = (t for t in transactions if t.get("type") in mapping.payment.refund_types)
    return next(filter(None, (as_id(transaction.get("id")) for transaction in refunds)), "")


def _is_refund(transaction: Json, mapping: MappingConfig) -> bool:
    return (
        transaction.get("type") in mapping.payment.refund_types
        and transaction.get("state") in mapping.payment.refund_states
        and bool(as_id(transaction.get("id")))
    )


def _refund_properties(transaction: Json, mapping: MappingConfig) -> Json:
    custom_fields = as_dict(as_dict(transaction.get("custom")).get("fields"))
    reason = as_text(custom_fields.get(mapping.payment.reason_field))
    return fields.compact(
        {
            "RefundAmount": fields.money(transaction.get("amount")),
            "RefundReason": reason,
            "Reason": reason,
            "TransactionId": as_text(transaction.get("id")),
        }
    )
