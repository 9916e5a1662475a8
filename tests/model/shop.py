"""The shop: its changes, the notifications about them, and the state that Klaviyo must have at the end.

The state of a resource is its version: it is a part of its name, and its price or its stock. The histories exclude:

- two people who share an email address, a phone number or a customer id, and a change of these
- data erasure: single tests have it
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tests.model.simulation import at
from worker.sandbox.commercetools.shop import money
from worker.sandbox.envelopes import bare
from worker.sandbox.notifications import change, message, payload_not_included

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tests.model.world import LaggingShop, Queue
    from worker.model import Json

CONSTANT: Json = {"id": "constant", "version": 1, "name": {"en": "Constant"}, "ancestors": []}  # a category
MOVING_SKU = "moving-sku"
EventKey = tuple[str, str, float]  # metric, unique_id, value


@dataclass(frozen=True, slots=True)
class Change:
    """How a change reaches the workers. All times are in seconds.

    `lag`: until commercetools shows it. `delay`: until the queue delivers the notification. `dated`: by which the date
    in the notification is wrong. `steps`: the threads that continue after the change, by their numbers.
    """

    lag: float = 0.0
    delay: float = 0.0
    dated: float = 0.0
    steps: Sequence[int] = ()


class ShopModel:
    """The shop. It publishes a notification for every change."""

    def __init__(self, shop: LaggingShop, queue: Queue, proceed: Callable[[Sequence[int]], None]) -> None:
        self._shop = shop
        self._proceed = proceed
        self._queue = queue
        self.bodies: list[bytes] = []  # good messages
        self.bad: Counter[bytes] = Counter()  # messages that must become dead letters
        self.customers: dict[str, Json] = {}
        self.categories: dict[str, Json] = {}
        self.products: dict[str, Json] = {}  # published
        self.unpublished: dict[str, Json] = {}
        self.stock: dict[str, Json] = {}
        self.owner = ""  # the product that has the SKU that moves
        self.orders: dict[str, Json] = {}
        self.refunds: dict[str, Json] = {}  # payments by order
        self.events: Counter[EventKey] = Counter()
        self._numbers: Counter[str] = Counter()
        shop.write("categories", CONSTANT["id"], CONSTANT, 0.0)

    def publish(self, body: bytes, how: Change) -> None:
        """Publish a message."""
        self.bodies.append(body)
        self._queue.publish(body, how.delay)
        self._proceed(how.steps)

    def publish_bad(self, body: bytes, how: Change) -> None:
        """Publish a message that can never succeed."""
        self.bad[body] += 1
        self._queue.publish(body, how.delay)
        self._proceed(how.steps)

    def repeat(self, number: int, how: Change) -> None:
        """Publish an earlier message again. Number 0 is the last one."""
        bodies = [*self.bad, *self.bodies]
        body = bodies[-1 - number % len(bodies)]
        (self.publish_bad if body in self.bad else self.publish)(body, how)

    # Customers

    def create_customer(self, how: Change) -> None:
        customer_id = self._new_id("customer")
        customer = {"id": customer_id, "version": 1, "email": f"{customer_id}@mail.example"}
        customer |= {"firstName": "Name 1", "addresses": []}
        self._write("customers", self.customers, customer, how)
        self._message("CustomerCreated", "customer", customer, how, customer=customer)

    def update_customer(self, customer_id: str, how: Change) -> None:
        version = self.customers[customer_id]["version"] + 1
        changed = self.customers[customer_id] | {"version": version, "firstName": f"Name {version}"}
        self._write("customers", self.customers, changed, how)
        self._notify("ResourceUpdated", "customer", changed, how)

    def delete_customer(self, customer_id: str, how: Change) -> None:
        self._remove("customers", "customer", self.customers, customer_id, how)

    def erase_customer(self, customer_id: str, how: Change) -> None:
        """Delete a customer with the data."""
        resource = self.customers.pop(customer_id)
        self._shop.write("customers", customer_id, None, how.lag)
        erased = change("ResourceDeleted", "customer", customer_id, version=resource["version"] + 1, dataErasure=True)
        self.publish(bare(erased), how)

    # Categories

    def create_category(self, parent_id: str | None, how: Change) -> None:
        category_id = self._new_id("category")
        parent = self.categories.get(parent_id or "")
        ancestors = [*parent["ancestors"], {"typeId": "category", "id": parent_id}] if parent else []
        category = {"id": category_id, "version": 1, "name": {"en": f"{category_id} 1"}, "ancestors": ancestors}
        self._write("categories", self.categories, category, how)
        self._notify("ResourceCreated", "category", category, how)

    def rename_category(self, category_id: str, how: Change) -> None:
        version = self.categories[category_id]["version"] + 1
        changed = self.categories[category_id] | {"version": version, "name": {"en": f"{category_id} {version}"}}
        self._write("categories", self.categories, changed, how)
        self._notify("ResourceUpdated", "category", changed, how)

    def move_category(self, category_id: str, parent_id: str | None, how: Change) -> None:
        """Give a category another parent. That changes the ancestors of its descendants, too, without a message."""
        parent = self.categories.get(parent_id or "")
        path = [*parent["ancestors"], {"typeId": "category", "id": parent_id}] if parent else []
        moved = self.categories[category_id]
        changed = moved | {"version": moved["version"] + 1, "ancestors": path}
        self._write("categories", self.categories, changed, how)
        for below in self.below(category_id):
            ids = [ancestor["id"] for ancestor in below["ancestors"]]
            ancestors = [*path, *below["ancestors"][ids.index(category_id) :]]
            self._write("categories", self.categories, below | {"ancestors": ancestors}, how)
        self._notify("ResourceUpdated", "category", changed, how)

    def below(self, category_id: str) -> list[Json]:
        """Return the descendants of a category."""
        return [
            category
            for category in self.categories.values()
            if category_id in (ancestor["id"] for ancestor in category["ancestors"])
        ]

    def delete_category(self, category_id: str, how: Change) -> None:
        """Delete a category. commercetools removes it from its products."""
        self._remove("categories", "category", self.categories, category_id, how)
        for product in list(self.products.values()):
            if category_id in _category_ids(product):
                kept = [each for each in _category_ids(product) if each != category_id]
                self._change_product(product, how, "ProductRemovedFromCategory", categories=kept)
        for product in self.unpublished.values():
            product["categories"] = [each for each in product["categories"] if each["id"] != category_id]

    def leaves(self) -> list[str]:
        """Return the categories without children."""
        parents = {ancestor["id"] for category in self.categories.values() for ancestor in category["ancestors"]}
        return [category for category in self.categories if category not in parents]

    # Products and stock

    def publish_product(self, product_id: str | None, category_id: str | None, how: Change) -> None:
        """Publish a product, in the constant category and in another one."""
        product_id = product_id or self._new_id("product")
        former = self.products.get(product_id) or self.unpublished.pop(product_id, {"id": product_id, "version": 0})
        categories = [CONSTANT["id"], *([category_id] if category_id else [])]
        self._change_product(former, how, "ProductPublished", categories=categories)

    def unpublish_product(self, product_id: str, how: Change) -> None:
        product = self.products.pop(product_id)
        self.owner = "" if self.owner == product_id else self.owner
        gone = product | {"version": product["version"] + 1}
        self.unpublished[product_id] = gone
        self._shop.write("product-projections", product_id, None, how.lag)
        self._message("ProductUnpublished", "product", gone, how)

    def move_sku(self, product_id: str, how: Change) -> None:
        """Move a SKU to a product. The messages of both products follow."""
        former, self.owner = self.owner, product_id
        for changed in {former, product_id} & self.products.keys():
            self._change_product(self.products[changed], how, "ProductPublished")

    def stock_product(self, product_id: str, how: Change) -> None:
        """Create an inventory entry for a SKU that had none."""
        entry = {"id": f"entry-of-{product_id}", "version": 1, "sku": f"{product_id}-sku", "availableQuantity": 1}
        self._write("inventory", self.stock, entry, how)
        self._notify("ResourceCreated", "inventory-entry", entry, how)

    def unstocked(self) -> list[str]:
        """Return the published products without an inventory entry."""
        return [name for name in self.products if f"entry-of-{name}" not in self.stock]

    def _change_product(
        self, product: Json, how: Change, kind: str, *, categories: Sequence[str] | None = None
    ) -> None:
        ids = _category_ids(product) if categories is None else categories
        changed = _product(product["id"], product["version"] + 1, ids, owns_moving=product["id"] == self.owner)
        self._write("product-projections", self.products, changed, how)
        self._message(kind, "product", changed, how, staged=False)

    def create_stock(self, how: Change) -> None:
        """Create an inventory entry. Its product was there before the worker, and has not changed since."""
        product_id = self._new_id("stocked")
        self._shop.write("product-projections", product_id, _product(product_id, 2), 0.0)
        entry = {"id": f"entry-of-{product_id}", "version": 1, "sku": f"{product_id}-sku", "availableQuantity": 1}
        self._write("inventory", self.stock, entry, how)
        self._notify("ResourceCreated", "inventory-entry", entry, how)

    def change_stock(self, entry_id: str, how: Change) -> None:
        version = self.stock[entry_id]["version"] + 1
        changed = self.stock[entry_id] | {"version": version, "availableQuantity": version}
        self._write("inventory", self.stock, changed, how)
        self._notify("ResourceUpdated", "inventory-entry", changed, how)

    # Orders

    def create_order(self, customer_id: str | None, *, with_payload: bool, how: Change) -> None:
        order_id = self._new_id("order")
        email = self.customers[customer_id]["email"] if customer_id else f"guest-of-{order_id}@mail.example"
        order = _order(order_id) | {"customerEmail": email, "createdAt": at(0.0)}
        order |= {"customerId": customer_id} if customer_id else {}
        self._write("orders", self.orders, order, how)
        self._expect("Placed Order", order_id, order["totalPrice"])
        for line in order["lineItems"]:
            self._expect("Ordered Product", line["id"], line["totalPrice"])
        body = message("OrderCreated", "order", order_id, created_at=at(how.dated), order=order)
        self.publish(bare(body if with_payload else payload_not_included("OrderCreated", "order", order_id)), how)

    def end_order(self, order_id: str, state: str, how: Change) -> None:
        order = self.orders[order_id]
        changed = order | {"version": order["version"] + 1, "orderState": state}
        self._write("orders", self.orders, changed, how)
        self._message("OrderStateChanged", "order", changed, how, orderState=state)
        metric = {"Complete": "Fulfilled Order", "Cancelled": "Cancelled Order"}[state]
        self._expect(metric, order_id, order["totalPrice"])

    def refund(self, order_id: str, how: Change) -> None:
        payment_id = f"payment-of-{order_id}"
        empty: Json = {"id": payment_id, "version": 0, "transactions": []}
        payment = self.refunds.get(order_id, empty)
        number = payment["version"] + 1
        amount = money(100 * number)
        added: Json = {
            "id": f"{payment_id}-{number}",
            "type": "Refund",
            "state": "Success",
            "amount": amount,
            "timestamp": at(0.0),
        }
        payment |= {"version": number, "transactions": [*payment["transactions"], added]}
        self.refunds[order_id] = payment
        self._shop.write("payments", payment_id, payment, how.lag)
        self._message("PaymentTransactionAdded", "payment", payment, how, transaction=added)
        self._expect("Refunded Order", order_id if number == 1 else added["id"], amount)

    def bad_order(self, kind: str, how: Change) -> None:
        """Publish an order without a buyer, or with an email address that Klaviyo rejects."""
        order = _order(self._new_id("bad-order")) | {"createdAt": at(0.0)}
        order |= {"customerEmail": "no address"} if kind == "email" else {}
        body = bare(message("OrderCreated", "order", order["id"], created_at=at(how.dated), order=order))
        self.publish_bad(body, how)

    def open_orders(self) -> list[str]:
        """Return the orders that are neither complete nor cancelled."""
        return [name for name, order in self.orders.items() if order["orderState"] == "Open"]

    # The state that Klaviyo must have

    def names(self) -> dict[str, str]:
        """Return the first name in the profile of each customer. Klaviyo keeps the profiles of deleted customers."""
        return {key: customer["firstName"] for key, customer in self.customers.items()}

    def breadcrumbs(self) -> dict[str, tuple[str]]:
        """Return the name of each catalog category."""
        paths = {
            key: [*(self.categories[ancestor["id"]] for ancestor in category["ancestors"]), category]
            for key, category in self.categories.items()
        }
        return self.constant_breadcrumb() | {
            key: (" > ".join(entry["name"]["en"] for entry in path),) for key, path in paths.items()
        }

    def constant_breadcrumb(self) -> dict[str, tuple[str]]:
        """Return the name of the category that has never changed. Klaviyo has it as soon as it has a product."""
        return {CONSTANT["id"]: (CONSTANT["name"]["en"],)}

    def items(self) -> dict[str, tuple[str, float, list[str]]]:
        """Return title, price and categories of each catalog item."""
        stocked = [_product(name, 2) for name in self._stocked()]
        return {
            product["id"]: (product["name"]["en"], _price(product), self._with_ancestors(_category_ids(product)))
            for product in [*self.products.values(), *stocked]
        }

    def variants(self) -> dict[str, tuple[str, float, int, str]]:
        """Return title, price, stock and item of each catalog variant."""
        stock = {entry["sku"]: entry["availableQuantity"] for entry in self.stock.values()}
        found = {}
        for product in [*self.products.values(), *(_product(name, 2) for name in self._stocked())]:
            for variant in [product["masterVariant"], *product["variants"]]:
                sku = variant["sku"]
                found[sku] = product["name"]["en"], _price(product), stock.get(sku, 0), product["id"]
        return found

    def _stocked(self) -> list[str]:
        """Return the products that were there before the worker."""
        names = [entry["sku"].removesuffix("-sku") for entry in self.stock.values()]
        return [name for name in names if name.startswith("stocked")]

    def _with_ancestors(self, category_ids: Sequence[str]) -> list[str]:
        paths = {CONSTANT["id"]: [], **{key: each["ancestors"] for key, each in self.categories.items()}}
        return sorted({*category_ids, *(each["id"] for key in category_ids for each in paths[key])})

    # Parts

    def _new_id(self, kind: str) -> str:
        self._numbers[kind] += 1
        return f"{kind}-{self._numbers[kind]}"

    def _expect(self, metric: str, unique_id: str, value: Json) -> None:
        self.events[metric, unique_id, value["centAmount"] / 100] += 1

    def _write(self, path: str, resources: dict[str, Json], resource: Json, how: Change) -> None:
        resources[resource["id"]] = resource
        self._shop.write(path, resource["id"], resource, how.lag)

    def _remove(self, path: str, kind: str, resources: dict[str, Json], resource_id: str, how: Change) -> None:
        resource = resources.pop(resource_id)
        self._shop.write(path, resource_id, None, how.lag)
        self._notify("ResourceDeleted", kind, resource | {"version": resource["version"] + 1}, how)

    def _notify(self, kind: str, resource_type: str, resource: Json, how: Change) -> None:
        version = resource["version"]
        body = change(kind, resource_type, resource["id"], version=version, modified_at=at(how.dated))
        self.publish(bare(body), how)

    def _message(self, kind: str, resource_type: str, resource: Json, how: Change, **fields: Any) -> None:
        body = message(
            kind, resource_type, resource["id"], created_at=at(how.dated), sequence=resource["version"], **fields
        )
        self.publish(bare(body), how)


def _price(product: Json) -> float:
    cents: int = product["masterVariant"]["prices"][0]["value"]["centAmount"]
    return cents / 100


def _product(
    product_id: str, version: int, categories: Sequence[str] = (CONSTANT["id"],), *, owns_moving: bool = False
) -> Json:
    price = {"id": "price", "value": money(100 * version)}
    # A second variant that comes and goes, and one that moves.
    further = [f"{product_id}-sku-2"] * (version % 2) + [MOVING_SKU] * owns_moving
    return {
        "id": product_id,
        "version": version,
        "name": {"en": f"{product_id} {version}"},
        "slug": {"en": product_id},
        "categories": [{"typeId": "category", "id": category} for category in categories],
        "masterVariant": {"id": 1, "sku": f"{product_id}-sku", "prices": [price], "images": [], "attributes": []},
        "variants": [{"id": number, "sku": sku, "prices": [price]} for number, sku in enumerate(further, 2)],
    }


def _category_ids(product: Json) -> list[str]:
    return [category["id"] for category in product["categories"]]


def _order(order_id: str) -> Json:
    total = money(100 * int(order_id.rpartition("-")[2]))
    line = {
        "id": f"{order_id}-line",
        "productId": "stocked-1",
        "name": {"en": "Product"},
        "variant": {"id": 1, "sku": "stocked-1-sku"},
        "price": {"id": "price", "value": total},
        "quantity": 1,
        "totalPrice": total,
    }
    return {
        "id": order_id,
        "version": 1,
        "orderNumber": order_id,
        "orderState": "Open",
        "lineItems": [line],
        "customLineItems": [],
        "totalPrice": total,
        "paymentInfo": {"payments": [{"typeId": "payment", "id": f"payment-of-{order_id}"}]},
    }
