"""Orders, shipments and returns: what the golden folders do not cover."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from worker.budget import MAX_COPIES, MAX_LINES
from worker.errors import Ignored, Rejected
from worker.mapping import MappingConfig
from worker.model import Enriched, Notification
from worker.transform import transform
from worker.transform.order_events import event_time

NOW = datetime(2026, 11, 24, tzinfo=UTC)
CREATED = "2026-11-23T10:00:00.000Z"
OLD = "2019-03-04T11:00:00.000Z"
ORDER: dict[str, Any] = {"id": "order-1", "createdAt": CREATED, "customerEmail": "ada@example.com"}


def attributes(kind: str, order: dict[str, Any], settings: Any = None, /, **payload: Any) -> list[dict[str, Any]]:
    """Return the attributes of the events of a message."""
    notification = Notification(kind, "order", "order-1", "2026-11-23T10:00:05Z", payload)
    mapping = MappingConfig.model_validate(settings or {})
    operations = transform(Enriched(notification, NOW, order=ORDER | order), mapping)
    return [operation.resource["attributes"] for operation in operations if operation.resource]


@pytest.mark.parametrize(
    ("candidates", "expected"),
    [
        (["2026-11-23T10:00:00.123Z"], "2026-11-23T10:00:00.123Z"),
        (["2026-11-23T10:00:00.123456789+02:00"], "2026-11-23T10:00:00.123456789+02:00"),
        (["2026-11-23"], "2026-11-23T00:00:00+00:00"),
        (["0001-01-01T00:00:00+05:00", CREATED], CREATED),
        (["9999-12-31T23:59:59-05:00", CREATED], CREATED),
        (["1990-12-31T23:59:59Z", CREATED], CREATED),
        (["1991-01-01T00:00:00Z", CREATED], "1991-01-01T00:00:00Z"),
        (["2026-11-25T00:00:00Z"], "2026-11-25T00:00:00Z"),
        (["2026-11-25T00:00:01Z", None, 5, "yesterday"], ""),
    ],
)
def test_only_a_possible_time_is_the_time_of_an_event(candidates: list[Any], expected: str) -> None:
    """Klaviyo rejects other times, and the order would become a dead letter."""
    enriched = Enriched(Notification("OrderCreated", "order", "o", None, {}), NOW)
    assert event_time(enriched, *candidates) == expected


@pytest.mark.parametrize(
    ("kind", "completed_at", "imports", "time", "backfill"),
    [
        ("OrderImported", OLD, "auto", OLD, True),
        ("OrderImported", OLD, "live", OLD, None),
        ("OrderImported", "2026-11-22T10:00:05Z", "auto", "2026-11-22T10:00:05Z", None),
        ("OrderImported", "2026-11-22T10:00:04Z", "auto", "2026-11-22T10:00:04Z", True),
        ("OrderImported", "2026-11-22T10:00:05Z", "backfill", "2026-11-22T10:00:05Z", True),
        ("OrderImported", None, "auto", CREATED, None),
        ("OrderImported", "0001-01-01T00:00:00Z", "auto", CREATED, True),
        ("OrderCustomerSet", OLD, "auto", OLD, True),
        ("OrderCustomerSet", OLD, "live", OLD, None),
        ("OrderCustomerSet", "2026-11-23T12:00:00Z", "backfill", CREATED, None),
        ("OrderCustomerSet", CREATED, "backfill", CREATED, None),
        ("OrderCreated", None, "backfill", CREATED, None),
    ],
)
def test_an_old_order_that_is_imported_starts_no_flow(
    kind: str, completed_at: str | None, imports: str, time: str, backfill: bool | None
) -> None:
    """It has its own time. An order that is completed after its creation is not imported."""
    (placed,) = attributes(kind, {"completedAt": completed_at}, {"order": {"imports": imports}})
    assert (placed["time"], placed.get("backfill")) == (time, backfill)


@pytest.mark.parametrize(
    ("order", "is_sent"),
    [
        ({}, True),
        ({"billingAddress": {"email": "ada@example.com"}}, True),
        ({"billingAddress": {"email": "other@example.com"}}, False),
        ({"billingAddress": {"email": "other@example.com"}, "customerId": "ada"}, True),
    ],
)
def test_a_late_email_address_makes_no_second_sale(order: dict[str, Any], is_sent: bool) -> None:
    """An order with an email address in its addresses had its events on that profile."""
    if is_sent:
        assert attributes("OrderCustomerEmailSet", order, email="ada@example.com")
    else:
        with pytest.raises(Ignored, match="another email address"):
            attributes("OrderCustomerEmailSet", order, email="ada@example.com")


@pytest.mark.parametrize("payload", [{}, {"oldEmail": "a@example.com"}, {"email": ""}])
def test_only_the_first_email_address_counts(payload: dict[str, Any]) -> None:
    """Without its payload, the message does not say whether it is the first."""
    with pytest.raises(Ignored):
        attributes("OrderCustomerEmailSet", {}, **payload)


@pytest.mark.parametrize("email", ["former@example.com", None])
def test_an_order_that_changes_hands_is_no_second_sale(email: str | None) -> None:
    """Its Placed Order is the former customer's. The order's address can be one that this customer no longer has."""
    former = {"typeId": "customer", "id": "former"}
    with pytest.raises(Ignored, match="had a customer before"):
        attributes("OrderCustomerSet", {"customerEmail": email, "customerId": "ada"}, oldCustomer=former)


def parcel(number: int, **tracking: Any) -> dict[str, Any]:
    return {"id": f"parcel-{number}", "trackingData": tracking}


def shipped(*parcels: Any) -> dict[str, Any]:
    return {"shipping": [{"shippingInfo": {"deliveries": [{"parcels": [each]}]}} for each in parcels]}


def test_tracking_of_several_parcels() -> None:
    """Parcels without tracking data and returns are left out. The URL is that of the first parcel with a number."""
    parcels = [
        parcel(1, carrier="Bike"),
        parcel(2, trackingId="A/1", carrier="dhl"),
        parcel(3, trackingId="B", carrier="UPS"),
        parcel(4, trackingId="C", carrier="DHL", isReturn=True),
        {"id": "parcel-5", "trackingData": "none"},
    ]
    settings = {"order": {"tracking_urls": {"DHL": "https://dhl/{{trackingId}}"}}}
    (event,) = attributes("OrderShipmentStateChanged", shipped(*parcels), settings, shipmentState="Shipped")
    assert event["properties"]["TrackingNumbers"] == ["A/1", "B"]
    assert event["properties"]["Carriers"] == ["Bike", "dhl", "UPS"]
    assert event["properties"]["TrackingURL"] == "https://dhl/A%2F1"


def test_tracking_url_of_an_unknown_carrier() -> None:
    """There is no URL rather than that of another carrier."""
    settings = {"order": {"tracking_urls": {"DHL": "https://dhl/{{trackingId}}"}}}
    order = shipped(parcel(1, trackingId="B"), parcel(2, trackingId="A", carrier="DHL"))
    (event,) = attributes("OrderShipmentStateChanged", order, settings, shipmentState="Delivered")
    assert "TrackingURL" not in event["properties"]


SHIPMENTS = {"metrics": {"confirmed_shipment": "Confirmed Shipment"}}


def test_too_many_parcels_in_one_message() -> None:
    """Each becomes an event with all properties of the order."""
    order = shipped(*(parcel(number) for number in range(MAX_COPIES + 1)))
    with pytest.raises(Rejected, match="the order has 101 parcels or returns: expected at most 100"):
        attributes("ParcelAddedToDelivery", order, SHIPMENTS)


@pytest.mark.parametrize(
    ("kind", "payload"),
    [
        ("ParcelAddedToDelivery", {"parcel": parcel(1, isReturn=True)}),
        ("ParcelTrackingDataUpdated", {"parcelId": "parcel-1", "trackingData": {"trackingId": "A", "isReturn": True}}),
        ("ParcelTrackingDataUpdated", {"parcelId": "parcel-1"}),
        ("ParcelTrackingDataUpdated", {"trackingData": {"trackingId": "A"}}),
    ],
)
def test_a_returning_or_unknown_parcel_is_no_shipment(kind: str, payload: dict[str, Any]) -> None:
    """The message alone shows it."""
    with pytest.raises(Ignored):
        attributes(kind, {}, SHIPMENTS, **payload)


RETURNS = {"metrics": {"returned_order": "Returned Order"}}
LINE = {"id": "line-1", "quantity": 3, "totalPrice": {"centAmount": 1000, "currencyCode": "EUR", "fractionDigits": 2}}
GIFT = LINE | {"id": "custom-1", "quantity": 1, "slug": "gift"}


def returned(*items: dict[str, Any], **more: Any) -> dict[str, Any]:
    order = {"lineItems": [LINE], "customLineItems": [GIFT]}
    (event,) = attributes("ReturnInfoAdded", order, RETURNS, returnInfo={"items": list(items)} | more)
    return event


def test_value_of_a_return_is_the_price_of_its_items() -> None:
    """Also of custom line items. A line that the order no longer has counts for nothing."""
    event = returned(
        {"lineItemId": "line-1", "quantity": 2},
        {"customLineItemId": "custom-1", "quantity": 1},
        {"lineItemId": "gone", "quantity": 1},
    )
    assert (event["value"], event["value_currency"]) == (16.67, "EUR")
    assert [item["RowTotal"] for item in event["properties"]["ReturnedItems"]] == [6.67, 10]
    assert "value" not in returned({"lineItemId": "gone", "quantity": 1})


def test_value_of_a_returned_part_of_a_precise_total() -> None:
    """It is rounded to minor units of the currency."""
    total = {"currencyCode": "KWD", "centAmount": 1000, "preciseAmount": 1_000_400, "fractionDigits": 6}
    order = {"lineItems": [LINE | {"quantity": 3, "totalPrice": total}]}
    item = {"lineItemId": "line-1", "quantity": 2}
    (event,) = attributes("ReturnInfoAdded", order, RETURNS, returnInfo={"items": [item]})
    assert (event["value"], event["value_currency"]) == (0.667, "KWD")


def test_too_many_items_in_one_return() -> None:
    """Each becomes an entry of a property."""
    with pytest.raises(Rejected, match="the return has 1,001 items: expected at most 1,000"):
        returned(*({"lineItemId": "line-1", "quantity": 1} for _ in range(MAX_LINES + 1)))


def test_id_of_a_return_without_tracking_id() -> None:
    """It depends on the items, but not on their states or order."""
    one = {"id": "item-1", "lineItemId": "line-1", "quantity": 1, "shipmentState": "Advised"}
    two = {"lineItemId": "line-1", "quantity": 2}
    ids = [
        returned(one, two)["unique_id"],
        returned(two, one | {"shipmentState": "Returned"})["unique_id"],
        returned(one)["unique_id"],
    ]
    assert ids[0] == ids[1] != ids[2]
    assert returned(one, returnTrackingId="RET-1")["unique_id"] == "RET-1"


def test_an_order_with_as_many_lines_as_commercetools_allows_is_whole() -> None:
    """Nothing of it is truncated."""
    lines = [LINE | {"id": f"line-{n}", "variant": {"sku": f"SKU-{n}"}, "name": {"en": "x" * 500}} for n in range(500)]
    placed, *ordered = attributes("OrderCreated", {"lineItems": lines})
    assert [item["SKU"] for item in placed["properties"]["Items"]] == [f"SKU-{n}" for n in range(500)]
    assert {event["unique_id"] for event in ordered} == {f"line-{n}" for n in range(500)}


MANY = {"custom": {"fields": {f"field{n}": n for n in range(450)}}}


@pytest.mark.parametrize(
    ("kind", "order", "settings", "name"),
    [
        ("OrderCreated", MANY | {"orderNumber": "A-1"}, {}, "OrderNumber"),
        ("OrderShipmentStateChanged", MANY | {"shipmentState": "Shipped"}, {}, "TrackingNumbers"),
        ("ReturnInfoAdded", MANY | {"returnInfo": [{"returnTrackingId": "R"}]}, RETURNS, "ReturnTrackingId"),
    ],
)
def test_custom_fields_take_the_place_of_no_other_property(
    kind: str, order: dict[str, Any], settings: Any, name: str
) -> None:
    """Klaviyo accepts 400 properties. Flows need those of the event."""
    (event,) = attributes(kind, order | shipped(parcel(1, trackingId="T-1")), settings)
    assert len(event["properties"]) == 400
    assert {"OrderId", name} <= event["properties"].keys()


def test_a_raw_line_takes_the_place_of_no_other_property() -> None:
    """Klaviyo accepts 400 properties."""
    line = {f"field{n}": n for n in range(450)} | LINE
    _, ordered = attributes("OrderCreated", {"lineItems": [line]}, {"order": {"raw_line_item": True}})
    assert {"OrderId", "RowTotal"} <= ordered["properties"].keys()
