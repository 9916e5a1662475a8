"""Line items and totals: what the golden folders do not cover."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from worker.mapping import MappingConfig
from worker.model import Enriched, Notification
from worker.transform import fields
from worker.transform.line_items import items_of
from worker.transform.order_totals import line_total, order_total, shipping_costs, tax_total

ENRICHED = Enriched(Notification("OrderCreated", "order", "o", None, {}), datetime(2026, 11, 24, tzinfo=UTC))


def eur(amount: int) -> dict[str, Any]:
    return {"centAmount": amount, "currencyCode": "EUR", "fractionDigits": 2}


def taxed(gross: int, **more: Any) -> dict[str, Any]:
    return {"taxedPrice": {"totalGross": eur(gross), **more}}


NET_ORDER = {
    "totalPrice": eur(1420),
    "lineItems": [{"totalPrice": eur(1000), **taxed(1190)}],
    "customLineItems": [{"totalPrice": eur(100)}],
    "shippingInfo": {"price": eur(420), "discountedPrice": {"value": eur(300)}, **taxed(500)},
    **taxed(1690),
}


@pytest.mark.parametrize(("setting", "amounts"), [("gross", (16.9, 11.9, 1, 5)), ("total", (14.2, 10, 1, 3))])
def test_amounts_of_a_shop_with_net_prices(setting: str, amounts: tuple[float, ...]) -> None:
    """With gross, orders, lines and shipping costs contain the tax, as refunds do."""
    mapping = MappingConfig.model_validate({"order": {"value": setting}})
    lines = [*NET_ORDER["lineItems"], *NET_ORDER["customLineItems"]]
    found = [order_total(NET_ORDER, mapping), *(line_total(line, mapping) for line in lines)]
    assert (*map(fields.money, found), fields.number(shipping_costs(NET_ORDER, mapping))) == amounts
    assert [item["RowTotal"] for item in items_of(NET_ORDER, ENRICHED, mapping)] == list(amounts[1:3])


@pytest.mark.parametrize("order", [{"totalPrice": eur(100)}, {"totalPrice": eur(100), "taxedPrice": {"totalGross": 5}}])
def test_order_without_tax_has_its_total(order: dict[str, Any]) -> None:
    """Orders without a tax rate have no taxed price."""
    assert order_total(order, MappingConfig()) == eur(100)
    assert tax_total(order) is None


def test_tax_is_the_difference_if_there_is_no_total() -> None:
    """The total of the tax is optional in commercetools; 0 is a total."""
    assert fields.number(tax_total(taxed(1000, totalNet=eur(840)))) == 1.6
    assert fields.number(tax_total(taxed(1000, totalNet=eur(1000), totalTax=eur(0)))) == 0


LINE = {
    "productId": "p/1",
    "productSlug": {"en": "mug", "de": "becher rot"},
    "name": {"en": "Mug", "de": "Becher"},
    "variant": {"sku": "A/1 #2&b"},
}


@pytest.mark.parametrize(
    ("locale", "texts", "name", "url"),
    [
        ("de-DE", "order", "Becher", "https://s/de-DE/becher%20rot?A%2F1%20%232%26b"),
        ("de-DE", "shop", "Mug", "https://s/en/mug?A%2F1%20%232%26b"),
        (None, "order", "Mug", "https://s/en/mug?A%2F1%20%232%26b"),
        ("fr", "order", "Mug", "https://s/fr/mug?A%2F1%20%232%26b"),
    ],
)
def test_texts_are_in_the_locale_of_the_order(locale: str | None, texts: str, name: str, url: str) -> None:
    """The buyer reads names and URLs, and the values in a URL are percent-encoded."""
    mapping = MappingConfig.model_validate(
        {
            "locale": "en",
            "product_url_template": "https://s/{{locale}}/{{productSlug}}?{{sku}}",
            "order": {"texts": texts},
        }
    )
    (item,) = items_of({"locale": locale, "lineItems": [LINE]}, ENRICHED, mapping)
    assert (item["ProductName"], item["ProductURL"]) == (name, url)


def test_placeholder_without_a_value_makes_no_url() -> None:
    """A line of a deleted product has no slug."""
    mapping = MappingConfig(product_url_template="https://s/{{productSlug}}")
    (item,) = items_of({"lineItems": [LINE | {"productSlug": None}]}, ENRICHED, mapping)
    assert "ProductURL" not in item


def test_sku_of_a_line_is_taken_as_it_is() -> None:
    """It is the external id of the variant in Klaviyo's catalog, where white space is part of it."""
    line = {"productId": "p", "variant": {"id": 1, "sku": " M 1"}}
    mapping = MappingConfig(product_url_template="https://shop.example/{{sku}}")
    (item,) = items_of({"lineItems": [line]}, ENRICHED, mapping)
    assert (item["SKU"], item["ProductURL"]) == (" M 1", "https://shop.example/%20M%201")
