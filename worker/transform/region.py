"""The settings `stores` and `countries`: which orders, payments and customers a worker sends.

A shop with a Klaviyo account per region runs a worker per account, each with its own queue and these settings.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from worker.errors import Excluded
from worker.json_access import as_dict, as_dicts, as_text
from worker.transform import fields
from worker.transform.addresses import customer_address

if TYPE_CHECKING:
    from collections.abc import Sequence

    from worker.mapping import MappingConfig
    from worker.model import Enriched, Json


def check_region(enriched: Enriched, mapping: MappingConfig) -> None:
    """Check the order of the notification, or without one its customer. Raises Excluded as check_order does."""
    notification = enriched.notification
    if enriched.order is not None:
        check_order(enriched.order, mapping)
    elif notification.resource_type in ("customer", "payment"):
        _check_customer(enriched.customer or as_dict(notification.payload.get("customer")), mapping)


def check_order(order: Json, mapping: MappingConfig) -> None:
    """Check the store and country of an order or cart. An empty one passes.

    Raises Excluded if the mapping has `stores` and the order is of none of them, or of no store; or if the mapping has
    `countries` and the order is of another country.
    """
    if order and (mapping.stores or mapping.countries):
        _check([store_of(order)], country_of(order), mapping)


def excludes(order: Json, mapping: MappingConfig) -> bool:
    """Return whether check_order raises Excluded for the order or cart."""
    try:
        check_order(order, mapping)
    except Excluded:
        return True
    return False


def store_of(order: Json) -> str:
    """Return the key of an order's or cart's store, or ""."""
    return as_text(as_dict(order.get("store")).get("key"))


def country_of(order: Json) -> str:
    """Return the country of an order or cart: of its shipping address, else of its billing address, else its own.

    An order with several shipping addresses (`shippingMode: Multiple`) has them in `shipping`: the first one counts.
    """
    shipping = as_dicts(order.get("shipping"))
    addresses = (
        order.get("shippingAddress"),
        *(entry.get("shippingAddress") for entry in shipping),
        order.get("billingAddress"),
        order,
    )
    return fields.first_nonempty(*(as_text(as_dict(address).get("country")) for address in addresses))


def _check_customer(customer: Json, mapping: MappingConfig) -> None:
    """Check the stores of a customer, of which one must be in the mapping, and the country. An empty one passes."""
    if customer and (mapping.stores or mapping.countries):
        stores = [as_text(store.get("key")) for store in as_dicts(customer.get("stores"))]
        _check(stores, _country_of_customer(customer), mapping)


def _country_of_customer(customer: Json) -> str:
    """Return the country of the default shipping address, else of the address that the profile shows."""
    shipping_id = as_text(customer.get("defaultShippingAddressId"))
    addresses = as_dicts(customer.get("addresses"))
    default = next((each for each in addresses if shipping_id and each.get("id") == shipping_id), {})
    return fields.first_nonempty(as_text(default.get("country")), as_text(customer_address(customer).get("country")))


def _check(stores: Sequence[str], country: str, mapping: MappingConfig) -> None:
    if mapping.stores and not set(mapping.stores) & set(stores):
        raise Excluded("of no store in the setting `stores`", "stores")
    if mapping.countries and country and country not in mapping.countries:
        raise Excluded("of no country in the setting `countries`", "countries")
