"""A mixture of messages like that of a busy shop, and the expected content of Klaviyo."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass
from itertools import cycle, islice
from typing import TYPE_CHECKING, Any

from worker.sandbox.carts import METRICS
from worker.sandbox.commercetools.shop import uid
from worker.sandbox.envelopes import bare, cloudevent, event_grid, eventbridge, sns
from worker.sandbox.notifications import change, message

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from worker.sandbox import Sandbox

_ENVELOPES = (bare, cloudevent, event_grid, sns, eventbridge)
_EVENTS = {"Placed Order", "Ordered Product", *METRICS.values()}

Effect = tuple[str, str]  # kind and id: ("Placed Order", "order-7"), ("profile", "customer-3")


@dataclass(frozen=True, slots=True)
class Sent:
    """A message and its expected effects in Klaviyo."""

    name: str
    body: bytes
    effects: frozenset[Effect]


class Workload:
    """Messages about orders, customers, products, stock and categories. All orders and customers are different.

    With `has_carts`, there are also messages about carts. They need a worker whose mapping has the metrics METRICS.
    """

    def __init__(self, sandbox: Sandbox, size: int, *, has_carts: bool = False) -> None:
        self._sandbox = sandbox
        shop = sandbox.shop
        orders = [_order(shop.orders[uid("order:three")], number) for number in range(size // 2)]
        customers = [_customer(shop.customers[uid("customer:grete")], number) for number in range(size // 5)]
        self.fetched = {order["id"]: order for order in orders[: size // 10]}  # these are not in the messages
        shop.orders |= self.fetched
        shop.customers |= {customer["id"]: customer for customer in customers}
        entries = [
            *(_placed(order) for order in self.fetched.values()),
            *(_placed(order, order=order) for order in orders[size // 10 :]),
            *((change("ResourceUpdated", "customer", c["id"]), {("profile", c["id"])}) for c in customers),
        ]
        if has_carts:
            entries += [_in_checkout(sandbox, number) for number in range(size // 10)]
        entries += islice(cycle(_catalog(sandbox)), size - len(entries))
        random.Random(size).shuffle(entries)
        self.messages = [_sent(*entry, wrap) for entry, wrap in zip(entries, cycle(_ENVELOPES), strict=False)]

    @property
    def bodies(self) -> list[bytes]:
        return [sent.body for sent in self.messages]

    def remove(self, orders: Iterable[str]) -> list[Sent]:
        """Remove and return the messages about these orders, whose effects the caller checks itself."""
        placed = {("Placed Order", order) for order in orders}
        removed = [sent for sent in self.messages if sent.effects & placed]
        self.messages = [sent for sent in self.messages if sent not in removed]
        return removed

    def missing(self) -> list[Sent]:
        """Return the messages without their full effect."""
        arrived = self._arrived()
        return [sent for sent in self.messages if any(effect not in arrived for effect in sent.effects)]

    def surplus(self) -> list[Effect]:
        """Return the effects that exist more than once or that no message has."""
        expected = {effect for sent in self.messages for effect in sent.effects}
        arrived = self._arrived()
        return [
            *(effect for effect, count in arrived.items() for _ in range(count - 1)),
            *(effect for effect in arrived if effect[0] in _EVENTS and effect not in expected),
        ]

    def is_done(self) -> bool:
        """Return whether every effect exists at least once."""
        arrived = self._arrived()
        return all(effect in arrived for sent in self.messages for effect in sent.effects)

    def assert_exactly_once(self) -> None:
        assert [sent.name for sent in self.missing()] == []
        assert self.surplus() == []

    def _arrived(self) -> Counter[Effect]:
        account = self._sandbox.account
        with account.lock:
            events = [(event["metric"], _id_of(event)) for event in account.events]
            people = [profile["attributes"] for profile in account.profiles]
            catalog: list[Effect] = [
                *(("item", name) for name in account.items),
                *(("variant", name) for name in account.variants),
                *(("category", name) for name in account.categories),
            ]
        named = [(kind, p[name]) for p in people for kind, name in _NAMES_OF_PEOPLE if p.get(name)]
        return Counter([*events, *named, *catalog])


_NAMES_OF_PEOPLE = (("profile", "external_id"), ("profile with email", "email"))


def _id_of(event: dict[str, Any]) -> str:
    """Return the id in an effect. The unique_id of Started Checkout also has a hash of the cart's content."""
    name: str = event["unique_id"]
    return name.partition(":")[0] if event["metric"] == "Started Checkout" else name


def _in_checkout(sandbox: Sandbox, number: int) -> tuple[dict[str, Any], set[Effect]]:
    order = sandbox.shop.orders[uid("order:guest")]
    line = order["lineItems"][0] | {"id": f"cart-{number}-line"}
    fields = {name: order[name] for name in ("customerEmail", "totalPrice", "version", "lastModifiedAt")}
    cart = {"id": f"cart-{number}", "cartState": "Active", "lineItems": [line]} | fields
    sandbox.shop.carts[cart["id"]] = cart
    effects = {("Started Checkout", cart["id"]), ("Added to Cart", line["id"])}
    return change("ResourceUpdated", "cart", cart["id"], version=cart["version"]), effects


def _placed(order: dict[str, Any], /, **more: Any) -> tuple[dict[str, Any], set[Effect]]:
    lines = {("Ordered Product", line["id"]) for line in order["lineItems"]}
    return message("OrderCreated", "order", order["id"], **more), {("Placed Order", order["id"]), *lines}


def _catalog(sandbox: Sandbox) -> Iterator[tuple[dict[str, Any], set[Effect]]]:
    shop = sandbox.shop
    for name, product in shop.products.items():
        variants = [product["masterVariant"], *product["variants"]]
        skus = {("variant", variant["sku"]) for variant in variants if variant.get("sku")}
        yield message("ProductPublished", "product", name), {("item", name), *skus}
    for name, entry in shop.inventory.items():
        effects = set() if "supplyChannel" in entry else {("variant", entry["sku"])}
        yield change("ResourceUpdated", "inventory-entry", name), effects
    for name in shop.categories:
        yield change("ResourceUpdated", "category", name), {("category", name)}


def _sent(notification: dict[str, Any], effects: set[Effect], wrap: Any) -> Sent:
    kind = notification.get("type") or notification["notificationType"]
    resource = notification["resource"]
    return Sent(f"{kind} {resource['typeId']} {resource['id']}", wrap(notification), frozenset(effects))


def _order(template: dict[str, Any], number: int) -> dict[str, Any]:
    lines = [line | {"id": f"line-{number}-{index}"} for index, line in enumerate(template["lineItems"])]
    return template | {"id": f"order-{number}", "orderNumber": str(number), "lineItems": lines}


def _customer(template: dict[str, Any], number: int) -> dict[str, Any]:
    about = {"id": f"customer-{number}", "key": f"customer-{number}", "email": f"customer-{number}@example.com"}
    return template | about | {"addresses": []}
