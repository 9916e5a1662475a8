"""Samples of every type of notification, in alternating envelopes, with their expected outcome."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import cycle
from typing import TYPE_CHECKING, Any

from worker.sandbox.commercetools.shop import reference, uid
from worker.sandbox.envelopes import bare, cloudevent, event_grid, eventbridge, pubsub_push, sns, sns_raw, sqs
from worker.sandbox.http import Json
from worker.sandbox.notifications import change, event, message, payload_not_included

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from worker.sandbox.commercetools.shop import Shop


@dataclass(frozen=True, slots=True)
class Sample:
    """A message for the queue, and its expected outcome."""

    title: str
    body: bytes = field(repr=False)
    outcome: str = "sent"


def sample_notifications(shop: Shop) -> list[Sample]:
    """Return valid, ignored and invalid samples of every type, in alternating envelopes."""
    envelopes = cycle([bare, cloudevent, pubsub_push, sqs, sns, eventbridge])
    valid = [*_orders(shop), *_fulfilment(shop), *_payments(shop), *_customers(shop), *_catalog(), *_inventory()]
    return [*(_wrap(*entry, next(envelopes)) for entry in valid), *_ignored(), *_invalid(shop)]


SampleSpec = tuple[str, Json, str]  # title, notification, outcome


def _wrap(title: str, notification: Json, outcome: str, envelope: Callable[[Json], bytes]) -> Sample:
    return Sample(f"{title} · {envelope.__name__}", envelope(notification), outcome)


def _of_order(kind: str, name: str, **fields: Any) -> Json:
    return message(kind, "order", uid(f"order:{name}"), **fields)


def _orders(shop: Shop) -> Iterator[SampleSpec]:
    def full(kind: str, name: str) -> Json:
        return _of_order(kind, name, order=shop.orders[uid(f"order:{name}")])

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
    yield "OrderCustomerSet", _of_order("OrderCustomerSet", "recurring", sequence=2, customer=buyer), "sent"
    email = shop.orders[uid("order:guest")]["customerEmail"]
    yield "OrderCustomerEmailSet", _of_order("OrderCustomerEmailSet", "guest", sequence=2, email=email), "sent"
    yield "OrderCreatedFromRecurringOrder", full("OrderCreatedFromRecurringOrder", "recurring"), "sent"


def _fulfilment(shop: Shop) -> Iterator[SampleSpec]:
    def changed(name: str, state: str) -> Json:
        return _of_order("OrderStateChanged", name, sequence=2, oldOrderState="Open", orderState=state)

    def of(kind: str, sequence: int, **fields: Any) -> Json:
        return _of_order(kind, "guest", sequence=sequence, **fields)

    (delivery,) = shop.orders[uid("order:guest")]["shippingInfo"]["deliveries"]
    (parcel,) = delivery["parcels"]
    yield "OrderStateChanged to Complete", changed("three", "Complete"), "sent"
    yield "OrderStateChanged to Cancelled", changed("yen", "Cancelled"), "sent"
    yield "OrderStateChanged to Confirmed", changed("guest", "Confirmed"), "ignored"
    shipped = of("OrderShipmentStateChanged", 3, shipmentState="Shipped")
    yield "OrderShipmentStateChanged to Shipped", shipped, "sent"
    yield "DeliveryAdded", of("DeliveryAdded", 4, delivery=delivery | {"parcels": []}), "ignored"
    added = of("ParcelAddedToDelivery", 5, delivery=delivery, parcel=parcel)
    yield "ParcelAddedToDelivery", added, "ignored"
    handed_over = of("OrderStateTransition", 6, state=reference("state", "handed-over"), force=False)
    yield "OrderStateTransition", handed_over, "ignored"


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
        "OrderPaymentAdded", "order", uid("order:paid-twice"), paymentRef=reference("payment", "second-card")
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
