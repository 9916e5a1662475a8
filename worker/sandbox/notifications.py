"""Notifications in commercetools' format, the envelopes of the queues, and samples of every type."""

from __future__ import annotations

import base64
import uuid
from dataclasses import dataclass, field
from itertools import cycle
from typing import TYPE_CHECKING, Any

import orjson

from worker.sandbox.commercetools.shop import Json, reference, uid

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from worker.sandbox.commercetools.shop import Shop

PROJECT = "sandbox-shop"
_AT = "2026-11-23T10:00:00.123Z"


def message(
    kind: str,
    resource_type: str,
    resource_id: str,
    *,
    created_at: str = _AT,
    sequence: int = 1,
    identifiers: Json | None = None,
    **fields: Any,
) -> Json:
    """Return a Message notification. `fields` are the fields of its type.

    Resource and `sequence` identify a message: the same pair again is a duplicate.
    """
    return {
        "notificationType": "Message",
        "projectKey": PROJECT,
        "id": str(uuid.uuid5(uuid.NAMESPACE_OID, f"{kind} {resource_id} {sequence}")),
        "version": 1,
        "sequenceNumber": sequence,
        "resource": {"typeId": resource_type, "id": resource_id},
        "resourceVersion": sequence,
        "resourceUserProvidedIdentifiers": identifiers or {},
        "type": kind,
        "createdAt": created_at,
        "lastModifiedAt": created_at,
        **fields,
    }


def change(
    kind: str,
    resource_type: str,
    resource_id: str,
    *,
    version: int | None = None,
    modified_at: str = _AT,
    **fields: Any,
) -> Json:
    """Return a ResourceCreated, ResourceUpdated or ResourceDeleted notification."""
    version = version or (1 if kind == "ResourceCreated" else 2)
    return {
        "notificationType": kind,
        "projectKey": PROJECT,
        "resource": {"typeId": resource_type, "id": resource_id},
        "resourceUserProvidedIdentifiers": {},
        "version": version,
        "modifiedAt": modified_at,
        **({"oldVersion": version - 1} if kind == "ResourceUpdated" else {}),
        **fields,
    }


def event(kind: str = "ImportContainerCreated", resource_type: str = "import-api", **data: Any) -> Json:
    """Return an Event notification. It has no project and no resource."""
    return {
        "id": str(uuid.uuid5(uuid.NAMESPACE_OID, f"{kind} {sorted(data)}")),
        "notificationType": "Event",
        "type": kind,
        "resourceType": resource_type,
        "data": data,
        "createdAt": _AT,
    }


def payload_not_included(kind: str, resource_type: str, resource_id: str) -> Json:
    """Return a message that was too large for the queue: it lacks the fields of its type."""
    notification = message(kind, resource_type, resource_id)
    del notification["type"]
    return notification | {"payloadNotIncluded": {"reason": "Payload too large.", "payloadType": kind}}


def bare(notification: Json) -> bytes:
    """Return the notification without an envelope: the body on Pub/Sub pull, SQS and Service Bus."""
    return orjson.dumps(notification)


def cloudevent(notification: Json) -> bytes:
    """Return a CloudEvent in structured mode."""
    resource = notification.get("resource", {})
    resource_type, is_message = resource.get("typeId"), notification["notificationType"] == "Message"
    name = f"message.{_kind(notification)}" if is_message else f"change.{_kind(notification)}"
    envelope = {
        "specversion": "1.0",
        "id": notification.get("id", "0c7f0b0e-0000-4000-8000-000000000001"),
        "type": f"com.commercetools.{resource_type}.{name}",
        "source": f"/{PROJECT}/{resource_type}s",
        "subject": resource.get("id"),
        "time": _AT,
    }
    if is_message:
        envelope["dataref"] = f"/{PROJECT}/messages/{notification['id']}"
        envelope |= {"sequence": str(notification["sequenceNumber"]), "sequencetype": "Integer"}
    return orjson.dumps(envelope | {"data": notification})


def event_grid(notification: Json) -> bytes:
    """Return the body that Event Grid delivers with the CloudEvents schema: the CloudEvent."""
    return cloudevent(notification)


def pubsub_push(notification: Json) -> bytes:
    """Return the body of a Pub/Sub push request."""
    data = base64.b64encode(bare(notification)).decode()
    envelope = {"data": data, "messageId": "136969346945", "publishTime": _AT, "attributes": {}}
    return orjson.dumps({"message": envelope, "subscription": "projects/p/subscriptions/ct"})


def sqs(notification: Json) -> bytes:
    """Return an SQS message in the format of its API."""
    return _sqs(bare(notification))


def sns(notification: Json) -> bytes:
    """Return an SNS notification inside an SQS message."""
    envelope = {
        "Type": "Notification",
        "MessageId": "22b80b92-fdea-4c2c-8f9d-bdfb0c7bf324",
        "TopicArn": "arn:aws:sns:eu-central-1:123456789012:ct",
        "Message": bare(notification).decode(),
        "Timestamp": _AT,
    }
    return _sqs(orjson.dumps(envelope))


def sns_raw(notification: Json) -> bytes:
    """Return an SQS message from SNS with raw delivery, which adds no envelope."""
    return _sqs(bare(notification))


def eventbridge(notification: Json) -> bytes:
    """Return an EventBridge event inside an SQS message."""
    envelope = {
        "version": "0",
        "id": "aaaaaaaa-8888-00ee-aaaa-aaaaaaaaaaaa",
        "detail-type": _kind(notification),
        "source": f"aws.partner/commercetools.com/{PROJECT}/klaviyo",
        "time": _AT,
        "region": "eu-central-1",
        "resources": [],
        "detail": notification,
    }
    return _sqs(orjson.dumps(envelope))


def _kind(notification: Json) -> str:
    absent = notification.get("payloadNotIncluded", {})
    return str(absent.get("payloadType") or notification.get("type") or notification["notificationType"])


def _sqs(body: bytes) -> bytes:
    attributes = {"ApproximateReceiveCount": "1", "SentTimestamp": "1795514400123"}
    return orjson.dumps({"MessageId": "m-1", "ReceiptHandle": "rh", "Body": body.decode(), "Attributes": attributes})


@dataclass(frozen=True, slots=True)
class Sample:
    """A message for the queue, and its expected outcome."""

    title: str
    body: bytes = field(repr=False)
    outcome: str = "sent"


def sample_notifications(shop: Shop) -> list[Sample]:
    """Return valid, ignored and invalid samples of every type, in alternating envelopes."""
    envelopes = cycle([bare, cloudevent, pubsub_push, sqs, sns, eventbridge])
    valid = [*_orders(shop), *_payments(shop), *_customers(shop), *_catalog(), *_inventory()]
    return [*(_wrap(*entry, next(envelopes)) for entry in valid), *_ignored(), *_invalid(shop)]


SampleSpec = tuple[str, Json, str]  # title, notification, outcome


def _wrap(title: str, notification: Json, outcome: str, envelope: Callable[[Json], bytes]) -> Sample:
    return Sample(f"{title} · {envelope.__name__}", envelope(notification), outcome)


def _orders(shop: Shop) -> Iterator[SampleSpec]:
    def of(kind: str, name: str, **fields: Any) -> Json:
        return message(kind, "order", uid(f"order:{name}"), **fields)

    def full(kind: str, name: str, **fields: Any) -> Json:
        return of(kind, name, order=shop.orders[uid(f"order:{name}")], **fields)

    yield "OrderCreated", full("OrderCreated", "three"), "sent"
    yield "OrderCreated, duplicate", full("OrderCreated", "three"), "sent"
    yield "OrderCreated by a guest", full("OrderCreated", "guest"), "sent"
    yield "OrderCreated in yen", full("OrderCreated", "yen"), "sent"
    yield "OrderCreated, fractions of a cent", full("OrderCreated", "precise"), "sent"
    yield "OrderCreated, custom line item", full("OrderCreated", "wrapped"), "sent"
    yield "OrderCreated with a discount code", full("OrderCreated", "discounted"), "sent"
    yield "OrderCreated, 100 lines", full("OrderCreated", "hundred"), "sent"
    paid_twice = uid("order:paid-twice")
    yield "OrderCreated, payload not included", payload_not_included("OrderCreated", "order", paid_twice), "sent"
    yield "OrderImported", full("OrderImported", "imported"), "sent"
    buyer = reference("customer", "grete")
    yield "OrderCustomerSet", of("OrderCustomerSet", "recurring", sequence=2, customer=buyer), "sent"
    guest = shop.orders[uid("order:guest")]
    email = guest["customerEmail"]
    yield "OrderCustomerEmailSet", of("OrderCustomerEmailSet", "guest", sequence=2, email=email), "sent"
    yield "OrderCreatedFromRecurringOrder", full("OrderCreatedFromRecurringOrder", "recurring"), "sent"
    yield (
        "OrderStateChanged to Complete",
        of("OrderStateChanged", "three", sequence=2, oldOrderState="Open", orderState="Complete"),
        "sent",
    )
    yield (
        "OrderStateChanged to Cancelled",
        of("OrderStateChanged", "yen", sequence=2, oldOrderState="Open", orderState="Cancelled"),
        "sent",
    )
    yield (
        "OrderStateChanged to Confirmed",
        of("OrderStateChanged", "guest", sequence=2, oldOrderState="Open", orderState="Confirmed"),
        "ignored",
    )
    shipped = of("OrderShipmentStateChanged", "guest", sequence=3, shipmentState="Shipped")
    yield "OrderShipmentStateChanged to Shipped", shipped, "sent"
    (delivery,) = guest["shippingInfo"]["deliveries"]
    (parcel,) = delivery["parcels"]
    added = of("ParcelAddedToDelivery", "guest", sequence=5, delivery=delivery, parcel=parcel)
    state = reference("state", "handed-over")
    yield "DeliveryAdded", of("DeliveryAdded", "guest", sequence=4, delivery=delivery | {"parcels": []}), "ignored"
    yield "ParcelAddedToDelivery", added, "ignored"
    yield "OrderStateTransition", of("OrderStateTransition", "guest", sequence=6, state=state, force=False), "ignored"


def _payments(shop: Shop) -> Iterator[SampleSpec]:
    charge, first, second, _ = shop.payments[uid("payment:card")]["transactions"]
    card = uid("payment:card")
    changed = {"transactionId": second["id"], "state": "Success"}

    def of(kind: str, sequence: int, **fields: Any) -> Json:
        return message(kind, "payment", card, sequence=sequence, **fields)

    yield "PaymentTransactionAdded, charge", of("PaymentTransactionAdded", 2, transaction=charge), "ignored"
    yield "PaymentTransactionAdded, refund", of("PaymentTransactionAdded", 3, transaction=first), "sent"
    yield "PaymentTransactionStateChanged", of("PaymentTransactionStateChanged", 4, **changed), "sent"
    other = uid("payment:second-card")
    absent = payload_not_included("PaymentTransactionAdded", "payment", other)
    yield "PaymentTransactionAdded, payload not included", absent, "sent"
    created = shop.payments[other] | {"version": 1}
    yield "PaymentCreated with a refund", message("PaymentCreated", "payment", other, payment=created), "sent"
    orphan = payload_not_included("PaymentTransactionAdded", "payment", uid("payment:orphan"))
    yield "PaymentTransactionAdded, no order", orphan, "ignored"
    paid_twice = message(
        "OrderPaymentAdded", "order", uid("order:paid-twice"), payment=reference("payment", "second-card")
    )
    yield "OrderPaymentAdded", paid_twice, "sent"


def _customers(shop: Shop) -> Iterator[SampleSpec]:
    grete, katherine, radia, nameless, hostile = shop.customers
    created = message("CustomerCreated", "customer", grete, customer=shop.customers[grete])
    yield "CustomerCreated", created, "sent"
    absent = payload_not_included("CustomerCreated", "customer", katherine)
    yield "CustomerCreated, payload not included", absent, "sent"
    yield "customer ResourceCreated", change("ResourceCreated", "customer", radia), "sent"
    yield "customer ResourceUpdated", change("ResourceUpdated", "customer", hostile), "sent"
    yield "customer ResourceUpdated, no name", change("ResourceUpdated", "customer", nameless), "sent"
    deleted = change("ResourceDeleted", "customer", uid("customer:gone"), dataErasure=True)
    yield "customer ResourceDeleted", deleted, "ignored"


def _catalog() -> Iterator[SampleSpec]:
    def category(kind: str, name: str) -> Json:
        make = message if kind.startswith("Category") else change
        return make(kind, "category", uid(f"category:{name}"))

    def product(kind: str, name: str, **fields: Any) -> Json:
        make = message if kind.startswith("Product") else change
        return make(kind, "product", uid(f"product:{name}"), **fields)

    yield "CategoryCreated", category("CategoryCreated", "jeans"), "sent"
    yield "category ResourceCreated", category("ResourceCreated", "shirts"), "sent"
    yield "category ResourceUpdated", category("ResourceUpdated", "women"), "sent"
    yield "category ResourceDeleted", category("ResourceDeleted", "closed-department"), "sent"
    for name in ("slim-jeans", "linen-shirt", "gift-card"):
        yield "ProductPublished", product("ProductPublished", name, scope="All", removedImageUrls=[]), "sent"
    socks = uid("product:wool-socks")
    yield "ProductPublished, payload not included", payload_not_included("ProductPublished", "product", socks), "sent"
    mug, priced = uid("product:enamel-mug"), {"variantId": 1, "staged": False}
    yield "ProductCreated, payload not included", payload_not_included("ProductCreated", "product", mug), "sent"
    yield "ProductPriceChanged", product("ProductPriceChanged", "cap", **priced), "sent"
    yield "ProductPriceChanged, staged", _staged_price(), "ignored"
    yield "StandalonePriceValueChanged", _standalone_price("ValueChanged", "mug", staged=False), "sent"
    yield "StandalonePriceDeleted", _standalone_price("Deleted", "mug-summer", sku="MUG"), "sent"
    yield "ProductUnpublished", product("ProductUnpublished", "withdrawn"), "sent"
    yield "ProductDeleted", product("ProductDeleted", "discontinued", removedImageUrls=[]), "sent"
    yield "product ResourceDeleted", product("ResourceDeleted", "discontinued"), "sent"


def _staged_price() -> Json:
    return message("ProductPriceChanged", "product", uid("product:cap"), sequence=2, variantId=1, staged=True)


def _standalone_price(kind: str, name: str, **fields: Any) -> Json:
    return message(f"StandalonePrice{kind}", "standalone-price", uid(f"standalone-price:{name}"), **fields)


def _inventory() -> Iterator[SampleSpec]:
    def entry(kind: str, name: str) -> Json:
        return change(kind, "inventory-entry", uid(f"inventory-entry:{name}"))

    yield "inventory-entry ResourceUpdated", entry("ResourceUpdated", "jeans-30"), "sent"
    yield "inventory-entry ResourceCreated", entry("ResourceCreated", "cap"), "sent"
    yield "inventory-entry of another channel", entry("ResourceUpdated", "jeans-30-store"), "sent"
    closed = uid("inventory-entry:mug-closed-store")
    yield "InventoryEntryDeleted", message("InventoryEntryDeleted", "inventory-entry", closed, sku="MUG"), "sent"


def _ignored() -> list[Sample]:
    subscription = change("ResourceCreated", "subscription", uid("subscription:klaviyo"))
    return [
        Sample("commercetools' test notification", event_grid(subscription), "ignored"),
        Sample("Event notification", bare(event(key="nightly-import")), "ignored"),
        Sample("an unknown type", bare(message("OrderTeleported", "order", uid("order:three"))), "ignored"),
    ]


def _invalid(shop: Shop) -> list[Sample]:
    anonymous = uid("order:anonymous")
    nameless = sns_raw(message("OrderCreated", "order", anonymous, order=shop.orders[anonymous]))
    bodies = {
        "an order without a customer": nameless,
        "malformed JSON": b'{"notificationType": "Message", ',
        "a JSON array": b"[1, 2, 3]",
        "an empty body": b"",
        "a text of one megabyte": b'"' + b"x" * 1_000_000 + b'"',
        "JSON nested 5,000 deep": b"[" * 5_000 + b"]" * 5_000,
        "an object without notificationType": b'{"hello": "world"}',
        "a message without resource": b'{"notificationType": "Message", "type": "OrderCreated"}',
    }
    return [Sample(title, body, "dead_lettered") for title, body in bodies.items()]
