"""The messages of the benchmarks. Each is about its own resource of a sandbox with `--copies`."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from math import ceil
from typing import TYPE_CHECKING, Any

from worker.sandbox import sample_shop
from worker.sandbox.commercetools import copies
from worker.sandbox.envelopes import bare
from worker.sandbox.notifications import change, message, payload_not_included

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

LARGE_NOTE = 50_000  # bytes
FORMER_NAME = "Former"  # the first name of customers before they are updated
_SHOP = sample_shop()


@dataclass(frozen=True, slots=True)
class MessageTemplate:
    """A function from number to body, and the objects each message adds to the account.

    `is_stock`: the messages change the stock of variants that Klaviyo must already have.
    """

    make: Callable[[int], bytes]
    adds: Mapping[str, int] = field(default_factory=dict)
    is_stock: bool = False


@dataclass(frozen=True, slots=True)
class MessageKind:
    """The messages of a row: its templates in turn.

    `has_verdict`: the account was asked what it does with repeated events, and ignores them. `changes`: messages about
    each resource, of which only the first one adds objects. `mapping`: the mapping file of the worker. `is_repeated`:
    the messages were processed before, so Klaviyo has their effect. `messages`: how many there are; 0: as many as the
    benchmark has for each row. `former`: a function from number to the attributes that the profile of a customer gets
    before the messages, so that they change it.
    """

    name: str
    templates: tuple[MessageTemplate, ...]
    has_verdict: bool = True
    changes: int = 1
    mapping: str = ""
    is_repeated: bool = False
    messages: int = 0
    former: Callable[[int], dict[str, Any]] | None = None

    def bodies(self, count: int) -> Iterator[bytes]:
        """Return `count` messages, about the resources 1 to `count` / `changes`."""
        resources = ceil(count / self.changes)
        return (template.make((number - 1) % resources + 1) for number, template in self._numbered(count))

    def added(self, count: int) -> Counter[str]:
        """Return how many objects `count` messages add to the account, by the names in the sandbox's counts."""
        total: Counter[str] = Counter()
        for _, template in self._numbered(ceil(count / self.changes)):
            total.update(template.adds)
        return total

    def stocked(self, count: int) -> list[int]:
        """Return the numbers of the products that Klaviyo must already have."""
        return [number for number, template in self._numbered(count) if template.is_stock]

    def _numbered(self, count: int) -> Iterator[tuple[int, MessageTemplate]]:
        return ((number, self.templates[number % len(self.templates)]) for number in range(1, count + 1))


def _order_created(number: int) -> bytes:
    return bare(message("OrderCreated", "order", f"order-{number}", order=copies.order(_SHOP, number)))


def _guest_order_created(number: int) -> bytes:
    order = {name: value for name, value in copies.order(_SHOP, number).items() if name != "customerId"}
    return bare(message("OrderCreated", "order", f"order-{number}", order=order))


def _large_order_created(number: int) -> bytes:
    custom = {"type": {"typeId": "type", "id": "type"}, "fields": {"note": "x" * LARGE_NOTE}}
    order = copies.order(_SHOP, number) | {"custom": custom}
    return bare(message("OrderCreated", "order", f"order-{number}", order=order))


def _order_created_absent(number: int) -> bytes:
    return bare(payload_not_included("OrderCreated", "order", f"order-{number}"))


def _order_completed(number: int) -> bytes:
    notification = message("OrderStateChanged", "order", f"order-{number}", oldOrderState="Open", orderState="Complete")
    return bare(notification)


def _customer_updated(number: int) -> bytes:
    return bare(change("ResourceUpdated", "customer", f"customer-{number}"))


def _product_published(number: int) -> bytes:
    return bare(message("ProductPublished", "product", f"product-{number}", scope="All"))


def _stock_updated(number: int) -> bytes:
    return bare(change("ResourceUpdated", "inventory-entry", f"inventory-entry-{number}"))


def _stock_of_new_product(number: int) -> bytes:
    return bare(change("ResourceUpdated", "inventory-entry", f"inventory-entry-wide-{number}"))


def _former(number: int) -> dict[str, Any]:  # noqa: ARG001 - all are equal
    return {"first_name": FORMER_NAME}


def _former_with_title(number: int) -> dict[str, Any]:
    """Return a property that the customer no longer has for 5 % of the customers: only a single request clears it."""
    return _former(number) | ({"properties": {"Title": "Dr."}} if number % 20 == 0 else {})


def _cart_updated(number: int) -> bytes:
    return bare(change("ResourceUpdated", "cart", f"cart-{number}"))


ORDER = MessageTemplate(_order_created, {"events": 4, "profiles": 1})
_GUEST_ORDER = MessageTemplate(_guest_order_created, ORDER.adds)
_FETCHED = MessageTemplate(_order_created_absent, {"events": 4, "profiles": 1})
_STATE = MessageTemplate(_order_completed, {"events": 1, "profiles": 1})
CUSTOMER = MessageTemplate(_customer_updated, {"profiles": 1})
_KNOWN_CUSTOMER = MessageTemplate(_customer_updated, {"profiles": 0})
_PRODUCT = MessageTemplate(_product_published, {"items": 1, "variants": 2})
_CART = MessageTemplate(_cart_updated, {"events": 4, "profiles": 1})
_CART_METRICS = '[metrics]\nstarted_checkout = "Started Checkout"\nadded_to_cart = "Added to Cart"\n'
_SAME_PRODUCT = MessageTemplate(_product_published, {"items": 0, "variants": 0})
_STOCK = MessageTemplate(_stock_updated, is_stock=True)
_NEW_STOCK = MessageTemplate(_stock_of_new_product, {"variants": 1})

ORDERS = MessageKind("orders of 3 lines", (ORDER,))
LARGE_ORDERS = MessageKind("orders of 50 KB", (MessageTemplate(_large_order_created, ORDER.adds),))
MIXTURE = MessageKind(
    "mixture", (ORDER, _STOCK, ORDER, CUSTOMER) * 3 + (ORDER, _STATE) * 2 + (ORDER, _STOCK, ORDER, _PRODUCT)
)
MESSAGE_KINDS = (
    ORDERS,
    MessageKind("orders of 3 lines, half by guests", (ORDER, _GUEST_ORDER)),
    MessageKind("orders of 3 lines, fetched", (_FETCHED,)),
    MessageKind("order states", (_STATE,)),
    MessageKind("order states, no verdict", (_STATE,), has_verdict=False),
    MessageKind("10 changes per cart", (_CART,), changes=10, mapping=_CART_METRICS),
    MessageKind("customer updates", (CUSTOMER,)),
    MessageKind("known customers, all change", (_KNOWN_CUSTOMER,), is_repeated=True, former=_former),
    MessageKind("known customers, 5 % clear", (_KNOWN_CUSTOMER,), is_repeated=True, former=_former_with_title),
    MessageKind("known customers, none changes", (_KNOWN_CUSTOMER,), is_repeated=True),
    MessageKind("product publishes", (_PRODUCT,)),
    MessageKind("publishes without a change", (_SAME_PRODUCT,), is_repeated=True),
    MessageKind("stock updates", (_STOCK,)),
    MessageKind("stock of a new product", (_NEW_STOCK,), messages=copies.WIDE),
    MIXTURE,
)
