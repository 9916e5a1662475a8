"""The sample shop has consistent references and the unusual cases of real shops."""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING, Any

import orjson
import phonenumbers
import pytest

from worker.sandbox import sample_shop

if TYPE_CHECKING:
    from collections.abc import Iterator

SHOP = sample_shop()


def references(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        if value.keys() == {"typeId", "id"}:
            yield value
        for entry in value.values():
            yield from references(entry)
    elif isinstance(value, list):
        for entry in value:
            yield from references(entry)


def everything() -> dict[str, dict[str, Any]]:
    names = ("orders", "customers", "payments", "categories", "products", "inventory", "discount_codes")
    return {name: getattr(SHOP, name) for name in names}


def test_shop_is_reproducible() -> None:
    """Changes to one instance do not affect another."""
    other = sample_shop()
    assert other == SHOP
    next(iter(other.orders.values()))["lineItems"].clear()
    assert sample_shop() == SHOP


@pytest.mark.parametrize("name", everything())
def test_resources_are_json_with_a_uuid(name: str) -> None:
    """Their dates are shortly before those of the samples."""
    collection = everything()[name]
    assert collection
    assert orjson.loads(orjson.dumps(collection)) == collection
    for key, resource in collection.items():
        assert key == resource["id"] == str(uuid.UUID(key))
        assert "2026-11-14" < resource["createdAt"] < "2026-11-24"


def test_references_exist() -> None:
    """They name categories, payments and discount codes of the shop."""
    targets = {"category": SHOP.categories, "payment": SHOP.payments, "discount-code": SHOP.discount_codes}
    found = [each for each in references(everything()) if each["typeId"] in targets]
    assert {each["typeId"] for each in found} == set(targets)
    assert all(each["id"] in targets[each["typeId"]] for each in found)
    for order in SHOP.orders.values():
        assert order.get("customerId") is None or order["customerId"] in SHOP.customers
        assert all(line["productId"] in SHOP.products for line in order["lineItems"])


def test_ancestors_start_with_the_root() -> None:
    """The last ancestor is the parent."""
    for category in SHOP.categories.values():
        above = [SHOP.categories[each["id"]] for each in category["ancestors"]]
        assert [len(each["ancestors"]) for each in above] == list(range(len(above)))
        assert category.get("parent") == (category["ancestors"][-1] if above else None)
    assert max(len(category["ancestors"]) for category in SHOP.categories.values()) == 2


def test_orders_cover_unusual_cases() -> None:
    """Examples are guests, yen, fractions of a cent, a hundred lines, and an order without a customer."""
    orders = list(SHOP.orders.values())
    assert {len(order["lineItems"]) for order in orders} >= {1, 3, 100}
    assert {order["totalPrice"]["currencyCode"] for order in orders} >= {"EUR", "JPY"}
    assert {order["origin"] for order in orders} == {"Customer", "Import", "RecurringOrder"}
    assert any(order.get("customerEmail") and not order.get("customerId") for order in orders)
    assert sum(not order.get("customerEmail") and not order.get("customerId") for order in orders) == 1
    assert any(order["customLineItems"] for order in orders)
    assert any(len(order.get("paymentInfo", {}).get("payments", [])) > 1 for order in orders)
    assert any(order.get("discountCodes") and order.get("discountOnTotalPrice") for order in orders)
    lines = [line for order in orders for line in order["lineItems"]]
    assert any(line["discountedPricePerQuantity"] for line in lines)
    assert {line["price"]["value"]["type"] for line in lines} == {"centPrecision", "highPrecision"}
    (imported,) = (order for order in orders if order["origin"] == "Import")
    assert not imported.keys() & {"cart", "taxedPrice"}


def test_products_cover_unusual_cases() -> None:
    """Examples are missing images, prices and SKUs, discounts, validity periods, and brands of two types."""
    products = list(SHOP.products.values())
    variants = [variant for product in products for variant in (product["masterVariant"], *product["variants"])]
    prices = [price for variant in variants for price in variant["prices"]]
    brands = [each["value"] for variant in variants for each in variant["attributes"] if each["name"] == "brand"]
    assert {"description" in product for product in products} == {True, False}
    assert {bool(variant["images"]) for variant in variants} == {True, False}
    assert {bool(variant["prices"]) for variant in variants} == {True, False}
    assert {"sku" in variant for variant in variants} == {True, False}
    assert any("availability" in variant for variant in variants)
    assert {price["value"]["currencyCode"] for price in prices} == {"EUR", "USD", "JPY"}
    for name in ("discounted", "validFrom", "validUntil", "country"):
        assert any(name in price for price in prices)
    assert {type(brand) for brand in brands} == {str, dict}
    assert any("supplyChannel" in entry for entry in SHOP.inventory.values())


def test_payments_cover_refund_states() -> None:
    """There are successful and pending refunds, and a payment without an order."""
    kinds = [
        [(transaction["type"], transaction["state"]) for transaction in payment["transactions"]]
        for payment in SHOP.payments.values()
    ]
    success, pending = ("Refund", "Success"), ("Refund", "Pending")
    assert any(each.count(success) == 2 and each.count(pending) == 1 for each in kinds)
    named = {each["id"] for each in references(SHOP.orders) if each["typeId"] == "payment"}
    assert SHOP.payments.keys() - named


def test_phone_numbers_are_valid_except_one() -> None:
    """They are valid in the country of their address."""
    found = [
        (address.get("mobile") or address.get("phone"), address["country"])
        for customer in SHOP.customers.values()
        for address in customer["addresses"]
    ]
    numbers = [phonenumbers.parse(phone, country) for phone, country in found if phone]
    assert sorted(map(phonenumbers.is_valid_number, numbers)) == [False, True, True]


def test_personal_data_is_complete() -> None:
    """It includes guests and addresses."""
    found = SHOP.personal_data()
    texts = {
        "grete.hermannsdotter@mail.example",
        "hedy.lamarque@mail.example",
        "Hermannsdotter",
        "Lamarque",
        "Invalidenstrasse",
        "Frequency Way",
        "030 901820",
        "+1 212 555 2368",
        "Kompiler GmbH",
    }
    assert texts <= found
    assert {customer["email"] for customer in SHOP.customers.values()} <= found


@pytest.mark.parametrize("path", ["product-projections", "discount-codes", "orders", "inventory"])
def test_collections_by_path(path: str) -> None:
    """Other attributes of the shop are not accessible."""
    assert SHOP.collection(path)
    for bad in ("products", "personal_data", "__class__", ""):
        assert SHOP.collection(bad) is None
