"""A mixture of messages as a busy shop sends them, and what Klaviyo must hold afterwards."""

from __future__ import annotations

import random
from collections import Counter
from itertools import cycle, islice
from typing import TYPE_CHECKING, Any

from worker.sandbox.notifications import bare, change, cloudevent, event_grid, eventbridge, message, sns
from worker.sandbox.shop import uid

if TYPE_CHECKING:
    from worker.sandbox import Sandbox

_ENVELOPES = (bare, cloudevent, event_grid, sns, eventbridge)


class Workload:
    """Messages about orders, customers, products, stock and categories: all orders and customers are different."""

    def __init__(self, sandbox: Sandbox, size: int) -> None:
        self._sandbox = sandbox
        self._orders = size // 2
        self._customers = size // 5
        order, customer = sandbox.shop.orders[uid("order:three")], sandbox.shop.customers[uid("customer:grete")]
        orders = [_order(order, number) for number in range(self._orders)]
        customers = [_customer(customer, number) for number in range(self._customers)]
        fetched = orders[: size // 10]  # the message does not hold these; they are read from commercetools
        sandbox.shop.orders |= {order["id"]: order for order in fetched}
        sandbox.shop.customers |= {customer["id"]: customer for customer in customers}
        notifications = [
            *(message("OrderCreated", "order", order["id"]) for order in fetched),
            *(message("OrderCreated", "order", order["id"], order=order) for order in orders[len(fetched) :]),
            *(change("ResourceUpdated", "customer", customer["id"]) for customer in customers),
        ]
        catalog = (
            *(message("ProductPublished", "product", name) for name in sandbox.shop.products),
            *(change("ResourceUpdated", "inventory-entry", name) for name in sandbox.shop.inventory),
            *(change("ResourceUpdated", "category", name) for name in sandbox.shop.categories),
        )
        notifications += islice(cycle(catalog), size - len(notifications))
        random.Random(size).shuffle(notifications)
        self.bodies = [wrap(entry) for entry, wrap in zip(notifications, cycle(_ENVELOPES), strict=False)]

    def is_done(self) -> bool:
        """Tell whether everything arrived, be it once or more often."""
        events, profiles = self._arrived()
        return events.total() >= 4 * self._orders and len(profiles) >= self._customers

    def assert_exactly_once(self) -> None:
        events, profiles = self._arrived()
        assert events == {"Placed Order": self._orders, "Ordered Product": 3 * self._orders}
        assert len(profiles) == self._customers == len(set(profiles))
        account, shop = self._sandbox.account, self._sandbox.shop
        assert len(account.items) == len([p for p in shop.products.values() if _is_published(p)])
        assert len(account.categories) == len(shop.categories)

    def _arrived(self) -> tuple[Counter[str], list[str]]:
        account = self._sandbox.account
        external = [profile["attributes"].get("external_id") or "" for profile in list(account.profiles)]
        return Counter(e["metric"] for e in list(account.events)), [n for n in external if n.startswith("customer-")]


def _order(template: dict[str, Any], number: int) -> dict[str, Any]:
    lines = [line | {"id": f"line-{number}-{index}"} for index, line in enumerate(template["lineItems"])]
    return template | {"id": f"order-{number}", "orderNumber": str(number), "lineItems": lines}


def _customer(template: dict[str, Any], number: int) -> dict[str, Any]:
    about = {"id": f"customer-{number}", "key": f"customer-{number}", "email": f"customer-{number}@example.com"}
    return template | about | {"addresses": []}


def _is_published(product: dict[str, Any]) -> bool:
    return bool(product.get("published", True))
