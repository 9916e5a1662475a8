"""Customer messages -> an upsert of a profile, or its deletion if commercetools erases personal data."""

from __future__ import annotations

from typing import TYPE_CHECKING

from worker.errors import Ignored
from worker.json_access import as_dict, as_dicts, as_text, unique
from worker.model import Json, Operation, OperationKind
from worker.transform import addresses, fields
from worker.transform.consent import consent_properties, consents
from worker.transform.profiles import CONSENT_VERSION, CUSTOM_FIELD_NAMES, without_clears
from worker.transform.registry import handles
from worker.transform.size_limits import ATTRIBUTE_BYTES, PROFILE_BYTES, truncate

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from worker.mapping import MappingConfig
    from worker.model import Enriched, Notification


def _omissions(enriched: Enriched, mapping: MappingConfig) -> Iterator[str]:
    customer = enriched.customer or _customer_in_message(enriched, mapping)
    if customer is None:
        return
    values = {"email": customer.get("email")}
    if enriched.customer is None:  # otherwise the empty ones are cleared
        values |= _own_attributes(customer, mapping) | _own_properties(customer)
    yield from fields.report_empty(values)
    yield from addresses.report_invalid_phone(addresses.customer_address(customer))
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
        yield _removal(enriched, mapping)
        return
    attributes, truncated = truncate(_own_attributes(customer, mapping), ATTRIBUTE_BYTES)
    properties, shortened = _properties(customer, mapping)
    attributes, truncated = attributes | {"properties": properties}, [*truncated, *shortened]
    if not attributes.get("email") and not attributes.get("phone_number"):
        raise Ignored("the customer has neither an email address nor a valid phone number")
    # The whole state that the worker owns: the send stage clears what is None. A message is possibly old, so its data
    # clears nothing, and subscribes and unsubscribes no person.
    resource = {"type": "profile", "attributes": attributes}
    key = as_text(customer.get("id")) or enriched.notification.resource_id
    if enriched.customer is None:
        yield Operation(OperationKind.UPSERT_PROFILE, key, without_clears(resource), truncated=truncated)
        return
    agreed = tuple(consents(customer, mapping, enriched.as_of))
    yield Operation(OperationKind.UPSERT_PROFILE, key, resource, truncated=truncated, consents=agreed)


def _customer_in_message(enriched: Enriched, mapping: MappingConfig) -> Json | None:
    """Return the customer in a CustomerCreated message. It is used if commercetools does not return the customer yet.

    If erasure is enabled, return None, because a late message must not restore the data of an erased customer.
    """
    payload = enriched.notification.payload.get("customer")
    return payload if isinstance(payload, dict) and not mapping.customer.erasure else None


def _removal(enriched: Enriched, mapping: MappingConfig) -> Operation:
    """Return the deletion of the profile that this message created although the customer is gone by now.

    Without it, an import job that lands after an erasure would bring the erased person back. Raises Ignored if the
    message has written nothing, or if persons are not erased.
    """
    if not mapping.customer.erasure or enriched.notification.written_since is None:
        raise Ignored("commercetools no longer has the customer")
    key = enriched.notification.resource_id
    return Operation(OperationKind.DELETE_PROFILE, key, created_since=enriched.notification.written_since)


def _own_attributes(customer: Json, mapping: MappingConfig) -> Json:
    """Return the attributes of the profile. An identifier that the customer does not have is left out: see clear_phone.

    `title` is not among them: it is the job title (Klaviyo's OpenAPI document), not a form of address.
    """
    address = addresses.customer_address(customer)
    phone = addresses.phone(address)
    return {
        **fields.compact({"email": as_text(customer.get("email")), "external_id": as_text(customer.get("id"))}),
        "first_name": as_text(customer.get("firstName")) or None,
        "last_name": as_text(customer.get("lastName")) or None,
        "organization": as_text(customer.get("companyName")) or None,
        "locale": as_text(customer.get("locale")) or None,
        **({"phone_number": phone or None} if phone or mapping.customer.clear_phone else {}),
        "location": addresses.whole_location(address),
    }


def _properties(customer: Json, mapping: MappingConfig) -> tuple[Json, list[str]]:
    """Return all properties that the worker owns, with None for those without a value, and what was truncated.

    CUSTOM_FIELD_NAMES lists the custom fields among them. The send stage clears a custom field that is in Klaviyo's
    list but not in this one, because others write properties, too. Consents are listed but not returned: the send stage
    writes them after it has subscribed or unsubscribed the person.
    """
    rules = mapping.customer.custom_fields
    own = _own_properties(customer)
    agreed = set(consent_properties(mapping).values())
    of_consents = {CONSENT_VERSION, *agreed}
    custom = fields.custom_properties(customer, rules, mapping.locale)
    custom = {name: value for name, value in custom.items() if name not in {CUSTOM_FIELD_NAMES, *of_consents}}
    names = [name for name in custom if own.get(name) is None]
    included = [rules.rename.get(name, name) for name in rules.include if name != "*" and name not in rules.exclude]
    state = own | {CUSTOM_FIELD_NAMES: sorted({*names, *agreed}) or None}
    state |= {n: custom.get(n) for n in [*included, *names] if state.get(n) is None and n not in of_consents}
    properties, truncated = truncate(state, PROFILE_BYTES)
    if truncated and properties.get(CUSTOM_FIELD_NAMES):
        properties[CUSTOM_FIELD_NAMES] = [n for n in properties[CUSTOM_FIELD_NAMES] if n in properties or n in agreed]
    return properties, truncated


def _own_properties(customer: Json) -> Json:
    stores = unique(as_text(store.get("key")) for store in as_dicts(customer.get("stores")))
    return {
        "customerNumber": as_text(customer.get("customerNumber")) or None,
        **_groups(customer),
        "locale": as_text(customer.get("locale")) or None,
        "dateOfBirth": as_text(customer.get("dateOfBirth")) or None,
        "isEmailVerified": customer.get("isEmailVerified"),
        "Title": as_text(customer.get("title")) or None,
        "Salutation": as_text(customer.get("salutation")) or None,
        "Stores": stores or None,
    }


def _groups(customer: Json) -> Json:
    """Return the properties of the customer groups. An unknown group is absent: see `_group_name`.

    New projects use only `customerGroupAssignments`: https://docs.commercetools.com/api/projects/customers.
    """
    assigned = [as_dict(entry.get("customerGroup")) for entry in as_dicts(customer.get("customerGroupAssignments"))]
    names = list(map(_group_name, assigned))
    group = as_dict(customer.get("customerGroup")) or next(iter(assigned), {})
    groups: Json = {"customerGroup": _group_name(group), "customerGroups": unique(names)}
    is_known = {"customerGroup": bool(not group or groups["customerGroup"]), "customerGroups": all(names)}
    return {name: value or None for name, value in groups.items() if is_known[name]}


def _group_name(group: Json) -> str:
    """Return the key of a customer group, else its name; "" if the reference is not expanded."""
    expanded = as_dict(group.get("obj"))
    return fields.first_nonempty(
        *(as_text(each.get("key")) for each in (expanded, group)), as_text(expanded.get("name"))
    )


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
