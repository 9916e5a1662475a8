"""The sample notifications have commercetools' format and cover all types."""

from __future__ import annotations

import base64
from collections import Counter
from typing import TYPE_CHECKING, Any

import orjson
import pytest

from worker.sandbox import envelopes, sample_shop
from worker.sandbox.envelopes import cloudevent
from worker.sandbox.notifications import change, event, message, payload_not_included
from worker.sandbox.samples import sample_notifications

if TYPE_CHECKING:
    from collections.abc import Callable

SHOP = sample_shop()
SAMPLES = sample_notifications(SHOP)


def unwrapped(body: bytes) -> Any:
    """Return the notification in an envelope, which is detected by its fields."""
    found = orjson.loads(body)
    while "notificationType" not in found:
        if "message" in found:
            found = orjson.loads(base64.b64decode(found["message"]["data"]))
        elif "specversion" in found:
            found = found["data"]
        elif "detail" in found:
            found = found["detail"]
        else:
            found = orjson.loads(found.get("Body") or found["Message"])
    return found


def kinds_of(outcome: str) -> set[str]:
    """Return type and resource of the readable samples."""
    kinds = set()
    for sample in SAMPLES:
        if sample.outcome == outcome:
            found = unwrapped(sample.body)
            absent = found.get("payloadNotIncluded", {})
            kind = absent.get("payloadType") or found.get("type") or found["notificationType"]
            kinds.add(f"{found.get('resource', {}).get('typeId')} {kind}")
            if absent:
                kinds.add(f"absent {kind}")
    return kinds


def test_samples_cover_every_type() -> None:
    """Every type has a sample with a full effect."""
    assert kinds_of("sent") == {
        "order OrderCreated",
        "order OrderImported",
        "order OrderCustomerSet",
        "order OrderCustomerEmailSet",
        "order OrderCreatedFromRecurringOrder",
        "order OrderStateChanged",
        "order OrderShipmentStateChanged",
        "order OrderPaymentAdded",
        "payment PaymentCreated",
        "payment PaymentTransactionAdded",
        "payment PaymentTransactionStateChanged",
        "customer CustomerCreated",
        "customer ResourceCreated",
        "customer ResourceUpdated",
        "category CategoryCreated",
        "category ResourceCreated",
        "category ResourceUpdated",
        "category ResourceDeleted",
        "product ProductCreated",
        "product ProductPriceChanged",
        "product ProductPublished",
        "product ProductUnpublished",
        "product ProductDeleted",
        "product ResourceDeleted",
        "standalone-price StandalonePriceValueChanged",
        "standalone-price StandalonePriceDeleted",
        "inventory-entry InventoryEntryDeleted",
        "inventory-entry ResourceCreated",
        "inventory-entry ResourceUpdated",
        "absent OrderCreated",
        "absent CustomerCreated",
        "absent ProductCreated",
        "absent ProductPublished",
        "absent PaymentTransactionAdded",
    }
    assert kinds_of("ignored") >= {
        "order OrderStateChanged",
        "order DeliveryAdded",
        "order ParcelAddedToDelivery",
        "order OrderStateTransition",
        "payment PaymentTransactionAdded",
        "customer ResourceDeleted",
        "subscription ResourceCreated",
        "order OrderTeleported",
        "None ImportContainerCreated",
    }


def test_samples_cover_unreadable_bodies() -> None:
    """They are malformed, empty, huge, deeply nested, no object, no notification, or have no resource."""
    bodies = [sample.body for sample in SAMPLES if sample.outcome == "dead_lettered"]
    assert b"" in bodies
    assert max(map(len, bodies)) > 1_000_000
    assert b"[" * 1_000 in max(bodies, key=lambda body: body.count(b"["))
    decodable = []
    for body in bodies:
        try:
            decodable.append(orjson.loads(body))
        except orjson.JSONDecodeError:
            continue
    assert len(decodable) < len(bodies)
    assert any(isinstance(each, list) for each in decodable)
    assert any(isinstance(each, dict) and "notificationType" not in each for each in decodable)
    assert any(isinstance(each, dict) and "notificationType" in each and "resource" not in each for each in decodable)
    assert {sample.outcome for sample in SAMPLES} == {"sent", "ignored", "dead_lettered"}


def test_products_are_in_the_shop_only_while_published() -> None:
    """A sample that unpublishes an existing product would test a race."""
    for sample in SAMPLES:
        if sample.outcome != "sent":
            continue
        found = unwrapped(sample.body)
        if found["resource"]["typeId"] == "product":
            kind = found.get("payloadNotIncluded", {}).get("payloadType") or found.get("type")
            is_deletion = kind in {None, "ProductUnpublished", "ProductDeleted"}
            assert (found["resource"]["id"] in SHOP.products) is not is_deletion


def test_only_the_duplicate_is_a_duplicate() -> None:
    """A worker can identify messages by id, or by resource and sequence number."""
    ids: Counter[str] = Counter()
    places: Counter[tuple[str, int]] = Counter()
    for sample in SAMPLES:
        if sample.outcome == "dead_lettered":
            continue
        found = unwrapped(sample.body)
        if found["notificationType"] == "Message":
            ids[found["id"]] += 1
            places[found["resource"]["id"], found["sequenceNumber"]] += 1
    assert sorted(ids.values())[-2:] == [1, 2]
    repeated = {place for place, count in places.items() if count > 1}
    assert len({resource for resource, _ in repeated}) == len(repeated)


@pytest.mark.parametrize(
    "wrap",
    [
        envelopes.bare,
        envelopes.cloudevent,
        envelopes.pubsub_push,
        envelopes.sqs,
        envelopes.sns,
        envelopes.sns_raw,
        envelopes.eventbridge,
        envelopes.event_grid,
    ],
)
def test_envelopes_do_not_change_the_notification(wrap: Callable[[dict[str, Any]], bytes]) -> None:
    """This holds for any notification."""
    order = next(iter(SHOP.orders.values()))
    for inside in (
        message("OrderCreated", "order", order["id"], order=order),
        change("ResourceUpdated", "customer", "c1"),
        payload_not_included("OrderCreated", "order", "o1"),
        event(key="import"),
    ):
        assert unwrapped(wrap(inside)) == inside


def test_message_fields() -> None:
    """The fields of its type are at the top level."""
    fields: dict[str, Any] = {"sequence": 4, "identifiers": {"orderNumber": "R-1"}, "orderState": "Complete"}
    found = message("OrderStateChanged", "order", "o1", created_at="2026-11-23T10:00:00Z", **fields)
    assert found.pop("id") == message("OrderStateChanged", "order", "o1", sequence=4)["id"]
    assert found == {
        "notificationType": "Message",
        "projectKey": "sandbox-shop",
        "version": 1,
        "sequenceNumber": 4,
        "resource": {"typeId": "order", "id": "o1"},
        "resourceVersion": 4,
        "resourceUserProvidedIdentifiers": {"orderNumber": "R-1"},
        "type": "OrderStateChanged",
        "orderState": "Complete",
        "createdAt": "2026-11-23T10:00:00Z",
        "lastModifiedAt": "2026-11-23T10:00:00Z",
    }


def test_change_and_event_fields() -> None:
    """Only an update has the old version. An event has no project and no resource."""
    updated = change("ResourceUpdated", "customer", "c1", version=7)
    assert (updated["version"], updated["oldVersion"]) == (7, 6)
    assert change("ResourceDeleted", "customer", "c1", dataErasure=True)["dataErasure"] is True
    assert "oldVersion" not in change("ResourceCreated", "customer", "c1")
    assert event().keys() == {"id", "notificationType", "type", "resourceType", "data", "createdAt"}
    absent = payload_not_included("OrderCreated", "order", "o1")
    assert "type" not in absent
    assert absent["payloadNotIncluded"].keys() == {"reason", "payloadType"}


def test_cloudevent_fields() -> None:
    """Messages have a sequence and a reference, changes have not."""
    of_message = orjson.loads(cloudevent(message("OrderStateChanged", "order", "o1", sequence=2)))
    assert of_message["type"] == "com.commercetools.order.message.OrderStateChanged"
    assert (of_message["sequence"], of_message["sequencetype"]) == ("2", "Integer")
    assert of_message["dataref"].endswith(of_message["data"]["id"])
    of_change = orjson.loads(cloudevent(change("ResourceUpdated", "customer", "c1")))
    assert of_change["type"] == "com.commercetools.customer.change.ResourceUpdated"
    assert "dataref" not in of_change
