"""Conversions from commercetools addresses to Klaviyo values. Malformed data gives "" or {}, but never an error."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import phonenumbers

from worker.json_access import as_dict, as_dicts, as_text
from worker.transform.fields import compact, first_nonempty

if TYPE_CHECKING:
    from collections.abc import Iterator

    from worker.model import Json


def _join(address: Json, *names: str) -> str:
    return ", ".join([text for name in names if (text := as_text(address.get(name)))])


def _street(address: Json) -> str:
    return _join(address, "apartment", "building", "streetNumber", "streetName")


def _street_details(address: Json) -> str:
    return _join(address, "additionalStreetInfo", "additionalAddressInfo")


def _region(address: Json) -> str:
    return first_nonempty(as_text(address.get("region")), as_text(address.get("state")))


def customer_address(customer: Json) -> Json:
    """Return the default billing address, otherwise the first billing address, otherwise the first address."""
    addresses = as_dicts(customer.get("addresses"))
    by_id = {as_text(address.get("id")): address for address in addresses}
    billing = customer.get("billingAddressIds")
    ids = [customer.get("defaultBillingAddressId"), *(billing if isinstance(billing, list) else [])]
    found = (by_id[key] for key in map(as_text, ids) if key and key in by_id)
    return next(found, addresses[0] if addresses else {})


def location(address: Any) -> Json:
    """Return a profile's `location`, or {}."""
    return compact(whole_location(address))


def whole_location(address: Any) -> Json:
    """Return all parts of a profile's `location` that the worker owns, with None for those without a value."""
    address = as_dict(address)
    parts = {
        "address1": _street(address),
        "address2": _street_details(address),
        "city": as_text(address.get("city")),
        "country": as_text(address.get("country")),
        "region": _region(address),
        "zip": as_text(address.get("postalCode")),
    }
    return {name: text or None for name, text in parts.items()}


def address_properties(address: Any) -> Json:
    """Return an address with the names that Klaviyo's templates use (`BillingAddress`, `ShippingAddress`), or {}."""
    address = as_dict(address)
    country = as_text(address.get("country"))
    return compact(
        {
            "FirstName": as_text(address.get("firstName")),
            "LastName": as_text(address.get("lastName")),
            "Company": as_text(address.get("company")),
            "Address1": _street(address),
            "Address2": _street_details(address),
            "City": as_text(address.get("city")),
            "Region": _region(address),
            "RegionCode": as_text(address.get("state")),
            "Country": country,
            "CountryCode": country,
            "Zip": as_text(address.get("postalCode")),
            "Phone": first_nonempty(as_text(address.get("mobile")), as_text(address.get("phone"))),
        }
    )


def phone(address: Any) -> str:
    """Return the mobile number of an address, otherwise its phone number, in E.164; "" if neither is valid.

    Klaviyo rejects a whole profile if libphonenumber does not accept its number.
    """
    address = as_dict(address)
    country = as_text(address.get("country")) or None
    candidates = (as_text(address.get("mobile")), as_text(address.get("phone")))
    return next(filter(None, (_e164(text, country) for text in candidates)), "")


def report_invalid_phone(address: Any) -> Iterator[str]:
    """Describe the phone numbers of an address if none of them is valid."""
    if _join(as_dict(address), "mobile", "phone") and not phone(address):
        yield "phone_number: neither mobile nor phone of the address is a valid number"


def _e164(text: str, country: str | None) -> str:
    try:
        parsed = phonenumbers.parse(text, country)
    except phonenumbers.NumberParseException:
        return ""
    if not phonenumbers.is_valid_number(parsed):
        return ""
    return phonenumbers.format_number(parsed, phonenumbers.PhoneNumberFormat.E164)
