"""Carts: when a checkout starts, what its id depends on, and events of carts with many lines."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import orjson
import pytest

from worker.errors import Ignored
from worker.mapping import MappingConfig
from worker.model import Enriched, Notification
from worker.transform import transform
from worker.transform.carts import has_reached_checkout
from worker.transform.size_limits import EVENT_BYTES

if TYPE_CHECKING:
    from worker.model import Json, Operation

METRICS = {"started_checkout": "Started Checkout", "added_to_cart": "Added to Cart"}
LINE: Json = {"id": "l", "quantity": 1, "productId": "p", "variant": {"id": 1, "sku": "S"}}
CART: Json = {
    "id": "cart",
    "cartState": "Active",
    "customerEmail": "ada@example.com",
    "totalPrice": {"centAmount": 100, "currencyCode": "EUR"},
    "lineItems": [LINE],
}


def events(cart: Json, customer: Json | None = None, **mapping: Any) -> list[Operation]:
    notification = Notification("ResourceUpdated", "cart", "cart", "2026-11-23T10:00:00Z", {})
    enriched = Enriched(notification, datetime(2026, 11, 24, tzinfo=UTC), order=cart, customer=customer)
    return list(transform(enriched, MappingConfig.model_validate({"metrics": METRICS} | mapping)))


def attributes(operation: Operation) -> Json:
    assert operation.resource is not None
    found: Json = operation.resource["attributes"]
    return found


def started(cart: Json) -> str:
    """Return the unique_id of Started Checkout."""
    return str(attributes(events(cart)[0])["unique_id"])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("shippingAddress", {"shippingAddress": {"country": "DE"}}),
        ("shippingAddress", {"shipping": [{"shippingKey": "a", "shippingAddress": {"country": "DE"}}]}),
        ("paymentInfo", {"paymentInfo": {"payments": [{"id": "p"}]}}),
        ("customerEmail", {"customerEmail": "ada@example.com"}),
    ],
)
def test_checkout_is_reached(field: str, value: Json) -> None:
    """One of the fields in the setting is enough; the others do not count."""
    fields = {"shippingAddress", "paymentInfo", "customerEmail"}
    assert has_reached_checkout(value, MappingConfig())
    assert has_reached_checkout(value, MappingConfig.model_validate({"cart": {"checkout_when": [field]}}))
    others = MappingConfig.model_validate({"cart": {"checkout_when": sorted(fields - {field})}})
    assert not has_reached_checkout(value, others)


@pytest.mark.parametrize("empty", [{}, {"paymentInfo": {"payments": []}}, {"customerEmail": ""}, {"shipping": [{}]}])
def test_checkout_is_not_reached(empty: Json) -> None:
    """A field without content does not count."""
    assert not has_reached_checkout(empty, MappingConfig())


@pytest.mark.parametrize(
    "same",
    [
        {"version": 9, "lastModifiedAt": "2026-11-23T11:00:00Z", "shippingAddress": {"country": "DE"}},
        {"totalPrice": {"centAmount": 90, "currencyCode": "EUR"}},
        {"lineItems": [LINE | {"id": "other", "totalPrice": {"centAmount": 90, "currencyCode": "EUR"}}]},
    ],
)
def test_recalculated_cart_starts_no_second_checkout(same: Json) -> None:
    """Prices, addresses and ids of lines are not its content."""
    assert started(CART | same) == started(CART)


@pytest.mark.parametrize(
    "other",
    [
        {"id": "cart-2"},
        {"totalPrice": {"centAmount": 100, "currencyCode": "USD"}},
        {"lineItems": [LINE | {"quantity": 2}]},
        {"lineItems": [LINE, LINE | {"variant": {"id": 2, "sku": "T"}}]},
        {"lineItems": [LINE | {"variant": {"id": 1}}]},
        {"lineItems": [LINE | {"variant": {"id": 2}}]},
        {"customLineItems": [{"slug": "gift", "quantity": 1}]},
    ],
)
def test_cart_with_another_content_starts_its_checkout_again(other: Json) -> None:
    """The abandoned-cart flow then shows what is in the cart now."""
    assert started(CART | other) != started(CART)


def test_order_of_lines_does_not_matter() -> None:
    """Two lines of one sku are one content."""
    two = [LINE, LINE | {"variant": {"id": 2, "sku": "T"}}]
    assert started(CART | {"lineItems": two}) == started(CART | {"lineItems": two[::-1]})
    assert started(CART | {"lineItems": [LINE, LINE]}) == started(CART | {"lineItems": [LINE | {"quantity": 2}]})


def test_customer_whose_address_is_not_shown_has_no_events() -> None:
    """Klaviyo could not write to the profile. With an address, the events are the customer's."""
    cart = CART | {"customerEmail": None, "customerId": "c"}
    with pytest.raises(Ignored, match="no email address of the cart's customer"):
        events(cart)
    (added,) = events(cart, customer={"id": "c", "email": "ada@example.com"})
    profile = attributes(added)["profile"]["data"]["attributes"]
    assert profile == {"email": "ada@example.com", "external_id": "c"}


def test_line_without_an_id_is_left_out() -> None:
    """Klaviyo could not recognize its event, and would count it at each change."""
    found = events(CART | {"lineItems": [LINE | {"id": None}, LINE]})
    assert [attributes(event)["unique_id"] for event in found[1:]] == ["l"]


def test_events_of_a_cart_are_together_as_large_as_one_event() -> None:
    """Each event has all items. 500 lines are the maximum in commercetools."""
    lines = [LINE | {"id": f"l{n}", "name": {"en": "x" * 200}, "variant": {"sku": f"S{n}"}} for n in range(500)]
    found = events(CART | {"lineItems": lines})
    assert len(found) == 501
    assert sum(len(orjson.dumps(event.resource)) for event in found) < 1.2 * EVENT_BYTES
    assert all(event.truncated and event.background for event in found)
    assert all("AddedItemSKU" in attributes(event)["properties"] for event in found[1:])
