"""New orders -> name, place and locale of the buyer, on the profile of a guest.

A customer's own messages write the customer's profile. A guest has only orders.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from worker.json_access import as_dict, as_id, as_text
from worker.model import Json, Operation, OperationKind
from worker.transform import addresses, fields
from worker.transform.size_limits import ATTRIBUTE_BYTES, truncate

if TYPE_CHECKING:
    from collections.abc import Iterator

    from worker.mapping import MappingConfig


def buyer_profile(order: Json, identifiers: Json, mapping: MappingConfig) -> Iterator[Operation]:
    """Yield the upsert of the buyer's profile with name, place and locale, if `order.buyer` allows it.

    `identifiers` are those of the order's events. By default only the profile of a guest is written: one without an
    external_id. The phone number is left out by default: a guest can state any number, and Klaviyo would merge the
    profiles.
    """
    is_guest = not as_id(order.get("customerId"))
    if not identifiers.get("email") or mapping.order.buyer not in (("guests", "all") if is_guest else ("all",)):
        return
    if contents := _attributes(order, mapping):
        fitting, truncated = truncate(contents, ATTRIBUTE_BYTES)
        resource = {"type": "profile", "attributes": identifiers | fitting}
        key = as_text(identifiers["email"]).lower()
        writes_all = mapping.order.buyer == "all"
        yield Operation(OperationKind.UPSERT_GUEST, key, resource, any_profile=writes_all, truncated=truncated)


def _attributes(order: Json, mapping: MappingConfig) -> Json:
    """Return the attributes of the buyer, without empty ones."""
    address = as_dict(order.get("billingAddress"))
    return fields.compact(
        {
            "first_name": as_text(address.get("firstName")),
            "last_name": as_text(address.get("lastName")),
            "locale": as_text(order.get("locale")),
            "location": addresses.location(address),
            "phone_number": addresses.phone(address) if mapping.order.buyer_phone else "",
        }
    )
