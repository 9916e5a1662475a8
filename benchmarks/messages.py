"""What the rows publish: messages about the resources that a sandbox with `--copies` holds, each about its own."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from worker.sandbox import sample_shop
from worker.sandbox.commercetools import copies
from worker.sandbox.notifications import bare, change, message, payload_not_included

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

FAT = 50_000  # bytes
_SHOP = sample_shop()


@dataclass(frozen=True, slots=True)
class Part:
    """One sort of message: number -> body, and what one adds to the account. `is_stock`: of variants in Klaviyo."""

    make: Callable[[int], bytes]
    adds: Mapping[str, int] = field(default_factory=dict)
    is_stock: bool = False


@dataclass(frozen=True, slots=True)
class Kind:
    """What a row publishes: its parts in turn. `settings`: environment of the worker, where not the default."""

    name: str
    parts: tuple[Part, ...]
    settings: Mapping[str, str] = field(default_factory=dict)

    def bodies(self, count: int) -> Iterator[bytes]:
        """Yield so many messages, about the resources 1 to `count`."""
        return (part.make(number) for number, part in self._numbered(count))

    def added(self, count: int) -> Counter[str]:
        """Return what so many messages add to an account, by the names of the sandbox's counts."""
        total: Counter[str] = Counter()
        for _, part in self._numbered(count):
            total.update(part.adds)
        return total

    def stocked(self, count: int) -> list[int]:
        """Return the numbers of the products that Klaviyo must have before."""
        return [number for number, part in self._numbered(count) if part.is_stock]

    def _numbered(self, count: int) -> Iterator[tuple[int, Part]]:
        return ((number, self.parts[number % len(self.parts)]) for number in range(1, count + 1))


def _order_created(number: int) -> bytes:
    return bare(message("OrderCreated", "order", f"order-{number}", order=copies.order(_SHOP, number)))


def _fat_order_created(number: int) -> bytes:
    custom = {"type": {"typeId": "type", "id": "type"}, "fields": {"note": "x" * FAT}}
    order = copies.order(_SHOP, number) | {"custom": custom}
    return bare(message("OrderCreated", "order", f"order-{number}", order=order))


def _order_created_absent(number: int) -> bytes:
    return bare(payload_not_included("OrderCreated", "order", f"order-{number}"))


def _order_completed(number: int) -> bytes:
    about = message("OrderStateChanged", "order", f"order-{number}", oldOrderState="Open", orderState="Complete")
    return bare(about)


def _customer_updated(number: int) -> bytes:
    return bare(change("ResourceUpdated", "customer", f"customer-{number}"))


def _product_published(number: int) -> bytes:
    return bare(message("ProductPublished", "product", f"product-{number}", scope="All"))


def _stock_updated(number: int) -> bytes:
    return bare(change("ResourceUpdated", "inventory-entry", f"inventory-entry-{number}"))


ORDER = Part(_order_created, {"events": 4, "profiles": 1})
_FETCHED = Part(_order_created_absent, {"events": 4, "profiles": 1})
_STATE = Part(_order_completed, {"events": 1, "profiles": 1})
CUSTOMER = Part(_customer_updated, {"profiles": 1})
_PRODUCT = Part(_product_published, {"items": 1, "variants": 2})
_STOCK = Part(_stock_updated, is_stock=True)

ORDERS = Kind("orders of 3 lines", (ORDER,))
FAT_ORDERS = Kind("orders of 50 KB", (Part(_fat_order_created, ORDER.adds),))
MIXTURE = Kind("mixture", (ORDER, _STOCK, ORDER, CUSTOMER) * 3 + (ORDER, _STATE) * 2 + (ORDER, _STOCK, ORDER, _PRODUCT))
KINDS = (
    ORDERS,
    Kind("orders of 3 lines, fetched", (_FETCHED,)),
    Kind("order states, bulk events auto", (_STATE,)),
    Kind("order states, bulk events always", (_STATE,), {"KLAVIYO_WORKER_BULK_EVENTS": "always"}),
    Kind("customer updates", (CUSTOMER,)),
    Kind("product publishes", (_PRODUCT,)),
    Kind("stock updates", (_STOCK,)),
    MIXTURE,
)
