"""Payment messages -> Refunded Order, one event per refund transaction."""

from __future__ import annotations

from typing import TYPE_CHECKING

from worker.errors import Ignored, Rejected
from worker.json_access import as_dict, as_dicts, as_text
from worker.transform import fields
from worker.transform.order_events import all_line_properties, event_operation, identifiers, omissions, order_properties
from worker.transform.registry import handles

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from worker.mapping import MappingConfig
    from worker.model import Enriched, Json, Notification, Operation


def _check_refund(notification: Notification, mapping: MappingConfig) -> None:
    payload = notification.payload
    transaction = as_dict(payload.get("transaction"))
    if transaction and transaction.get("type") != "Refund":
        raise Ignored("the transaction is no refund")
    state = transaction.get("state", payload.get("state"))
    if isinstance(state, str) and state not in mapping.payment.refund_states:
        raise Ignored("no event for a transaction in this state: see payment.refund_states")


def _omissions(enriched: Enriched, mapping: MappingConfig) -> Iterator[str]:
    counted = [_counts(transaction, enriched.notification, mapping) for transaction in _transactions(enriched)]
    if others := counted.count(False):
        yield f"{others} of {len(counted)} transactions: no refund, or its state is not in payment.refund_states"
    yield from omissions(as_dict(enriched.order), enriched, mapping)


@handles(
    "PaymentTransactionAdded",
    "PaymentTransactionStateChanged",
    resource="payment",
    effect="Refunded Order, per refund transaction",
    precheck=_check_refund,
    omissions=_omissions,
)
def payment_transaction(enriched: Enriched, mapping: MappingConfig) -> Iterable[Operation]:
    """Refunded Order with the transaction's own amount; its id keeps several refunds of an order apart."""
    refunds = [t for t in _transactions(enriched) if _counts(t, enriched.notification, mapping)]
    if not refunds:
        raise Ignored("the payment has no such refund")
    if enriched.order is None and enriched.customer is None:
        raise Rejected("no order has this payment and it names no customer: nobody to record the refund for")
    order = as_dict(enriched.order)
    profile = identifiers(order, enriched)
    properties = order_properties(order, all_line_properties(order, enriched, mapping), enriched, mapping)
    for transaction in refunds:
        money = transaction.get("amount")
        refund = {
            "RefundAmount": fields.money(money),
            "RefundReason": _reason(transaction, mapping),
            "Reason": _reason(transaction, mapping),
            "TransactionId": as_text(transaction.get("id")),
        }
        yield event_operation(
            metric=mapping.metrics.refunded_order,
            unique_id=as_text(transaction.get("id")),
            time=fields.first_nonempty(as_text(transaction.get("timestamp")), enriched.notification.time or ""),
            value=money,
            profile=profile,
            properties=properties | fields.compact(refund),
        )


def _transactions(enriched: Enriched) -> list[Json]:
    """Return the transaction the message is about; all when its payload was not included."""
    payload = enriched.notification.payload
    added = as_dict(payload.get("transaction"))
    if added:
        return [added]
    known = as_dicts(as_dict(enriched.payment).get("transactions"))
    changed = as_text(payload.get("transactionId"))
    return [t for t in known if not changed or t.get("id") == changed]


def _counts(transaction: Json, notification: Notification, mapping: MappingConfig) -> bool:
    """Judge by the state the message reports; without one, by the payment's own."""
    state = notification.payload.get("state") or transaction.get("state")
    return (
        transaction.get("type") == "Refund"
        and state in mapping.payment.refund_states
        and bool(as_text(transaction.get("id")))
    )


def _reason(transaction: Json, mapping: MappingConfig) -> str:
    custom = as_dict(as_dict(transaction.get("custom")).get("fields"))
    return as_text(custom.get(mapping.payment.reason_field))
