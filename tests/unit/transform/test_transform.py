"""Handlers: cases that the golden folders do not cover."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest

from worker.errors import Ignored
from worker.mapping import MappingConfig
from worker.model import Enriched, Notification, Operation, OperationKind
from worker.transform import transform
from worker.transform.order_events import event_operation

NOW = datetime(2026, 11, 24, tzinfo=UTC)


def about(resource_type: str, kind: str, **payload: Any) -> Notification:
    return Notification(kind, resource_type, "id-1", "2026-11-23T10:00:00Z", payload)


def test_new_customer_that_cannot_be_read_is_sent_from_the_message() -> None:
    """A customer is sent from its CustomerCreated if commercetools does not return it yet."""
    notification = about("customer", "CustomerCreated", customer={"id": "id-1", "email": "ada@example.com"})
    (operation,) = transform(Enriched(notification, NOW), MappingConfig())
    assert operation.resource is not None
    assert operation.resource["attributes"] == {"email": "ada@example.com", "external_id": "id-1"}


def test_erased_customer_is_not_restored_by_a_late_message() -> None:
    """If erasure is enabled, a CustomerCreated is ignored when commercetools has no such customer."""
    notification = about("customer", "CustomerCreated", customer={"id": "id-1", "email": "ada@example.com"})
    mapping = MappingConfig.model_validate({"customer": {"erasure": True}})
    with pytest.raises(Ignored, match="no longer"):
        transform(Enriched(notification, NOW), mapping)


@pytest.mark.parametrize("state", [None, 5, ["Complete"], "", "Ünknown state!" * 9])
def test_malformed_order_state_creates_no_event(state: object) -> None:
    """A malformed order state creates no event, and it is not logged."""
    order = {"id": "id-1", "customerEmail": "ada@example.com"}
    with pytest.raises(Ignored) as reason:
        transform(Enriched(about("order", "OrderStateChanged", orderState=state), NOW, order=order), MappingConfig())
    assert "Ünknown" not in str(reason.value)


def test_line_without_id_gets_a_deterministic_unique_id() -> None:
    """The event of a line without id has the same unique_id in every delivery."""
    order = {"id": "o", "customerEmail": "a@example.com", "lineItems": [{"variant": {"sku": "S"}, "name": {"en": "N"}}]}
    operations = transform(Enriched(about("order", "OrderCreated"), NOW, order=order), MappingConfig())
    ids = [operation.resource["attributes"]["unique_id"] for operation in operations if operation.resource]
    assert ids == ["o", "o:S"]


def test_large_order_is_truncated() -> None:
    """Properties are truncated to Klaviyo's limits, and the operation names them."""
    order = {"id": "o", "customerEmail": "a@example.com", "custom": {"fields": {"codes": list(range(10_000))}}}
    (placed,) = transform(Enriched(about("order", "OrderCreated"), NOW, order=order), MappingConfig())
    assert placed.resource is not None
    assert len(placed.resource["attributes"]["properties"]["codes"]) == 4_000
    assert placed.truncated == ["codes"]


def test_same_event_of_another_profile_has_another_key() -> None:
    """Klaviyo keeps one event per profile, metric and unique_id."""
    fields: dict[str, Any] = {"metric": "M", "unique_id": "1", "time": "", "value": None, "properties": {}}
    guest = event_operation(**fields, profile={"email": "a@example.com"})
    customer = event_operation(**fields, profile={"email": "a@example.com", "external_id": "x"})
    assert guest.key != customer.key


@pytest.mark.parametrize("erasure", [True, False])
def test_profile_is_removed_if_the_customer_is_gone_after_the_write(erasure: bool) -> None:
    """A message that has written nothing removes nothing."""
    mapping = MappingConfig.model_validate({"customer": {"erasure": erasure}})
    enriched = Enriched(about("customer", "ResourceUpdated"), NOW)
    with pytest.raises(Ignored, match="no longer"):
        transform(enriched, mapping)
    written = replace(enriched, notification=replace(enriched.notification, written_since=NOW))
    if erasure:
        assert transform(written, mapping) == (Operation(OperationKind.DELETE_PROFILE, "id-1", created_since=NOW),)
    else:
        with pytest.raises(Ignored, match="no longer"):
            transform(written, mapping)
