"""The orders and payments of the sample shop."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from worker.sandbox.commercetools.shop import CREATED, address, by_id, money, reference, resource, uid

if TYPE_CHECKING:
    from worker.sandbox.http import Json


def _line_item(order: str, number: int, product: Json, *, quantity: int = 1, unit: Json | None = None) -> Json:
    """Return a line item of an order. `unit` is the unit price."""
    variant = product["masterVariant"]
    unit = unit or (variant["prices"][0]["value"] if variant["prices"] else money(2500))
    total = _cents(unit, quantity)
    return {
        "id": uid(f"line:{order}:{number}"),
        "productId": product["id"],
        "productSlug": product["slug"],
        "productType": product["productType"],
        "name": product["name"],
        "variant": {name: value for name, value in variant.items() if name != "availability"},
        "price": {"id": uid(f"price:{order}:{number}"), "value": unit},
        "quantity": quantity,
        "totalPrice": total,
        "discountedPricePerQuantity": [],
        "lineItemMode": "Standard",
        "state": [],
    }


def _cents(unit: Json, quantity: int) -> Json:
    """Return the total price in cents, rounded like commercetools."""
    if unit["type"] == "highPrecision":
        return money(round(unit["preciseAmount"] * quantity / 10 ** (unit["fractionDigits"] - 2)), unit["currencyCode"])
    return {**unit, "centAmount": unit["centAmount"] * quantity}


def _order(name: str, lines: list[Json], customer: Json | None, /, **more: Any) -> Json:
    total = sum(line["totalPrice"]["centAmount"] for line in lines)
    unit = lines[0]["totalPrice"] if lines else money(0)
    buyer = {"customerId": customer["id"], "customerEmail": customer["email"]} if customer else {}
    address = next(iter(customer["addresses"]), None) if customer else None
    addresses = {"billingAddress": address, "shippingAddress": address} if address else {}
    amount = {**unit, "centAmount": total}
    order = resource(
        "order",
        name,
        type="Order",
        orderNumber=f"R-{name}",
        orderState="Open",
        paymentState="Paid",
        origin="Customer",
        cart=reference("cart", name),
        shippingMode="Single",
        shipping=[],
        **buyer,
        **addresses,
        lineItems=lines,
        customLineItems=[],
        totalPrice=amount,
        taxedPrice={"totalGross": amount, "totalNet": amount, "totalTax": {**amount, "centAmount": total // 10}},
        shippingInfo={"shippingMethodName": "Parcel", "price": {**amount, "centAmount": 490}},
        refusedGifts=[],
        syncInfo=[],
    )
    return order | more


def sample_orders(products: dict[str, Json], customers: dict[str, Json]) -> dict[str, Json]:
    """Return the orders of the sample shop, which name its products and customers."""
    jeans, shirt, socks, card, cap, _ = products.values()
    grete, katherine, radia, *_, hostile = customers.values()
    guest_address = address("x", "Hedy", "Lamarque", "Frequency Way", "Wien", "AT", phone="+43 1 5012345")
    wrapping = {
        "id": uid("custom-line:gift"),
        "name": {"en": "Gift wrapping", "de": "Geschenkverpackung"},
        "slug": "gift-wrapping",
        "money": money(250),
        "quantity": 2,
        "totalPrice": money(500),
    }
    precise = {
        "type": "highPrecision",
        "currencyCode": "EUR",
        "preciseAmount": 123456,
        "centAmount": 123,
        "fractionDigits": 5,
    }
    three = [_line_item("three", 1, jeans, quantity=2), _line_item("three", 2, shirt), _line_item("three", 3, socks)]
    imported = _order("imported", [_line_item("imported", 1, cap)], katherine, origin="Import")
    del imported["cart"], imported["taxedPrice"]  # commercetools computes neither for imported orders
    tracking = {"trackingId": "JD0146", "carrier": "DHL", "isReturn": False}
    parcel = {"id": uid("parcel:guest"), "createdAt": CREATED, "trackingData": tracking}
    delivery = {"id": uid("delivery:guest"), "createdAt": CREATED, "items": [], "parcels": [parcel]}
    guest = {
        "customerEmail": "hedy.lamarque@mail.example",
        "billingAddress": guest_address,
        "anonymousId": "anon",
        "shippingInfo": {"shippingMethodName": "Parcel", "price": money(490), "deliveries": [delivery]},
    }
    return by_id(
        _order("three", three, grete, paymentInfo={"payments": [reference("payment", "card")]}),
        _order("guest", [_line_item("guest", 1, shirt)], None, **guest),
        _order("yen", [_line_item("yen", 1, jeans, unit=money(12800, "JPY", 0))], katherine),
        _order("precise", [_line_item("precise", 1, cap, quantity=100, unit=precise)], radia),
        _order("wrapped", [_line_item("wrapped", 1, card)], hostile, customLineItems=[wrapping]),
        _order("paid-twice", [_line_item("paid-twice", 1, jeans)], grete, paymentInfo=_two_payments()),
        _discounted(jeans, katherine),
        _order("hundred", [_line_item("hundred", n, (jeans, shirt, socks)[n % 3]) for n in range(100)], grete),
        _order("anonymous", [_line_item("anonymous", 1, socks)], None),
        imported,
        _order("recurring", [_line_item("recurring", 1, socks)], grete, origin="RecurringOrder"),
    )


def _two_payments() -> Json:
    return {"payments": [reference("payment", "voucher"), reference("payment", "second-card")]}


def _discounted(product: Json, customer: Json) -> Json:
    line = _line_item("discounted", 1, product, quantity=2)
    taken = {"discount": reference("cart-discount", "summer"), "discountedAmount": money(890)}
    discounted = {"value": money(8010), "includedDiscounts": [taken]}
    line["discountedPricePerQuantity"] = [{"quantity": 2, "discountedPrice": discounted}]
    return _order(
        "discounted",
        [line],
        customer,
        discountCodes=[{"discountCode": reference("discount-code", "summer"), "state": "MatchesCart"}],
        discountOnTotalPrice={"discountedAmount": money(500), "includedDiscounts": []},
    )


def sample_payments() -> dict[str, Json]:
    """Return the payments of the sample shop: charges, refunds, and one that no order has."""

    def transaction(name: str, kind: str, cents: int, state: str = "Success", **more: Any) -> Json:
        stamp = "2026-11-22T09:00:00.000Z"
        return {
            "id": uid(f"transaction:{name}"),
            "timestamp": stamp,
            "type": kind,
            "amount": money(cents),
            "state": state,
            **more,
        }

    reason: Json = {"custom": {"type": reference("type", "transaction"), "fields": {"reason": "Too small"}}}
    return by_id(
        resource(
            "payment",
            "card",
            amountPlanned=money(24700),
            transactions=[
                transaction("charge", "Charge", 24700),
                transaction("refund-1", "Refund", 8900, **reason),
                transaction("refund-2", "Refund", 900),
                transaction("refund-3", "Refund", 100, "Pending"),
            ],
        ),
        resource("payment", "voucher", transactions=[transaction("voucher", "Charge", 2000)]),
        resource("payment", "second-card", transactions=[transaction("refund-4", "Refund", 6900)]),
        resource("payment", "orphan", transactions=[transaction("refund-5", "Refund", 500)]),
    )
