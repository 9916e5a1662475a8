"""Conversions from commercetools JSON to Klaviyo values."""

from __future__ import annotations

from decimal import Decimal

import pytest
from hypothesis import given

from tests.unit.test_parse import json_values
from worker.json_access import pick_ids
from worker.mapping import PropertyRules
from worker.transform import fields


def cents(amount: int, currency: str = "EUR", digits: int = 2) -> dict[str, object]:
    return {"type": "centPrecision", "centAmount": amount, "currencyCode": currency, "fractionDigits": digits}


@pytest.mark.parametrize(
    ("money", "expected"),
    [
        (cents(1999), 19.99),
        (cents(1200, "JPY", 0), 1200),
        (cents(1234, "KWD", 3), 1.234),
        (cents(-5), -0.05),
        (cents(0), 0),
        ({"type": "highPrecision", "preciseAmount": 123456, "fractionDigits": 5, "centAmount": 123}, 1.23456),
        ({"centAmount": 10}, 0.1),
        ({"centAmount": 10, "currencyCode": "EUR"}, 0.1),
        ({"centAmount": 1200, "currencyCode": "JPY"}, 1200),
        ({"centAmount": 1234, "currencyCode": "KWD"}, 1.234),
        (cents(True), None),
        ({"centAmount": "10", "fractionDigits": 2}, None),
        ({"centAmount": 10, "fractionDigits": 10**9}, None),
        ({"centAmount": 10, "fractionDigits": -1}, None),
        (None, None),
        ("12.00 EUR", None),
    ],
)
def test_money_is_exact_in_every_currency(money: object, expected: float | None) -> None:
    """A money counts minor units, whose size depends on the currency."""
    assert fields.money(money) == expected


def test_total_is_exact() -> None:
    """The sum of ten amounts of ten cents is one euro."""
    assert fields.total([cents(10)] * 10) == Decimal(1)
    assert fields.total([None, {}]) is None


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        ({"en": "English", "en-US": "American"}, "American"),
        ({"de": "Deutsch", "en": "English"}, "English"),
        ({"de": "Deutsch", "en-GB": "British"}, "British"),
        ({"de": "Deutsch", "fr": "Français"}, "Deutsch"),
        ({"en-US": "", "de": "Deutsch"}, "Deutsch"),
        ({"en-US": 5, "de": "Deutsch"}, "Deutsch"),
        ({}, ""),
        ("plain", "plain"),
        (None, ""),
    ],
)
def test_localized_text_falls_back_to_other_locales(texts: object, expected: str) -> None:
    """The order is: the locale, its language, a regional variant of the language, the first text."""
    assert fields.localized(texts, "en-US") == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("Acme", "Acme"),
        ({"key": "acme", "label": "Acme"}, "Acme"),
        ({"key": "acme", "label": {"en": "Acme EN", "de": "Acme DE"}}, "Acme EN"),
        ({"key": "acme", "label": None}, "acme"),
        ({"en": "Acme EN"}, "Acme EN"),
        ([{"key": "a", "label": "A"}, "B"], "A"),
        ([], ""),
        (12, ""),
    ],
)
def test_attribute_of_every_type_has_a_text(value: object, expected: str) -> None:
    """An attribute is a text, an enum, a localized enum, a localized text or a set of them."""
    assert fields.attribute_text(value, "en-US") == expected


def test_property_rules_select_and_rename() -> None:
    """Empty values are dropped. 0 and false are not empty."""
    values = {"a": 1, "b": "", "c": 0, "d": False, "e": None, "f": "x", "g": []}
    assert fields.filter_properties(values, PropertyRules()) == {"a": 1, "c": 0, "d": False, "f": "x"}
    rules = PropertyRules(include=["a", "f"], exclude=["f"], rename={"a": "A"})
    assert fields.filter_properties(values, rules) == {"A": 1}


def test_seconds_are_added_to_a_time() -> None:
    """An invalid or overflowing time gives an empty text, not an error."""
    assert fields.add_seconds("2026-12-31T23:59:59.500Z", 1) == "2027-01-01T00:00:00.500000+00:00"
    assert fields.add_seconds("9999-12-31T23:59:59Z", 1) == ""
    assert fields.add_seconds("yesterday", 1) == ""


@given(json_values)
def test_field_functions_accept_any_json(value: object) -> None:
    """No JSON value makes a field function raise."""
    fields.money(value)
    fields.currency(value)
    fields.localized(value, "en-US")
    fields.attribute_text(value, "en-US")
    fields.filter_properties(value, PropertyRules())
    fields.add_seconds(value, 1)
    pick_ids(value)
    fields.image_url({"images": value})
