"""Whose event an order event is: the identifiers of its profile.

An event carries identifiers only. It cannot change the name, the phone number or the address of a profile.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from worker.errors import Ignored, Rejected
from worker.json_access import as_dict, as_dicts, as_id
from worker.transform import fields

if TYPE_CHECKING:
    from worker.mapping import MappingConfig
    from worker.model import Enriched, Json

_NO_BUYER = "the order names no buyer: expected customerId, customerEmail, or an email in its addresses"
_GONE = "commercetools no longer has the customer of the order: with customer.erasure, no event brings the profile back"


def identifiers(order: Json, enriched: Enriched, mapping: MappingConfig) -> Json:
    """Return the identifiers of the profile of an order event: `email`, `external_id`, or both.

    Raises Ignored if the customer is gone and erasure is on. Raises Rejected if the order names no buyer.
    """
    if mapping.customer.erasure and as_id(order.get("customerId")) and enriched.customer is None:
        raise Ignored(_GONE)
    found = describe_identifiers(order, enriched)
    if not any(found.values()):
        raise Rejected(_NO_BUYER)
    return fields.compact(found)


def describe_identifiers(order: Json, enriched: Enriched) -> Json:
    """Return the identifiers of the profile of an order event, "" for those that are unknown.

    The email address of an order is never changed, so the customer's own one takes precedence: the order's would move
    the profile back to an earlier address. A message that a guest's order now belongs to a customer keeps the order's:
    Klaviyo then has its event already, and would count it again on another profile.
    """
    if enriched.notification.type == "OrderCustomerSet" and (email := email_of(order)):
        return {"email": email, "external_id": ""}
    customer = as_dict(enriched.customer)
    return {
        "email": as_id(customer.get("email")) or email_of(order),
        "external_id": as_id(order.get("customerId")) or as_id(customer.get("id")),
    }


def names_buyer(order: Json) -> bool:
    """Return whether an order names a customer or an email address."""
    return bool(as_id(order.get("customerId")) or email_of(order))


def email_of(order: Json) -> str:
    """Return the email address of an order or cart, or "": its own, else that of its billing or shipping address."""
    shipping = as_dicts(order.get("shipping"))  # with `shippingMode: Multiple`
    addresses = (
        order.get("billingAddress"),
        order.get("shippingAddress"),
        *(entry.get("shippingAddress") for entry in shipping),
    )
    return fields.first_nonempty(
        as_id(order.get("customerEmail")), *(as_id(as_dict(address).get("email")) for address in addresses)
    )
