"""The rule that selects prices."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.test_parse import json_values
from worker.json_access import as_dicts
from worker.mapping import MappingConfig
from worker.transform.prices import CurrentPrices, prices_of

NOW = datetime(2026, 11, 24, tzinfo=UTC)
STORE = {"id": "store"}


def price(amount: int, code: str = "EUR", **more: Any) -> dict[str, Any]:
    return {"value": {"centAmount": amount, "currencyCode": code, "fractionDigits": 2}, **more}


@pytest.mark.parametrize(
    ("prices", "options", "expected"),
    [
        ([], {}, None),
        ([{"value": "odd"}], {}, None),
        ([price(100), price(200, "USD")], {"currency": "USD"}, 2),
        ([price(200, "USD"), price(100)], {}, 1),
        ([price(100, discounted=price(80))], {}, 0.8),
        ([price(100, customerGroup={"id": "vip"}), price(200)], {}, 2),
        ([price(100, customerGroup={"id": "vip"}, validFrom="2026-11-01T00:00:00Z"), price(200)], {}, 2),
        ([price(100, recurrencePolicy={"id": "monthly"}), price(200)], {}, 2),
        ([price(100, active=False), price(200, active=True)], {}, 2),
        ([price(100), price(50, validFrom="2026-11-01T00:00:00Z", validUntil="2026-12-01T00:00:00Z")], {}, 0.5),
        ([price(100), price(50, validUntil="2026-11-24T00:00:00Z")], {}, 1),
        ([price(50, validUntil="2026-11-01T00:00:00Z")], {}, None),
        ([price(50, validFrom="2026-11-24T00:00:00Z")], {}, 0.5),
        ([price(50, validFrom="2026-11-24T00:00:01Z")], {}, None),
        ([price(70, validFrom="2026-11-20T00:00:00Z"), price(50, validFrom="2026-11-10T00:00:00Z")], {}, 0.5),
        ([price(100, channel=STORE), price(200)], {}, 2),
        ([price(100, channel=STORE)], {}, None),
        ([price(200), price(100, channel=STORE)], {"price": {"channel": "store"}}, 1),
        ([price(100, country="DE"), price(200, country="US")], {"price": {"country": "US"}}, 2),
        ([price(100, country="DE"), price(200)], {"price": {"country": "US"}}, 2),
        ([price(100, country="DE")], {"price": {"country": "US"}}, None),
        ([price(100, country="DE"), price(200, country="FR")], {}, None),
        (
            [price(1, country="DE", validFrom="2026-11-01T00:00:00Z"), price(2, channel=STORE)],
            {"price": {"channel": "store", "country": "DE"}},
            0.02,
        ),
        (
            [price(1, country="DE", channel=STORE), price(2, channel=STORE, validFrom="2026-11-01T00:00:00Z")],
            {"price": {"channel": "store", "country": "DE"}},
            0.01,
        ),
    ],
)
def test_most_specific_price_that_holds_now(prices: Any, options: dict[str, object], expected: float | None) -> None:
    """A price for the channel comes first, then one for the country, then one with a validity period."""
    assert CurrentPrices(prices, MappingConfig.model_validate(options), NOW).catalog_price() == expected


def test_metadata_has_one_price_per_currency_and_country() -> None:
    """Templates can show the price of any currency or country."""
    prices = [
        price(100),
        price(90, customerGroup={"id": "vip"}),
        price(80, validUntil="2026-11-01T00:00:00Z"),
        price(70, recurrencePolicy={"id": "monthly"}),
        price(60, "CHF", channel=STORE),
        price(120, country="DE"),
        price(300, "USD", country="US"),
        price(400, "CAD", country="US"),
        price(500, "GBP", country="GB", validFrom="2027-01-01T00:00:00Z"),
        price(600, country="FR", channel=STORE),
    ]
    assert CurrentPrices(prices, MappingConfig(), NOW).metadata() == (
        {"price_EUR": 1, "price_DE": 1.2, "price_US": 4},
        {"currency_DE": "EUR", "currency_US": "CAD"},
    )
    amounts, currencies = CurrentPrices(prices, MappingConfig(currency="USD"), NOW).metadata()
    assert (amounts["price_US"], currencies["currency_US"]) == (3, "USD")
    amounts, currencies = CurrentPrices(prices, MappingConfig(currency="EUR"), NOW).metadata()
    assert (amounts["price_US"], currencies["currency_US"]) == (4, "CAD"), "its own price, not that of no country"


def test_metadata_agrees_with_the_catalog_price() -> None:
    """The price of the preferred country is the catalog's, also if it is the price of a channel."""
    prices = [price(100), price(120, country="DE"), price(90, channel=STORE), price(50, "CHF", country="DE")]
    for options in ({"channel": "store"}, {}):
        mapping = MappingConfig.model_validate({"currency": "EUR", "price": {"country": "DE", **options}})
        amounts, _ = CurrentPrices(prices, mapping, NOW).metadata()
        assert amounts["price_DE"] == CurrentPrices(prices, mapping, NOW).catalog_price()


def test_standalone_prices_replace_embedded_ones() -> None:
    """A product with the price mode Standalone can still contain embedded prices, which commercetools ignores."""
    standalone = {"S ": [price(1)]}
    variant = {"sku": "S ", "prices": [price(2)]}
    assert prices_of({"priceMode": "Standalone"}, variant, standalone) == [price(1)]
    assert prices_of({"priceMode": "Standalone"}, {"sku": "other"}, standalone) == ()
    assert prices_of({"priceMode": "Embedded"}, variant, standalone) == [price(2)]


@given(st.lists(st.dictionaries(st.sampled_from([*price(1, country="DE"), "validFrom", "channel"]), json_values)))
def test_any_json_is_accepted(prices: object) -> None:
    """No JSON value makes the rule raise."""
    CurrentPrices(as_dicts(prices), MappingConfig(), NOW).catalog_price()
    CurrentPrices(as_dicts(prices), MappingConfig(), NOW).metadata()
