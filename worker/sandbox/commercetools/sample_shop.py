"""A small sample shop with the unusual cases of real shops."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from worker.sandbox.commercetools.sample_orders import sample_orders, sample_payments
from worker.sandbox.commercetools.shop import Shop, address, by_id, money, price, reference, resource

if TYPE_CHECKING:
    from worker.sandbox.http import Json


def sample_shop() -> Shop:
    """Return the shop. It is the same every time."""
    products = _products()
    customers = _customers()
    return Shop(
        orders=sample_orders(products, customers),
        customers=customers,
        payments=sample_payments(),
        categories=_categories(),
        products=products,
        inventory=_inventory(),
        standalone_prices=_standalone_prices(),
        discount_codes=by_id(resource("discount-code", "summer", code="SUMMER10", name={"en": "Summer"})),
        states=by_id(resource("state", "handed-over", key="handed-over", type="OrderState")),
    )


def _categories() -> dict[str, Json]:
    def category(name: str, german: str, *ancestors: str) -> Json:
        slug = name.lower()
        path = [reference("category", ancestor) for ancestor in ancestors]
        parent = {"parent": path[-1]} if path else {}
        names = {"en": name, "de": german}
        return resource("category", slug, name=names, slug={"en": slug}, ancestors=path, orderHint="0.1", **parent)

    return by_id(
        category("Women", "Damen"),
        category("Pants", "Hosen", "women"),
        category("Jeans", "Jeans", "women", "pants"),
        category("Men", "Herren"),
        category("Shirts", "Hemden", "men"),
        category("Sale", "Angebote"),
    )


def _variant(number: int, sku: str, prices: list[Json], brand: Any = None, image: str = "") -> Json:
    images = [{"url": f"https://images.shop.example/{image}", "dimensions": {"w": 800, "h": 1200}}] if image else []
    attributes = [{"name": "brand", "value": brand}] if brand else []
    return {"id": number, **({"sku": sku} if sku else {}), "prices": prices, "images": images, "attributes": attributes}


def _product(name: str, german: str, categories: list[str], *variants: Json, **more: Any) -> Json:
    slug = name.lower().replace(" ", "-")
    return resource(
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
    return by_id(
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
        return resource("standalone-price", name, **{"sku": "MUG", "value": money(cents), "active": True} | more)

    return by_id(
        standalone("mug", 1490),
        standalone("mug-germany", 1590, country="DE"),
        standalone("mug-members", 990, customerGroup=reference("customer-group", "members")),
        standalone("mug-draft", 1190, active=False),
    )


def _inventory() -> dict[str, Json]:
    def entry(name: str, sku: str, quantity: int, **more: Any) -> Json:
        return resource("inventory-entry", name, sku=sku, quantityOnStock=quantity, availableQuantity=quantity, **more)

    return by_id(
        entry("jeans-30", "JEANS-30", 12),
        entry("jeans-32", "JEANS-32", 0),
        entry("jeans-30-store", "JEANS-30", 3, supplyChannel=reference("channel", "berlin-store")),
        entry("shirt", "SHIRT-M", 40),
        entry("cap", "CAP & CO/1", 7),
        entry("mug-north", "MUG", 6, supplyChannel=reference("channel", "north")),
        entry("mug-south", "MUG", 2, supplyChannel=reference("channel", "south")),
    )


def _customers() -> dict[str, Json]:
    berlin = address("home", "Grete", "Hermannsdotter", "Invalidenstrasse", "Berlin", "DE", phone="030 901820")
    office = address("office", "Grete", "Hermannsdotter", "Chausseestrasse", "Berlin", "DE", company="Kompiler GmbH")
    york = address("home", "Katherine", "Johnstone", "Orbit Avenue", "New York", "US", mobile="+1 212 555 2368")
    wrong = address("home", "Radia", "Perlmutter", "Spanning Tree Lane", "Boston", "US", phone="12")
    hostile = address("home", "Ada \u202e\u0000\"'<b>", "O'Neil; DROP", "Null\\Street", "Łódź 🧵", "PL")
    custom = {"type": reference("type", "customer"), "fields": {"shoeSize": 38, "newsletter": False, "nickname": ""}}
    return by_id(
        resource(
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
        resource(
            "customer",
            "katherine",
            email="katherine.johnstone@mail.example",
            firstName="Katherine",
            lastName="Johnstone",
            addresses=[york],
            billingAddressIds=["nowhere", "home"],
        ),
        resource("customer", "radia", email="radia.perlmutter@mail.example", firstName="Radia", addresses=[wrong]),
        resource("customer", "nameless", email="nameless.shopper@mail.example", addresses=[]),
        resource(
            "customer",
            "hostile",
            email="hostile.unicode@mail.example",
            firstName=hostile["firstName"],
            lastName=hostile["lastName"],
            addresses=[hostile],
        ),
    )
