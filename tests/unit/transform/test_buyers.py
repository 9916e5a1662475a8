"""The data of a new order that is written to the buyer's profile."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import pytest

from worker.commands.backfill.backfill import without_buyers
from worker.mapping import MappingConfig
from worker.model import Enriched, Notification, OperationKind
from worker.transform import transform

if TYPE_CHECKING:
    from worker.model import Operation

NOW = datetime(2026, 11, 24, tzinfo=UTC)
ADDRESS = {
    "firstName": "Gert",
    "lastName": "Gast",
    "streetName": "Elm Row",
    "city": "Leeds",
    "country": "GB",
    "phone": "+44 20 7946 0958",
}
GUESTS = {
    "id": "o",
    "createdAt": "2026-11-23T10:00:00Z",
    "customerEmail": "Gast@example.net",
    "locale": "de-AT",
    "billingAddress": ADDRESS,
}
CUSTOMERS = GUESTS | {"customerId": "ada"}
WRITTEN = {
    "first_name": "Gert",
    "last_name": "Gast",
    "locale": "de-AT",
    "location": {"address1": "Elm Row", "city": "Leeds", "country": "GB"},
}


def upserts(order: dict[str, Any], kind: str = "OrderCreated", **settings: Any) -> list[Operation]:
    """Return the upserts of an order. `settings` are those of `order`."""
    enriched = Enriched(Notification(kind, "order", "o", "2026-11-23T10:00:00Z", {}), NOW, order=order)
    operations = transform(enriched, MappingConfig.model_validate({"order": settings}))
    return [operation for operation in operations if operation.kind is OperationKind.UPSERT_GUEST]


def test_profile_of_a_guest_gets_name_place_and_locale() -> None:
    """The phone number is not sent: Klaviyo would merge the profiles of all who state it."""
    (upsert,) = upserts(GUESTS)
    assert upsert.key == "gast@example.net"
    assert upsert.resource == {"type": "profile", "attributes": {"email": "Gast@example.net"} | WRITTEN}
    assert not upsert.any_profile


def test_profiles_of_customers_are_written_by_their_own_messages() -> None:
    """The billing address of a customer's order can be that of an office."""
    assert upserts(CUSTOMERS) == []
    assert upserts(CUSTOMERS, "OrderCustomerSet") == []


def test_all_buyers() -> None:
    """The setting restores what Klaviyo's plugin does."""
    (guest,) = upserts(GUESTS, buyer="all")
    (customer,) = upserts(CUSTOMERS, buyer="all")
    assert guest.any_profile
    assert customer.any_profile
    assert customer.resource
    assert customer.resource["attributes"] == {"email": "Gast@example.net", "external_id": "ada"} | WRITTEN


def test_no_buyers() -> None:
    """The setting switches it off."""
    assert upserts(GUESTS, buyer="none", buyer_phone=True) == []


@pytest.mark.parametrize(("phone", "expected"), [("+44 20 7946 0958", "+442079460958"), ("12", None)])
def test_phone_number_on_request(phone: str, expected: str | None) -> None:
    """An invalid number is left out."""
    (upsert,) = upserts(GUESTS | {"billingAddress": ADDRESS | {"phone": phone}}, buyer_phone=True)
    assert upsert.resource
    assert upsert.resource["attributes"].get("phone_number") == expected


@pytest.mark.parametrize("more", [{"billingAddress": None, "locale": None}, {"billingAddress": {}, "locale": ""}])
def test_order_without_a_billing_address(more: dict[str, Any]) -> None:
    """The event creates the profile."""
    assert upserts(GUESTS | more) == []


def test_a_name_that_no_profile_can_hold_is_left_out() -> None:
    """Klaviyo would reject the profile, and the order of a guest would become a dead letter."""
    (upsert,) = upserts(GUESTS | {"billingAddress": ADDRESS | {"firstName": "G" * 120_000}})
    assert upsert.resource
    expected = {name: value for name, value in WRITTEN.items() if name != "first_name"}
    assert upsert.resource["attributes"] == {"email": "Gast@example.net"} | expected
    assert upsert.truncated == ["first_name"]


def test_old_orders_write_no_profile() -> None:
    """A backfill and imports of the past come in no order of time."""
    old = GUESTS | {"completedAt": "2019-01-01T10:00:00Z"}
    assert upserts(old, "OrderImported") == []
    assert len(upserts(GUESTS | {"completedAt": "2026-11-23T09:00:00Z"}, "OrderImported")) == 1
    assert without_buyers(MappingConfig()).order.buyer == "none"
