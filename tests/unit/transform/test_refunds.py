"""Refunds: whatever the order of messages, states and readings, Klaviyo has every refund once."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from hypothesis import given
from hypothesis import strategies as st

from worker.commercetools.queries import InMemoryReader
from worker.enrich import Enricher
from worker.errors import Ignored
from worker.mapping import MappingConfig
from worker.model import Enriched, Notification
from worker.transform import transform

if TYPE_CHECKING:
    from worker.model import Json

NOW = datetime(2026, 11, 24, tzinfo=UTC)
TYPES = ("Charge", "Refund", "Chargeback")
PATHS = (("Success",), ("Initial", "Success"), ("Pending", "Failure"), ("Pending", "Success"), ("Initial",))


@dataclass
class Transaction:
    """A transaction that has the states of `path` one after the other."""

    id: str
    payment: str
    type: str
    path: tuple[str, ...]


@dataclass
class History:
    """An order with payments. `moments` are the transactions whose next state is reached, in order of time.

    At the moment `order_at` the order gets its payments.
    """

    payments: list[list[Transaction]]
    moments: list[Transaction]
    order_at: int
    events: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))  # unique_id -> transaction ids

    def reading(self, moment: int) -> dict[str, list[Json]]:
        """Return what commercetools shows at a moment. Transactions of the last payment appear one by one."""
        reached = self.moments[:moment]
        payments = [
            {
                "id": f"p{number}",
                "transactions": list(filter(None, (_state(t, reached, is_last) for t in transactions))),
            }
            for number, transactions in enumerate(self.payments)
            for is_last in [number == len(self.payments) - 1]
        ]
        references = [{"id": payment["id"]} for payment in payments]
        order = {"id": "order", "customerEmail": "ada@example.com", "paymentInfo": {"payments": references}}
        return {"payments": payments, "orders": [order] if moment >= self.order_at else []}

    def messages(self) -> list[tuple[int, Notification]]:
        """Return all messages, each with the moment of its publication."""
        added = [
            (self.order_at, _message("OrderPaymentAdded", "order", "order", paymentRef={"id": f"p{number}"}))
            for number in range(len(self.payments))
        ]
        seen: dict[str, int] = defaultdict(int)
        for moment, transaction in enumerate(self.moments, 1):
            state = transaction.path[seen[transaction.id]]
            seen[transaction.id] += 1
            change: dict[str, Any] = {"transactionId": transaction.id, "state": state}
            if seen[transaction.id] == 1:
                change = {"transaction": {"id": transaction.id, "type": transaction.type, "state": state}}
            kind = "PaymentTransactionAdded" if "transaction" in change else "PaymentTransactionStateChanged"
            added.append((moment, _message(kind, "payment", transaction.payment, **change)))
        return added

    def process(self, notification: Notification, moment: int) -> None:
        """Process a message as a worker does that reads commercetools at this moment."""
        (enriched,) = Enricher(InMemoryReader(self.reading(moment)), MappingConfig(), now=lambda: NOW).enrich(
            [notification]
        )
        assert isinstance(enriched, Enriched)
        try:
            operations = transform(enriched, MappingConfig())
        except Ignored:
            return
        for operation in operations:
            assert operation.resource is not None
            attributes = operation.resource["attributes"]
            self.events[attributes["unique_id"]].add(attributes["properties"]["TransactionId"])


def _message(kind: str, resource: str, resource_id: str, **payload: Any) -> Notification:
    return Notification(kind, resource, resource_id, "2026-11-23T10:00:00Z", payload)


def _state(transaction: Transaction, reached: list[Transaction], is_last: bool) -> Json | None:
    steps = reached.count(transaction)
    if is_last and not steps:
        return None
    return {"id": transaction.id, "type": transaction.type, "state": transaction.path[max(steps, 1) - 1]}


@st.composite
def histories(draw: st.DrawFn) -> tuple[History, list[tuple[Notification, int]]]:
    """Return a history, and its messages with the moment when each is processed. Some are processed twice."""
    shapes = draw(st.lists(st.lists(st.tuples(st.sampled_from(TYPES), st.sampled_from(PATHS)), max_size=3), max_size=3))
    payments = [
        [Transaction(f"t{number}.{index}", f"p{number}", *shape) for index, shape in enumerate(shape_of_payment)]
        for number, shape_of_payment in enumerate(shapes)
    ]
    steps = [t for transactions in payments for t in transactions for _ in t.path]
    moments = draw(st.permutations(steps))
    if payments:  # a payment's transactions only grow at the end
        last = payments[-1]
        order_of_appearance = list(dict.fromkeys(t.id for t in moments if t in last))
        last.sort(key=lambda t: order_of_appearance.index(t.id))
    history = History(payments, moments, draw(st.integers(0, len(moments))))
    processed = [
        (message, draw(st.integers(at, len(moments))))
        for at, message in history.messages()
        for _ in range(draw(st.integers(1, 2)))
    ]
    return history, draw(st.permutations(processed))


@given(histories())
def test_every_refund_is_sent_once(drawn: tuple[History, list[tuple[Notification, int]]]) -> None:
    """No refund is lost or doubled, and the first one of the order has the order's id."""
    history, processed = drawn
    for notification, moment in processed:
        history.process(notification, moment)
    refunds = [t for transactions in history.payments for t in transactions if t.type == "Refund"]
    sent = [ids for ids in history.events.values() if len(ids) == 1]
    assert len(sent) == len(history.events)  # no two refunds share a unique_id
    assert sorted(transaction for ids in sent for transaction in ids) == sorted(
        t.id for t in refunds if "Success" in t.path
    )
    if refunds and "Success" in refunds[0].path:
        assert history.events["order"] == {refunds[0].id}
