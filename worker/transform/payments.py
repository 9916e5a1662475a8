"""Payment messages -> Refunded Order events, one per refund."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from worker.budget import check_refunds, limit_paths
from worker.errors import Ignored, Rejected
from worker.json_access import as_dict, as_dicts, as_text
from worker.transform import fields
from worker.transform.identity import identifiers
from worker.transform.line_items import items_of
from worker.transform.order_events import event_operation, order_omissions, order_properties
from worker.transform.registry import handles
from worker.transform.size_limits import EVENT_BYTES, truncate

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from worker.mapping import MappingConfig
    from worker.model import Enriched, Json, Notification, Operation


def _check_refund(notification: Notification, mapping: MappingConfig) -> None:
    payload = notification.payload
    transaction = as_dict(payload.get("transaction"))
    if transaction and transaction.get("type") != "Refund":
        raise Ignored("the transaction is not a refund")
    state = transaction.get("state", payload.get("state"))
    if isinstance(state, str) and state not in mapping.payment.refund_states:
        raise Ignored("no event for a transaction in this state: see payment.refund_states")


def _omissions(enriched: Enriched, mapping: MappingConfig) -> Iterator[str]:
    are_refunds = [_is_refund(transaction, enriched.notification, mapping) for transaction in _transactions(enriched)]
    if others := are_refunds.count(False):
        yield f"{others} of {len(are_refunds)} transactions: no refund, or its state is not in payment.refund_states"
    yield from order_omissions(enriched, mapping)


@handles(
    "PaymentTransactionAdded",
    "PaymentTransactionStateChanged",
    resource="payment",
    effect="Refunded Order, per refund transaction",
    precheck=_check_refund,
    omissions=_omissions,
)
def payment_transaction(enriched: Enriched, mapping: MappingConfig) -> Iterable[Operation]:
    """Create a Refunded Order event for every refund, with the refund's amount. The transaction id is the unique_id.

    Every event has the properties of the order. If these are large, they are truncated so that all copies together are
    as large as one event can be. Raises Rejected if there are too many refunds.
    """
    refunds = [t for t in _transactions(enriched) if _is_refund(t, enriched.notification, mapping)]
    if not refunds:
        raise Ignored("the payment has no refund in a state that payment.refund_states lists")
    if enriched.order is None and enriched.customer is None:
        raise Rejected("no order has this payment and it names no customer: a refund needs one of them")
    check_refunds(len(refunds))
    order = as_dict(enriched.order)
    profile = identifiers(order, enriched, mapping)
    properties = order_properties(order, items_of(order, enriched, mapping), enriched, mapping)
    properties, truncated = truncate(properties, EVENT_BYTES // len(refunds))
    for transaction in refunds:
        refund = _refund_properties(transaction, mapping)
        operation = event_operation(
            metric=mapping.metrics.refunded_order,
            unique_id=as_text(transaction.get("id")),
            time=fields.first_nonempty(as_text(transaction.get("timestamp")), enriched.notification.time or ""),
            value=transaction.get("amount"),
            profile=profile,
            properties=refund | properties | refund,  # first, so that they are not the ones to truncate
        )
        yield replace(operation, truncated=limit_paths(dict.fromkeys([*truncated, *operation.truncated])))


def _transactions(enriched: Enriched) -> list[Json]:
    """Return the transaction of the message, or all transactions of the payment if the payload is not included."""
    payload = enriched.notification.payload
    if added := as_dict(payload.get("transaction")):
        return [added]
    transactions = as_dicts(as_dict(enriched.payment).get("transactions"))
    changed_id = as_text(payload.get("transactionId"))
    return [t for t in transactions if not changed_id or t.get("id") == changed_id]


def _is_refund(transaction: Json, notification: Notification, mapping: MappingConfig) -> bool:
    """Return whether a transaction is a refund in one of `payment.refund_states`.

    The state in the message takes precedence over the state in the transaction.
    """
    state = notification.payload.get("state") or transaction.get("state")
    return (
        transaction.get("type") == "Refund"
        and state in mapping.payment.refund_states
        and bool(as_text(transaction.get("id")))
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
