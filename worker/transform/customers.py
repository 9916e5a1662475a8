"""Customer messages -> an upsert of a profile, or its deletion if commercetools erases personal data."""

from __future__ import annotations

from typing import TYPE_CHECKING

from worker.errors import Ignored
from worker.json_access import as_dict, as_dicts, as_text
from worker.model import Json, Operation, OperationKind
from worker.transform import fields
from worker.transform.registry import handles
from worker.transform.size_limits import PROFILE_BYTES, truncate

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from worker.mapping import MappingConfig
    from worker.model import Enriched, Notification

_GONE = (
    "commercetools deleted the customer while the profile was written: if the customer must be erased, delete the "
    "profile with this external_id in Klaviyo"
)


def _omissions(enriched: Enriched, mapping: MappingConfig) -> Iterator[str]:
    customer = enriched.customer or _customer_in_message(enriched, mapping)
    if customer is None:
        return
    yield from fields.report_empty(_own_attributes(customer) | _own_properties(customer))
    yield from fields.report_invalid_phone(_address(customer))
    yield from fields.report_filtered(
        as_dict(customer.get("custom")).get("fields"), mapping.customer.custom_fields, "customer.custom_fields"
    )


@handles(
    "CustomerCreated",
    "ResourceCreated",
    "ResourceUpdated",
    resource="customer",
    effect="profile upsert",
    omissions=_omissions,
)
def customer_changed(enriched: Enriched, mapping: MappingConfig) -> Iterable[Operation]:
    """Upsert the profile with the current customer data, so the order of messages does not matter."""
    customer = enriched.customer or _customer_in_message(enriched, mapping)
    if customer is None:
        raise Ignored("commercetools no longer has the customer", if_written=_GONE if mapping.customer.erasure else "")
    properties, truncated = truncate(_properties(customer, mapping), PROFILE_BYTES)
    attributes = fields.compact(_own_attributes(customer)) | ({"properties": properties} if properties else {})
    if not {"email", "phone_number"} & attributes.keys():
        raise Ignored("the customer has neither an email address nor a valid phone number")
    key = as_text(customer.get("id")) or enriched.notification.resource_id
    yield Operation(
        OperationKind.UPSERT_PROFILE, key, {"type": "profile", "attributes": attributes}, truncated=truncated
    )


def _customer_in_message(enriched: Enriched, mapping: MappingConfig) -> Json | None:
    """Return the customer in a CustomerCreated message. It is used if commercetools does not return the customer yet.

    If erasure is enabled, return None, because a late message must not restore the data of an erased customer.
    """
    payload = enriched.notification.payload.get("customer")
    return payload if isinstance(payload, dict) and not mapping.customer.erasure else None


def _own_attributes(customer: Json) -> Json:
    address = _address(customer)
    return {
        "email": as_text(customer.get("email")),
        "external_id": as_text(customer.get("id")),
        "first_name": as_text(customer.get("firstName")),
        "last_name": as_text(customer.get("lastName")),
        "title": as_text(customer.get("title")),
        "organization": as_text(customer.get("companyName")),
        "phone_number": fields.phone(address),
        "location": fields.location(address),
    }


def _properties(customer: Json, mapping: MappingConfig) -> Json:
    custom = fields.filter_properties(as_dict(customer.get("custom")).get("fields"), mapping.customer.custom_fields)
    return custom | fields.compact(_own_properties(customer))


def _own_properties(customer: Json) -> Json:
    return {
        "customerNumber": as_text(customer.get("customerNumber")),
        "customerGroup": _group(customer),
        "locale": as_text(customer.get("locale")),
        "dateOfBirth": as_text(customer.get("dateOfBirth")),
        "isEmailVerified": customer.get("isEmailVerified"),
    }


def _group(customer: Json) -> str:
    """Return the key of the customer group. Queries for customers expand this reference."""
    group = as_dict(customer.get("customerGroup"))
    return fields.first_nonempty(as_text(as_dict(group.get("obj")).get("key")), as_text(group.get("key")))


def _address(customer: Json) -> Json:
    """Return the default billing address, otherwise the first billing address, otherwise the first address."""
    addresses = as_dicts(customer.get("addresses"))
    by_id = {as_text(address.get("id")): address for address in addresses}
    billing = customer.get("billingAddressIds")
    ids = [customer.get("defaultBillingAddressId"), *(billing if isinstance(billing, list) else [])]
    found = (by_id[key] for key in map(as_text, ids) if key and key in by_id)
    return next(found, addresses[0] if addresses else {})


def _check_erasure(notification: Notification, mapping: MappingConfig) -> None:
    if notification.payload.get("dataErasure") is not True:
        raise Ignored("deleted without dataErasure: the profile stays")
    if not mapping.customer.erasure:
        raise Ignored("customer.erasure is off in the mapping")


@handles(
    "ResourceDeleted",
    resource="customer",
    effect="data-privacy deletion, with dataErasure (off by default)",
    precheck=_check_erasure,
)
def customer_erased(enriched: Enriched, mapping: MappingConfig) -> Iterable[Operation]:  # noqa: ARG001
    """Request the deletion of the profile with the customer's external_id. The message contains no other data.

    A deletion cannot be undone, so nothing is deleted while commercetools still has the customer.
    """
    if enriched.customer is not None:
        raise Ignored("commercetools still has the customer")
    yield Operation(OperationKind.DELETE_PROFILE, enriched.notification.resource_id)
