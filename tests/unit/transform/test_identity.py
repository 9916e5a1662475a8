"""Whose event an order event is."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from worker.errors import Ignored, Rejected
from worker.mapping import MappingConfig
from worker.model import Enriched, Notification
from worker.transform import transform
from worker.transform.identity import email_of, identifiers

NOW = datetime(2026, 11, 24, tzinfo=UTC)
ERASURE = MappingConfig.model_validate({"customer": {"erasure": True}})
ADA = {"id": "ada", "email": "ada.new@example.com"}


def enriched(order: dict[str, Any], customer: dict[str, Any] | None = None, kind: str = "OrderCreated") -> Enriched:
    return Enriched(Notification(kind, "order", "o", None, {}), NOW, order=order, customer=customer)


def whose(order: dict[str, Any], customer: dict[str, Any] | None = None, kind: str = "OrderCreated") -> dict[str, Any]:
    return identifiers(order, enriched(order, customer, kind), MappingConfig())


def test_customers_are_known_by_their_present_email() -> None:
    """The email address of an order is that of its time, and would move the profile back."""
    order = {"customerId": "ada", "customerEmail": "ada.old@example.com"}
    assert whose(order, ADA) == {"external_id": "ada", "email": "ada.new@example.com"}


def test_order_of_a_customer_who_is_gone_has_its_own_email() -> None:
    """Commercetools keeps the orders of a customer whom it deletes."""
    order = {"customerId": "ada", "customerEmail": "ada.old@example.com"}
    assert whose(order) == {"external_id": "ada", "email": "ada.old@example.com"}


def test_erased_customers_are_not_brought_back() -> None:
    """With erasure, an order of a customer who is gone is ignored. A guest's order has no customer."""
    order = {"customerId": "ada", "customerEmail": "ada@example.com"}
    with pytest.raises(Ignored, match="no longer has the customer"):
        transform(enriched(order), ERASURE)
    assert transform(enriched(order, ADA), ERASURE)
    assert transform(enriched({"customerEmail": "ada@example.com"}), ERASURE)


@pytest.mark.parametrize(
    ("order", "email"),
    [
        ({"customerEmail": "a@x", "billingAddress": {"email": "b@x"}, "shippingAddress": {"email": "c@x"}}, "a@x"),
        ({"billingAddress": {"email": "b@x"}, "shippingAddress": {"email": "c@x"}}, "b@x"),
        ({"billingAddress": {"email": " "}, "shippingAddress": {"email": "c@x"}}, "c@x"),
        ({"shipping": [{"shippingAddress": {"email": "d@x"}}]}, "d@x"),
        ({"customerEmail": "x" * 300, "billingAddress": ["b@x"]}, ""),
    ],
)
def test_email_of_a_guest(order: dict[str, Any], email: str) -> None:
    """It is the order's own, else that of the billing address, else that of the shipping address."""
    assert email_of(order) == email
    if email:
        assert whose(order) == {"email": email}


def test_order_without_a_buyer_is_rejected() -> None:
    """The reason is in the dead letter."""
    with pytest.raises(Rejected, match="the order names no buyer"):
        whose({"anonymousId": "anon-7"})


def test_order_that_gets_a_customer_stays_with_its_own_email() -> None:
    """Otherwise Klaviyo would count the order that it has from OrderCreated again, on another profile."""
    order = {"customerId": "ada", "customerEmail": "guest@example.com"}
    assert whose(order, ADA, "OrderCustomerSet") == {"email": "guest@example.com"}
    expected = {"external_id": "ada", "email": "ada.new@example.com"}
    assert whose({"customerId": "ada"}, ADA, "OrderCustomerSet") == expected


def test_events_carry_identifiers_only() -> None:
    """A name, an address or a phone number in an event would overwrite what the profile has."""
    address = {"firstName": "Accounts", "lastName": "Payable", "city": "Hull", "country": "GB", "phone": "0161 4960123"}
    order = {"id": "o", "customerId": "ada", "billingAddress": address, "lineItems": [{"id": "l", "name": {"en": "N"}}]}
    for operation in transform(enriched(order, ADA), MappingConfig()):
        assert operation.resource is not None
        profile = operation.resource["attributes"]["profile"]["data"]["attributes"]
        assert profile == {"external_id": "ada", "email": "ada.new@example.com"}
