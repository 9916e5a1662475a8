"""Handlers in the corners that golden folders cannot reach."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from worker.errors import Ignored
from worker.mapping import MappingConfig
from worker.model import Enriched, Notification
from worker.transform import transform
from worker.transform.order_events import event_operation

NOW = datetime(2026, 11, 24, tzinfo=UTC)


def about(resource_type: str, kind: str, **payload: Any) -> Notification:
    return Notification(kind, resource_type, "id-1", "2026-11-23T10:00:00Z", payload)


def test_a_new_customer_that_cannot_be_read_is_sent_as_the_message_tells() -> None:
    """A read that lags must not lose a profile."""
    notification = about("customer", "CustomerCreated", customer={"id": "id-1", "email": "ada@example.com"})
    (operation,) = transform(Enriched(notification, NOW), MappingConfig())
    assert operation.resource is not None
    assert operation.resource["attributes"] == {"email": "ada@example.com", "external_id": "id-1"}


def test_an_erased_customer_does_not_come_back() -> None:
    """With erasure on, a late CustomerCreated is not believed against commercetools."""
    notification = about("customer", "CustomerCreated", customer={"id": "id-1", "email": "ada@example.com"})
    mapping = MappingConfig.model_validate({"customer": {"erasure": True}})
    with pytest.raises(Ignored, match="no longer"):
        transform(Enriched(notification, NOW), mapping)


@pytest.mark.parametrize("state", [None, 5, ["Complete"], "", "Ünknown state!" * 9])
def test_odd_states_make_no_event(state: object) -> None:
    """And never reach a log line as they are."""
    order = {"id": "id-1", "customerEmail": "ada@example.com"}
    with pytest.raises(Ignored) as reason:
        transform(Enriched(about("order", "OrderStateChanged", orderState=state), NOW, order=order), MappingConfig())
    assert "Ünknown" not in str(reason.value)


def test_a_line_without_an_id_still_has_a_unique_id() -> None:
    """Two deliveries of the message must make one event."""
    order = {"id": "o", "customerEmail": "a@example.com", "lineItems": [{"variant": {"sku": "S"}, "name": {"en": "N"}}]}
    operations = transform(Enriched(about("order", "OrderCreated"), NOW, order=order), MappingConfig())
    ids = [operation.resource["attributes"]["unique_id"] for operation in operations if operation.resource]
    assert ids == ["o", "o:S"]


def test_an_order_of_ten_thousand_lines_fits() -> None:
    """Klaviyo's limits hold by construction, and the operation says what was cut."""
    line = {"productId": "p" * 36, "name": {"en": "A product"}, "quantity": 1, "variant": {"sku": "S"}}
    order = {"id": "o", "customerEmail": "a@example.com", "lineItems": [line | {"id": str(n)} for n in range(10_000)]}
    placed, *lines = transform(Enriched(about("order", "OrderCreated"), NOW, order=order), MappingConfig())
    assert placed.resource is not None
    assert len(placed.resource["attributes"]["properties"]["Items"]) == 4_000
    assert "Items" in placed.truncated
    assert len(lines) == 10_000


def test_the_same_event_of_another_profile_is_another_operation() -> None:
    """OrderCustomerSet records the order for the customer it now belongs to."""
    fields: dict[str, Any] = {"metric": "M", "unique_id": "1", "time": "", "value": None, "properties": {}}
    guest = event_operation(**fields, profile={"email": "a@example.com"})
    customer = event_operation(**fields, profile={"email": "a@example.com", "external_id": "x"})
    assert guest.key != customer.key


ORDER = {"id": "o", "customerEmail": "a@example.com", "orderState": "Complete", "lineItems": [{"id": "l"}]}


def always() -> bool:
    return True


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(
    "kind",
    ["OrderCreated", "OrderImported", "OrderCustomerSet", "OrderCreatedFromRecurringOrder", "OrderStateChanged"],
)
def test_only_a_new_order_makes_fresh_events(kind: str, first: bool) -> None:
    """All other messages repeat the id of an event, or come more than once for an order."""
    operations = transform(Enriched(about("order", kind), NOW, order=ORDER), MappingConfig(), always if first else None)
    assert {operation.is_first_delivery for operation in operations} == {
        always if first and kind == "OrderCreated" else None
    }
