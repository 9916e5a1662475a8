"""A small sample shop with the unusual cases of real shops."""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

Json = dict[str, Any]
_NAMESPACE = uuid.UUID("6f1f9b9e-5d0c-4f3e-9d3b-2b1f0c7a9e11")
_CREATED = "2026-11-20T08:30:00.000Z"
_VERSION = 10  # of all resources; not lower than that of any sample notification


@dataclass
class Shop:
    """The resources in commercetools by id. `products` contains the published products only."""

    orders: dict[str, Json] = field(default_factory=dict)
    customers: dict[str, Json] = field(default_factory=dict)
    payments: dict[str, Json] = field(default_factory=dict)
    categories: dict[str, Json] = field(default_factory=dict)
    products: dict[str, Json] = field(default_factory=dict)
    inventory: dict[str, Json] = field(default_factory=dict)
    discount_codes: dict[str, Json] = field(default_factory=dict)
    standalone_prices: dict[str, Json] = field(default_factory=dict)
    carts: dict[str, Json] = field(default_factory=dict)
    states: dict[str, Json] = field(default_factory=dict)

    def collection(self, path: str) -> dict[str, Json] | None:
        """Return the resources behind a path of the HTTP API, or None."""
        names = {each.name.replace("_", "-"): each.name for each in fields(self)} | {"product-projections": "products"}
        return getattr(self, names[path]) if path in names and path != "products" else None

    def replace(self, resources: Mapping[str, Sequence[Json]]) -> None:
        """Replace the resources behind these paths of the HTTP API. Raises KeyError for an unknown path.

        A projection with `published: false` is left out, as commercetools shows it only as a staged one.
        """
        for path, shown in resources.items():
            collection = self.collection(path)
            if collection is None:
                raise KeyError(path)
            collection.clear()
            collection.update(_by_id(*(each for each in shown if each.get("published", True))))

    def personal_data(self) -> set[str]:
        """Return every email, phone number, name and street, for tests that search output for them."""
        found: set[str] = set()
        for resource in [*self.customers.values(), *self.orders.values()]:
            _collect(resource, found)
        return found


_PERSONAL = {
    "email",
    "customerEmail",
    "phone",
    "mobile",
    "firstName",
    "lastName",
    "streetName",
    "companyName",
    "company",
}


def _collect(value: Any, found: set[str]) -> None:
    if isinstance(value, dict):
        found.update(v for k, v in value.items() if k in _PERSONAL and isinstance(v, str) and len(v) > 3)  # noqa: PLR2004
        for entry in value.values():
            _collect(entry, found)
    elif isinstance(value, list):
        for entry in value:
            _collect(entry, found)


def uid(name: str) -> str:
    """Return the id for a readable name such as `order:guest` or `product:jeans`."""
    return str(uuid.uuid5(_NAMESPACE, name))


def money(cents: int, currency: str = "EUR", digits: int = 2) -> Json:
    """Return an amount of the type centPrecision."""
    return {"type": "centPrecision", "currencyCode": currency, "centAmount": cents, "fractionDigits": digits}


def reference(kind: str, name: str) -> Json:
    """Return a reference to `kind:name`."""
    return {"typeId": kind, "id": uid(f"{kind}:{name}")}


def _resource(kind: str, name: str, /, **fields: Any) -> Json:
    stamps = {"version": _VERSION, "createdAt": _CREATED, "lastModifiedAt": _CREATED}
    return {"id": uid(f"{kind}:{name}"), **stamps, **fields}


def _by_id(*resources: Json) -> dict[str, Json]:
    return {resource["id"]: resource for resource in resources}


def sample_shop() -> Shop:
    """Return the shop. It is the same every time."""
    products = _products()
    customers = _customers()
    return Shop(
        orders=_orders(products, customers),
        customers=customers,
        payments=_payments(),
        categories=_categories(),
        products=products,
        inventory=_inventory(),
        standalone_prices=_standalone_prices(),
        discount_codes=_by_id(_resource("discount-code", "summer", code="SUMMER10", name={"en": "Summer"})),
        states=_by_id(_resource("state", "handed-over", key="handed-over", type="OrderState")),
    )


def _categories() -> dict[str, Json]:
    def category(name: str, german: str, *ancestors: str) -> Json:
        slug = name.lower()
        path = [reference("category", ancestor) for ancestor in ancestors]
        parent = {"parent": path[-1]} if path else {}
        names = {"en": name, "de": german}
        return _resource("category", slug, name=names, slug={"en": slug}, ancestors=path, orderHint="0.1", **parent)

    return _by_id(
        category("Women", "Damen"),
        category("Pants", "Hosen", "women"),
        category("Jeans", "Jeans", "women", "pants"),
        category("Men", "Herren"),
        category("Shirts", "Hemden", "men"),
        category("Sale", "Angebote"),
    )


def price(cents: int, currency: str = "EUR", digits: int = 2, **more: Any) -> Json:
    """Return a price of a variant."""
    return {"id": uid(f"price:{cents}{currency}{more}"), "value": money(cents, currency, digits), **more}


def _variant(number: int, sku: str, prices: list[Json], brand: Any = None, image: str = "") -> Json:
    images = [{"url": f"https://images.shop.example/{image}", "dimensions": {"w": 800, "h": 1200}}] if image else []
    attributes = [{"name": "brand", "value": brand}] if brand else []
    return {"id": number, **({"sku": sku} if sku else {}), "prices": prices, "images": images, "attributes": attributes}


def _product(name: str, german: str, categories: list[str], *variants: Json, **more: Any) -> Json:
    slug = name.lower().replace(" ", "-")
    return _resource(
        "product",
        slug,
        name={"en": name, "de": german},
        slug={"en": slug, "de": f"{slug}-de"},
        productType=reference("product-type", "main"),
        categories=[reference("category", category) for category in categories],
        masterVariant=variants[0],
        variants=list(variants[1:]),
        published=True,
        hasStagedChanges=False,
        **more,
    )


def _products() -> dict[str, Json]:
    acme = {"key": "acme", "label": "Acme Denim"}
    discounted = {"value": money(5900), "discount": reference("product-discount", "autumn")}
    denim = [price(8900), price(9900, country="DE"), price(10900, "USD", country="US"), price(12800, "JPY", 0)]
    window: Json = {"validFrom": "2026-11-01T00:00:00.000Z", "validUntil": "2027-01-31T00:00:00.000Z"}
    stocked = _variant(1, "SOCKS", [price(900), price(700, **window)], "Warmfeet", "socks.jpg")
    stocked["availability"] = {"isOnStock": True, "availableQuantity": 250}
    return _by_id(
        _product(
            "Slim Jeans",
            "Schmale Jeans",
            ["jeans", "sale"],
            _variant(1, "JEANS-30", denim, acme, "jeans-30.jpg"),
            _variant(2, "JEANS-32", denim, acme, "jeans-32.jpg"),
            description={"en": "Blue, slim, and made to last."},
        ),
        _product(
            "Linen Shirt",
            "Leinenhemd",
            ["shirts"],
            _variant(1, "SHIRT-M", [price(6900, discounted=discounted)], "Acme Linen", "shirt.jpg"),
            _variant(2, "", [price(6900)]),
            description={"en": "Light as a breeze."},
        ),
        _product("Wool Socks", "Wollsocken", ["women", "men"], stocked),
        _product("Gift Card", "Gutschein", [], _variant(1, "GIFT", [])),
        _product("Cap", "Kappe", ["men"], _variant(1, "CAP & CO/1", [price(1999)], image="cap.jpg")),
        _product("Enamel Mug", "Emailbecher", [], _variant(1, "MUG", []), priceMode="Standalone"),
    )


def _standalone_prices() -> dict[str, Json]:
    def standalone(name: str, cents: int, **more: Any) -> Json:
        return _resource("standalone-price", name, **{"sku": "MUG", "value": money(cents), "active": True} | more)

    return _by_id(
        standalone("mug", 1490),
        standalone("mug-germany", 1590, country="DE"),
        standalone("mug-members", 990, customerGroup=reference("customer-group", "members")),
        standalone("mug-draft", 1190, active=False),
    )


def _inventory() -> dict[str, Json]:
    def entry(name: str, sku: str, quantity: int, **more: Any) -> Json:
        return _resource("inventory-entry", name, sku=sku, quantityOnStock=quantity, availableQuantity=quantity, **more)

    return _by_id(
        entry("jeans-30", "JEANS-30", 12),
        entry("jeans-32", "JEANS-32", 0),
        entry("jeans-30-store", "JEANS-30", 3, supplyChannel=reference("channel", "berlin-store")),
        entry("shirt", "SHIRT-M", 40),
        entry("cap", "CAP & CO/1", 7),
        entry("mug-north", "MUG", 6, supplyChannel=reference("channel", "north")),
        entry("mug-south", "MUG", 2, supplyChannel=reference("channel", "south")),
    )


def _address(name: str, first: str, last: str, street: str, city: str, country: str, **more: Any) -> Json:
    return {
        "id": name,
        "firstName": first,
        "lastName": last,
        "streetName": street,
        "streetNumber": "12",
        "postalCode": "10115",
        "city": city,
        "country": country,
        **more,
    }


def _customers() -> dict[str, Json]:
    berlin = _address("home", "Grete", "Hermannsdotter", "Invalidenstrasse", "Berlin", "DE", phone="030 901820")
    office = _address("office", "Grete", "Hermannsdotter", "Chausseestrasse", "Berlin", "DE", company="Kompiler GmbH")
    york = _address("home", "Katherine", "Johnstone", "Orbit Avenue", "New York", "US", mobile="+1 212 555 2368")
    wrong = _address("home", "Radia", "Perlmutter", "Spanning Tree Lane", "Boston", "US", phone="12")
    hostile = _address("home", "Ada \u202e\u0000\"'<b>", "O'Neil; DROP", "Null\\Street", "Łódź 🧵", "PL")
    custom = {"type": reference("type", "customer"), "fields": {"shoeSize": 38, "newsletter": False, "nickname": ""}}
    return _by_id(
        _resource(
            "customer",
            "grete",
            email="grete.hermannsdotter@mail.example",
            firstName="Grete",
            lastName="Hermannsdotter",
            companyName="Kompiler GmbH",
            customerNumber="C-1001",
            locale="de-DE",
            isEmailVerified=True,
            addresses=[office, berlin],
            defaultBillingAddressId="home",
            billingAddressIds=["home"],
            custom=custom,
        ),
        _resource(
            "customer",
            "katherine",
            email="katherine.johnstone@mail.example",
            firstName="Katherine",
            lastName="Johnstone",
            addresses=[york],
            billingAddressIds=["nowhere", "home"],
        ),
        _resource("customer", "radia", email="radia.perlmutter@mail.example", firstName="Radia", addresses=[wrong]),
        _resource("customer", "nameless", email="nameless.shopper@mail.example", addresses=[]),
        _resource(
            "customer",
            "hostile",
            email="hostile.unicode@mail.example",
            firstName=hostile["firstName"],
            lastName=hostile["lastName"],
            addresses=[hostile],
        ),
    )


def line_item(order: str, number: int, product: Json, *, quantity: int = 1, unit: Json | None = None) -> Json:
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
    order = _resource(
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


def _orders(products: dict[str, Json], customers: dict[str, Json]) -> dict[str, Json]:
    jeans, shirt, socks, card, cap, _ = products.values()
    grete, katherine, radia, *_, hostile = customers.values()
    guest_address = _address("x", "Hedy", "Lamarque", "Frequency Way", "Wien", "AT", phone="+43 1 5012345")
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
    three = [line_item("three", 1, jeans, quantity=2), line_item("three", 2, shirt), line_item("three", 3, socks)]
    imported = _order("imported", [line_item("imported", 1, cap)], katherine, origin="Import")
    del imported["cart"], imported["taxedPrice"]  # commercetools computes neither for imported orders
    tracking = {"trackingId": "JD0146", "carrier": "DHL", "isReturn": False}
    parcel = {"id": uid("parcel:guest"), "createdAt": _CREATED, "trackingData": tracking}
    delivery = {"id": uid("delivery:guest"), "createdAt": _CREATED, "items": [], "parcels": [parcel]}
    guest = {
        "customerEmail": "hedy.lamarque@mail.example",
        "billingAddress": guest_address,
        "anonymousId": "anon",
        "shippingInfo": {"shippingMethodName": "Parcel", "price": money(490), "deliveries": [delivery]},
    }
    return _by_id(
        _order("three", three, grete, paymentInfo={"payments": [reference("payment", "card")]}),
        _order("guest", [line_item("guest", 1, shirt)], None, **guest),
        _order("yen", [line_item("yen", 1, jeans, unit=money(12800, "JPY", 0))], katherine),
        _order("precise", [line_item("precise", 1, cap, quantity=100, unit=precise)], radia),
        _order("wrapped", [line_item("wrapped", 1, card)], hostile, customLineItems=[wrapping]),
        _order("paid-twice", [line_item("paid-twice", 1, jeans)], grete, paymentInfo=_two_payments()),
        _discounted(jeans, katherine),
        _order("hundred", [line_item("hundred", n, (jeans, shirt, socks)[n % 3]) for n in range(100)], grete),
        _order("anonymous", [line_item("anonymous", 1, socks)], None),
        imported,
        _order("recurring", [line_item("recurring", 1, socks)], grete, origin="RecurringOrder"),
    )


def _two_payments() -> Json:
    return {"payments": [reference("payment", "voucher"), reference("payment", "second-card")]}


def _discounted(product: Json, customer: Json) -> Json:
    line = line_item("discounted", 1, product, quantity=2)
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


def _payments() -> dict[str, Json]:
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
    return _by_id(
        _resource(
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
        _resource("payment", "voucher", transactions=[transaction("voucher", "Charge", 2000)]),
        _resource("payment", "second-card", transactions=[transaction("refund-4", "Refund", 6900)]),
        _resource("payment", "orphan", transactions=[transaction("refund-5", "Refund", 500)]),
    )
