"""Carts: whatever the order of clicks, orders, messages and readings, no event comes after the order or comes twice."""

from __future__ import annotations

from collections import Counter
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import FakeDelivery
from worker.commercetools.queries import InMemoryReader
from worker.enrich import Enricher
from worker.errors import Ignored, StaleRead
from worker.mapping import MappingConfig
from worker.model import Enriched, Message, Notification, SendResult
from worker.send.background import SenderWithBackground
from worker.transform import transform
from worker.versions import check_reading

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from worker.commercetools.queries import Query, QueryResult
    from worker.model import Json, Operation

MAPPING = MappingConfig.model_validate(
    {"metrics": {"started_checkout": "Started Checkout", "added_to_cart": "Added to Cart"}}
)
NOW = datetime(2026, 11, 24, tzinfo=UTC)
CLICKS = ("add", "more", "recalculate", "recalculate", "email", "empty", "order", "order", "merge")
EMPTY: Json = {
    "id": "cart",
    "version": 1,
    "cartState": "Active",
    "totalPrice": {"centAmount": 100, "currencyCode": "EUR"},
    "lineItems": [],
}


class Shop:
    """A cart with all states that it had, and its order.

    Readings of the cart are `lag` states behind. If `hides_orders`, readings of orders show none.
    """

    def __init__(self) -> None:
        self.states: list[Json] = [EMPTY]
        self.orders: list[Json] = []
        self.lag = 0
        self.hides_orders = False

    def click(self, what: str) -> None:
        """Change the cart, unless it is no longer active."""
        cart = self.states[-1]
        if cart["cartState"] != "Active":
            return
        lines = cart["lineItems"]
        added = {"id": f"line-{len(self.states)}", "variant": {"sku": f"sku-{len(lines)}"}, "quantity": 1}
        changes: dict[str, Json] = {
            "add": {"lineItems": [*lines, added]},
            "more": {"lineItems": [line | {"quantity": line["quantity"] + 1} for line in lines]},
            "recalculate": {},
            "email": {"customerEmail": "ada@example.com"},
            "empty": {"lineItems": []},
            "order": {"cartState": "Ordered"},
            "merge": {"cartState": "Merged"},
        }
        self.states.append(cart | changes[what] | {"version": len(self.states) + 1})
        if what == "order":
            self.orders = [{"id": "order", "cart": {"id": "cart"}}]

    def find(self, query: Query, values: Collection[str]) -> QueryResult:
        """Return what commercetools shows now, or before if the readings of this query lag."""
        carts = [self.states[max(len(self.states) - 1 - self.lag, 0)]]
        orders = [] if self.hides_orders else self.orders
        return InMemoryReader({"carts": carts, "orders": orders}).find(query, values)


class Account:
    """A Klaviyo account. It accepts every event."""

    def __init__(self) -> None:
        self.events: Counter[tuple[str, str]] = Counter()  # metric and unique_id

    def send(self, operations: Sequence[Operation]) -> list[SendResult]:
        """Record the events."""
        for operation in operations:
            assert operation.resource is not None
            attributes = operation.resource["attributes"]
            assert attributes["profile"]["data"]["attributes"]["email"] == "ada@example.com"
            metric = attributes["metric"]["data"]["attributes"]["name"]
            self.events[metric, attributes["unique_id"]] += 1
        return [SendResult(None, 1)] * len(operations)

    def close(self) -> None:
        """Do nothing."""


class Worker:
    """A worker that processes one message at a time, and so knows the order as soon as it processes it."""

    def __init__(self, shop: Shop, account: Account) -> None:
        self.shop, self.account = shop, account
        self.sender = SenderWithBackground(account, account)

    def process(self, version: int) -> bool:
        """Process the message of a version of the cart. Return False if its reading is stale."""
        notification = Notification("ResourceUpdated", "cart", "cart", "2026-11-23T10:00:00Z", {"version": version})
        (enriched,) = Enricher(self.shop, MAPPING, now=lambda: NOW).enrich([notification])
        assert isinstance(enriched, Enriched)
        message = Message(FakeDelivery(b""), 0.0, notification, enriched)
        try:
            check_reading(message, 100.0)
            self.sender.send(transform(enriched, MAPPING))
        except StaleRead:
            return False
        except Ignored:
            pass
        return True


def contents(states: Sequence[Json]) -> set[tuple[tuple[str, int], ...]]:
    """Return the distinct contents of a cart that a known person could check out."""
    return {
        tuple((line["variant"]["sku"], line["quantity"]) for line in state["lineItems"])
        for state in states
        if state["lineItems"] and state["cartState"] == "Active" and state.get("customerEmail")
    }


readings = st.one_of(st.integers(0, 2), st.just("hides orders"))  # one of the two readings is current
steps = st.one_of(st.sampled_from(CLICKS), st.tuples(st.sampled_from((0, 1)), st.integers(0, 4), readings))


@given(st.lists(steps, max_size=25))
def test_events_of_a_cart(history: list[str | tuple[int, int, int | str]]) -> None:
    """Two workers process its messages in any order, late or twice. One of their two readings is current."""
    shop, account = Shop(), Account()
    for click in ("add", "email"):
        shop.click(click)
    workers = Worker(shop, account), Worker(shop, account)
    before_the_order: Counter[tuple[str, str]] = Counter()
    for step in history:
        if isinstance(step, str):
            shop.click(step)
            before_the_order = account.events.copy() if step == "order" and shop.orders else before_the_order
        else:
            number, age, reading = step
            shop.lag, shop.hides_orders = (reading, False) if isinstance(reading, int) else (0, True)
            workers[number].process(max(len(shop.states) - age, 1))
            shop.lag, shop.hides_orders = 0, False
        assert not shop.orders or account.events == before_the_order  # no event after the order
    assert all(times <= len(workers) for times in account.events.values())  # each process sends it once
    for version in range(1, len(shop.states) + 1):
        assert workers[0].process(version)
    started = [unique_id for metric, unique_id in account.events if metric == "Started Checkout"]
    assert len(started) <= len(contents(shop.states))  # none for the same content, and none without a buyer
    last = shop.states[-1]
    if contents([last]):
        assert started
        assert {("Added to Cart", line["id"]) for line in last["lineItems"]} <= account.events.keys()
