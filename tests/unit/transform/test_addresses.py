"""Conversions from commercetools addresses to Klaviyo values."""

from __future__ import annotations

import pytest
from hypothesis import given

from tests.unit.test_parse import json_values
from worker.transform import addresses

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
    assert addresses.location(ADDRESS) == {
        "address1": "4b, 12, Main St",
        "address2": "rear, ring twice",
        "city": "Berlin",
        "country": "DE",
        "region": "BE",
        "zip": "10115",
    }
    assert addresses.location(None) == {}


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
    assert addresses.phone(address) == expected


@given(json_values)
def test_address_functions_accept_any_json(value: object) -> None:
    """No JSON value makes an address function raise."""
    addresses.location(value)
    addresses.address_properties(value)
    addresses.phone({"phone": value, "country": value})
