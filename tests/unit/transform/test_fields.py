"""Conversions from commercetools JSON to Klaviyo values."""

from __future__ import annotations

from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.test_parse import json_values
from worker.json_access import pick_ids
from worker.mapping import PropertyRules
from worker.transform import fields
from worker.transform.size_limits import MAX_ARRAY, MAX_PROPERTIES, MAX_TEXT_BYTES, truncate


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


ADDRESS = {
    "apartment": "4b",
    "building": "",
    "streetNumber": "12",
    "streetName": "Main St",
    "additionalStreetInfo": "rear",
    "additionalAddressInfo": "ring twice",
    "city": "Berlin",
    "country": "DE",
    "state": "BE",
    "postalCode": "10115",
    "phone": "030 901820",
}


def test_location_joins_the_address_fields() -> None:
    """Empty fields leave no stray commas, and the region falls back to the state."""
    assert fields.location(ADDRESS) == {
        "address1": "4b, 12, Main St",
        "address2": "rear, ring twice",
        "city": "Berlin",
        "country": "DE",
        "region": "BE",
        "zip": "10115",
    }
    assert fields.location(None) == {}


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        (ADDRESS, "+4930901820"),
        ({"phone": "+1 (212) 555-2368"}, "+12125552368"),
        ({"phone": "030 901820", "mobile": "+49 171 1234567", "country": "DE"}, "+491711234567"),
        ({"phone": "030 901820", "mobile": "nonsense", "country": "DE"}, "+4930901820"),
        ({"phone": "030 901820"}, ""),
        ({"phone": "123", "country": "DE"}, ""),
        ({"phone": 49, "country": 7}, ""),
        ({}, ""),
    ],
)
def test_only_a_valid_phone_number_is_sent(address: object, expected: str) -> None:
    """An invalid number is dropped, because Klaviyo would reject the whole profile."""
    assert fields.phone(address) == expected


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
    fields.location(value)
    fields.address_properties(value)
    fields.phone({"phone": value, "country": value})
    fields.filter_properties(value, PropertyRules())
    fields.add_seconds(value, 1)
    pick_ids(value)
    fields.image_url({"images": value})


@given(st.dictionaries(st.text(), json_values, max_size=8))
def test_properties_within_the_limits_are_unchanged(properties: dict[str, object]) -> None:
    """Truncation starts only at Klaviyo's limits."""
    fitted, truncated = truncate(properties)
    assert (fitted, truncated) == (properties, [])


def _nested(depth: int) -> object:
    return {"inner": _nested(depth - 1)} if depth else "leaf"


def test_properties_beyond_the_limits_are_truncated_and_named() -> None:
    """The last entries are removed first, and the paths name the truncated properties."""
    fitted, truncated = truncate(
        {
            "long": "é" * MAX_TEXT_BYTES,
            "many": list(range(MAX_ARRAY + 5)),
            "deep": _nested(12),
            **{f"p{number}": number for number in range(MAX_PROPERTIES)},
        }
    )
    assert len(fitted["long"].encode()) <= MAX_TEXT_BYTES
    assert fitted["many"] == list(range(MAX_ARRAY))
    assert len(fitted) == MAX_PROPERTIES
    assert {"long", "many", "*"} <= set(truncated)
    assert any(path.startswith("deep.inner") for path in truncated)


@pytest.mark.parametrize("text", ["]]]]", "}}}}", '\\"]]]]', "[]]]]", "é]]]]"])
def test_brackets_in_a_text_do_not_affect_the_depth(text: str) -> None:
    """Klaviyo limits the depth of objects and arrays, not of brackets in texts."""
    fitted, truncated = truncate({"text": text, "deep": _nested(12)})
    assert fitted["text"] == text
    assert truncated == ["deep" + ".inner" * 9]


def test_largest_array_is_halved_until_the_properties_fit() -> None:
    """An order with thousands of lines keeps its first lines and its small properties."""
    items = [{"name": "x" * 2_000, "number": number} for number in range(3_000)]
    fitted, truncated = truncate({"Items": items, "OrderId": "1", "note": "y" * 50_000})
    assert fitted["OrderId"] == "1"
    assert fitted["Items"] == items[:1_500]
    assert truncated == ["Items"]
    assert truncate({"OrderId": "1", "note": "y" * 50_000}, max_bytes=1_000) == ({"OrderId": "1"}, ["note"])
