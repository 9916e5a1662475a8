"""A large shop: many copies of a few sample resources. The copies are constant and indexed."""

from __future__ import annotations

from collections import defaultdict
from itertools import chain
from threading import Lock
from typing import TYPE_CHECKING

from worker.sandbox.commercetools.predicate import literals_at
from worker.sandbox.commercetools.shop import uid
from worker.sandbox.http import Json

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from worker.sandbox.commercetools.predicate import Literal, Path, Predicate
    from worker.sandbox.commercetools.shop import Shop

IDS = (
    "order-1, cart-1, customer-1, product-1, inventory-entry-1 and so on, up to N. order-1 and cart-1 belong to "
    "customer-1 and have three lines. product-1 has the variants sku-1-1 and sku-1-2. inventory-entry-1 is the stock "
    "of sku-1-1. product-wide has the variants sku-wide-1 to sku-wide-60, with inventory-entry-wide-1 and so on"
)
WIDE = 60  # variants of product-wide

Index = dict["Literal", list[Json]]


class Copies:
    """`number` copies of an order, a cart, a customer, a product and its inventory entry. Safe for many threads."""

    def __init__(self, shop: Shop, number: int) -> None:
        makers: dict[str, Callable[[Shop, int], Json]] = {
            "orders": order,
            "carts": cart,
            "customers": customer,
            "product-projections": product,
            "inventory": inventory_entry,
        }
        self._resources = {path: _by_id(make(shop, n) for n in range(1, number + 1)) for path, make in makers.items()}
        if number:
            self._resources["product-projections"] |= _by_id([wide_product(shop)])
            self._resources["inventory"] |= _by_id(wide_inventory(shop))
        self._indexes: dict[tuple[str, Path], Index] = {}
        self._lock = Lock()

    def get(self, collection: str, resource_id: str) -> Json | None:
        """Return a resource, or None."""
        return self._resources.get(collection, {}).get(resource_id)

    def candidates(self, collection: str, predicates: Sequence[Predicate]) -> Iterable[Json]:
        """Return a superset of the resources in a collection that match all predicates."""
        resources = self._resources.get(collection, {})
        keys = [predicate.index_keys for predicate in predicates if predicate.index_keys is not None]
        if not resources or not keys:
            return resources.values()
        found = (self._index(collection, path).get(value, ()) for path, value in min(keys, key=len))
        return _by_id(chain.from_iterable(found)).values()

    def _index(self, collection: str, path: Path) -> Index:
        """Return the resources by their values at a path."""
        with self._lock:
            index = self._indexes.get((collection, path))
            if index is None:
                index = defaultdict(list)
                for resource in self._resources[collection].values():
                    for literal in literals_at(resource, path):
                        index[literal].append(resource)
                index.default_factory = None
                self._indexes[collection, path] = index
        return index


def _by_id(resources: Iterable[Json]) -> dict[str, Json]:
    return {resource["id"]: resource for resource in resources}


def order(shop: Shop, number: int) -> Json:
    """Return a copy of an order with three lines."""
    template = shop.orders[uid("order:three")]
    lines = [line | {"id": f"line-{number}-{index}"} for index, line in enumerate(template["lineItems"], 1)]
    address = _with_own_phone(template["billingAddress"], number)
    copy = template | {
        "id": f"order-{number}",
        "orderNumber": f"R-{number}",
        "customerId": f"customer-{number}",
        "customerEmail": _email(number),
        "billingAddress": address,
        "shippingAddress": address,
        "lineItems": lines,
    }
    del copy["paymentInfo"]  # a payment belongs to one order
    return copy


def cart(shop: Shop, number: int) -> Json:
    """Return a cart with three lines that has reached checkout. It is not the cart of an order."""
    made = order(shop, number)
    names = ("version", "lastModifiedAt", "customerId", "customerEmail", "shippingAddress", "totalPrice", "taxedPrice")
    lines = [line | {"id": f"cart-{line['id']}"} for line in made["lineItems"]]
    return {"id": f"cart-{number}", "cartState": "Active", "lineItems": lines} | {name: made[name] for name in names}


def customer(shop: Shop, number: int) -> Json:
    """Return a copy of a customer with all fields."""
    template = shop.customers[uid("customer:grete")]
    return template | {
        "id": f"customer-{number}",
        "customerNumber": f"C-{number}",
        "email": _email(number),
        "addresses": [_with_own_phone(address, number) for address in template["addresses"]],
    }


def product(shop: Shop, number: int) -> Json:
    """Return a copy of a product with two variants."""
    template = shop.products[uid("product:slim-jeans")]
    (other,) = template["variants"]
    return template | {
        "id": f"product-{number}",
        "slug": {locale: f"{slug}-{number}" for locale, slug in template["slug"].items()},
        "masterVariant": template["masterVariant"] | {"sku": f"sku-{number}-1"},
        "variants": [other | {"sku": f"sku-{number}-2"}],
    }


def inventory_entry(shop: Shop, number: int) -> Json:
    """Return a copy of the inventory entry of a product's first variant."""
    template = shop.inventory[uid("inventory-entry:jeans-30")]
    return template | {"id": f"inventory-entry-{number}", "sku": f"sku-{number}-1"}


def wide_product(shop: Shop) -> Json:
    """Return a product with WIDE variants."""
    made = product(shop, 0)
    variants = [{**made["masterVariant"], "id": n, "sku": f"sku-wide-{n}"} for n in range(1, WIDE + 1)]
    return made | {"id": "product-wide", "masterVariant": variants[0], "variants": variants[1:]}


def wide_inventory(shop: Shop) -> list[Json]:
    """Return the inventory entries of a product with WIDE variants."""
    made = inventory_entry(shop, 0)
    return [made | {"id": f"inventory-entry-wide-{n}", "sku": f"sku-wide-{n}"} for n in range(1, WIDE + 1)]


def _email(number: int) -> str:
    return f"customer-{number}@mail.example"


def _with_own_phone(address: Json, number: int) -> Json:
    """Return a copy of an address with its own phone number. Klaviyo allows one profile per number."""
    return address | {"phone": f"030 {20_000_000 + number}"}
