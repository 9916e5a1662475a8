"""`transform --explain`: envelopes, handler, lookups, operations, omissions and outcome of a notification."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import example, given
from hypothesis import strategies as st

from tests.golden.test_golden import CASES, HERE
from tests.unit.test_parse import ENVELOPES, json_values, near_notifications
from worker.cli import main
from worker.commands.transform.explain import explain_trace
from worker.commands.transform.trace import Trace, trace_notification
from worker.json_access import printable
from worker.mapping import MappingConfig, load_mapping

ORDER = {"id": "o", "customerEmail": "ada@example.com", "totalPrice": {"centAmount": 100, "currencyCode": "EUR"}}
PERSONAL = {"email", "customerEmail", "firstName", "lastName", "mobile", "phone", "streetName", "city", "postalCode"}


def message(kind: str, resource: str, **payload: Any) -> dict[str, Any]:
    about = {"typeId": resource, "id": payload.pop("id", "id-1")}
    return {"notificationType": "Message", "type": kind, "resource": about, **payload}


def change(kind: str, resource: str, **payload: Any) -> dict[str, Any]:
    return {"notificationType": kind, "resource": {"typeId": resource, "id": "id-1"}, **payload}


def explained(document: Any, snapshot: dict[str, Any] | None = None, **mapping: Any) -> str:
    """Return the explanation in one line."""
    body = document if isinstance(document, bytes) else json.dumps(document).encode()
    chosen = MappingConfig.model_validate(mapping)
    return " ".join(explain_trace(1, trace_notification(body, snapshot or {}, chosen), chosen).split())


def golden(case: str) -> tuple[Trace, MappingConfig]:
    folder = HERE / case
    snapshot, mapping = folder / "commercetools.json", folder / "mapping.toml"
    chosen = load_mapping(mapping if mapping.exists() else None)
    held = json.loads(snapshot.read_bytes()) if snapshot.exists() else {}
    return trace_notification((folder / "notification.json").read_bytes(), held, chosen), chosen


def test_whole_explanation() -> None:
    """An explanation names fields and ids, in lines of a terminal's width."""
    expected = """\
3. ResourceUpdated of customer cust-ada
   envelopes   none; 256 bytes
   format      commercetools' own (Platform)
   time        2026-11-23T10:00:00.123Z
   handler     customer_changed in worker/transform/customers.py: profile upsert
               Upsert the profile with the current customer data, so the order of messages does not matter.
   fetched     customers where id in (…): found cust-ada
   operation 1 upsert_profile: POST /api/profile-import
               key: cust-ada
               attributes: email, external_id, first_name, last_name, organization, locale, phone_number,
               location
               properties: customerNumber, customerGroup, locale, dateOfBirth, isEmailVerified, Title,
               commercetoolsFields, Shoe size
               cleared if Klaviyo has a value: customerGroups, Salutation, Stores
   left out    newsletter, nickname: not listed in customer.custom_fields.include
   left out    the name shoeSize: renamed to Shoe size by customer.custom_fields.rename
   outcome     acknowledged when Klaviyo has accepted all operations; dead-lettered if Klaviyo rejects one"""
    assert explain_trace(3, *golden("customer-ResourceUpdated")) == expected


@pytest.mark.parametrize(
    ("envelope", "named", "format_name"),
    [
        ("bare", "none", "Platform"),
        ("cloudevent", "CloudEvents", "CloudEvents"),
        ("cloudevent_with_string", "CloudEvents", "CloudEvents"),
        ("pubsub_push", "Pub/Sub push", "Platform"),
        ("pubsub_push_of_cloudevent", "Pub/Sub push > CloudEvents", "CloudEvents"),
        ("sqs", "SQS", "Platform"),
        ("sns", "SNS", "Platform"),
        ("sns_in_sqs", "SQS > SNS", "Platform"),
        ("eventbridge", "EventBridge", "Platform"),
        ("eventbridge_in_sqs", "SQS > EventBridge", "Platform"),
    ],
)
def test_envelopes_and_format_are_named(envelope: str, named: str, format_name: str) -> None:
    """All envelopes are named, the outer one first."""
    text = explained(ENVELOPES[envelope])
    assert f"envelopes {named};" in text
    assert f"{format_name}" in text.partition(" format ")[2].partition(" time ")[0]
    assert text.startswith("1. OrderStateChanged of order o-1 ")


def test_unreadable_notification_shows_where_reading_stopped() -> None:
    """The explanation has the envelopes, the fields of the innermost document, the error and the outcome."""
    text = explained({"ReceiptHandle": "r", "Body": json.dumps({"Type": "Notification", "Message": "{"})})
    assert "envelopes SQS > SNS;" in text
    assert "fields Type, Message" in text
    assert "outcome dead-lettered, in stage parse: expected a JSON object" in text
    assert "fields none readable" in explained(b"\xff")


def test_payload_not_included_is_fetched() -> None:
    """The explanation lists the resource that was found."""
    text = explained(
        message("OrderCreated", "order", payloadNotIncluded={"reason": "size"}), {"orders": [{"id": "id-1"}]}
    )
    assert "payload not included" in text
    assert "fetched orders where id in (…): found id-1 " in text


def test_notification_of_missing_resource_is_ignored() -> None:
    """No omissions are listed for a resource that does not exist."""
    text = explained(change("ResourceUpdated", "customer"), {"customers": [{"id": "other"}]})
    assert "fetched customers where id in (…): none for id-1" in text
    assert "outcome ignored and acknowledged, in stage transform: commercetools no longer has the customer" in text
    assert "left out" not in explained(message("OrderStateChanged", "order", orderState="Complete"))


def test_resources_in_the_message_are_marked() -> None:
    """An order in the message is not looked up. A customer in the message replaces the one in commercetools."""
    assert "fetched nothing for the order itself" in explained(message("OrderCreated", "order", order=ORDER))
    customer = {"id": "id-1", "email": "ada@example.com"}
    text = explained(message("CustomerCreated", "customer", customer=customer))
    assert "found id-1 (in the message)" in text
    assert "(in the message)" not in explained(message("CustomerCreated", "customer"), {"customers": [customer]})


def test_long_lists_of_ids_are_shortened() -> None:
    """The remaining ids are counted."""
    lines = [{"productId": f"p{number:02}"} for number in range(20)]
    assert "none for p00, p01, p02, p03, p04, p05, p06, p07 and 12 more" in explained(
        message("OrderCreated", "order", order=ORDER | {"lineItems": lines})
    )


def test_ids_are_not_broken_across_lines() -> None:
    """An id can be searched for in the output."""
    skus = [f"{'x' * number}-shirt-blue" for number in range(1, 30, 4)]
    product = {"id": "id-1", "masterVariant": {}, "variants": [{"sku": sku} for sku in skus]}
    body = json.dumps(message("ProductPublished", "product")).encode()
    text = explain_trace(
        1, trace_notification(body, {"product-projections": [product]}, MappingConfig()), MappingConfig()
    )
    kept = text.partition("kept: ")[2].partition("left out")[0]
    assert all(re.search(rf"(?<!\S){sku}(?![^\s,])", kept) for sku in skus)


def test_missing_handler_lists_existing_ones() -> None:
    """The existing handlers are those of the same resource type, or the resource types that have any."""
    text = explained(message("OrderDeleted", "order"))
    assert "handler none; order has handlers for OrderCreated, OrderImported" in text
    assert "outcome ignored and acknowledged, in stage parse: no handler for this type" in text
    assert "none; subscription has no handlers resource types with handlers: order, payment" in explained(
        change("ResourceCreated", "subscription")
    )


def test_ignored_notification_names_handler_and_setting() -> None:
    """The operator learns which setting to change."""
    text = explained(message("OrderStateChanged", "order", orderState="Open"))
    assert "handler order_state_changed in worker/transform/fulfilment.py" in text
    assert "no event for order state Open: see order.fulfilled_states, order.cancelled_states" in text
    text = explained(message("OrderCreated", "order", order=ORDER), disabled_types=["OrderCreated"])
    assert "disabled in the mapping" in text
    assert "fetched" not in text


def test_rejected_notification_is_dead_lettered() -> None:
    """The outcome has the stage and the reason."""
    text = explained(message("OrderCreated", "order", order={"id": "o"}))
    assert "outcome dead-lettered, in stage transform: the order names no buyer" in text


def test_truncated_properties_are_named() -> None:
    """A property is named by its path."""
    order = ORDER | {"custom": {"fields": {"note": "x" * 100_001}}}
    assert "truncated to Klaviyo's limits: note " in explained(message("OrderCreated", "order", order=order))


def test_omissions_by_the_mapping_are_named() -> None:
    """Excluded, not included and renamed properties are listed with the setting."""
    order = ORDER | {"custom": {"fields": {"a": 1, "b": 2, "c": 3, "d": 4}}, "origin": "Customer"}
    rules = {"include": ["a", "b"], "exclude": ["b"], "rename": {"a": "A", "b": "B"}}
    text = explained(
        message("OrderCreated", "order", order=order),
        order={"custom_fields": rules, "properties": {"include": ["*"], "exclude": ["origin"]}},
    )
    listed = (
        "left out b: listed in order.custom_fields.exclude left out c, d: not listed in order.custom_fields.include"
    )
    assert listed in text
    assert "left out the name a: renamed to A by order.custom_fields.rename" in text
    assert "left out origin: listed in order.properties.exclude" in text
    assert "name b" not in text


def test_cart_that_has_not_reached_checkout() -> None:
    """The setting that decides is named, and the properties without a value."""
    line = {"id": "l", "quantity": 1, "name": {"en": "Jeans"}, "variant": {"sku": "S"}}
    cart = {"id": "id-1", "cartState": "Active", "customerId": "c", "lineItems": [line]}
    shop = {"carts": [cart], "customers": [{"id": "c", "email": "ada@example.com"}]}
    metrics = {"started_checkout": "Started Checkout", "added_to_cart": "Added to Cart"}
    text = explained(change("ResourceUpdated", "cart"), shop, metrics=metrics)
    missing = "the cart has none of shippingAddress, paymentInfo, customerEmail (cart.checkout_when)"
    assert f"left out Started Checkout: {missing}" in text
    assert "left out without a value: CheckoutURL, Categories, DiscountCode, Store, Country" in text
    assert "left out" not in explained(change("ResourceUpdated", "cart"), {"carts": []}, metrics=metrics)


@pytest.mark.parametrize(
    ("document", "snapshot", "expected"),
    [
        (
            message("OrderCreated", "order", order=ORDER | {"lineItems": [{"variant": {"sku": "S"}}, {}, {}]}),
            {},
            "SKU: 2 of 3 lines have none",
        ),
        (
            change("ResourceCreated", "customer"),
            {"customers": [{"id": "id-1", "email": "a@b.example", "addresses": [{"phone": "12"}]}]},
            "phone_number: neither mobile nor phone of the address is a valid number",
        ),
        (
            message("ProductPublished", "product"),
            {"product-projections": [{"id": "id-1", "masterVariant": {"id": 1, "sku": "S"}, "variants": [{"id": 2}]}]},
            "left out variant 2: it has no sku outcome",
        ),
        (
            message("ProductPublished", "product"),
            {
                "product-projections": [
                    {"id": "id-1", "masterVariant": {"id": 1, "sku": "S", "prices": [{"channel": {"id": "other"}}]}}
                ]
            },
            "price of variant 1: none fits",
        ),
        (
            message("PaymentTransactionStateChanged", "payment"),
            {
                "payments": [
                    {
                        "id": "id-1",
                        "transactions": [
                            {"id": "t1", "type": "Refund", "state": "Success"},
                            {"id": "t2", "type": "Charge", "state": "Success"},
                            {"id": "t3", "type": "Refund", "state": "Failure"},
                        ],
                    }
                ],
                "orders": [ORDER | {"paymentInfo": {"payments": [{"id": "id-1"}]}}],
            },
            "2 of 3 transactions: no refund in a state that counts: see payment.refund_types, payment.refund_states",
        ),
        (
            change("ResourceUpdated", "category"),
            {"categories": [{"id": "id-1"}, *({"id": f"d{n}", "ancestors": [{"id": "id-1"}]} for n in range(501))]},
            "descendants after the first 500, if any: limited by category.max_descendants",
        ),
    ],
    ids=["order-sku", "customer-phone", "variant", "price", "transaction", "descendants"],
)
def test_other_omissions_have_a_reason(document: dict[str, Any], snapshot: dict[str, Any], expected: str) -> None:
    """Each omission is explained by the data in commercetools."""
    assert expected in explained(document, snapshot)


@pytest.mark.parametrize(
    ("document", "snapshot"),
    [
        (message("OrderCreated", "order", order=ORDER), {}),
        (message("OrderStateChanged", "order", orderState="Complete"), {"orders": [ORDER | {"id": "id-1"}]}),
        (message("OrderShipmentStateChanged", "order", shipmentState="Shipped"), {"orders": [ORDER | {"id": "id-1"}]}),
    ],
    ids=["placed", "state", "shipment"],
)
def test_empty_properties_of_an_order_are_named(document: dict[str, Any], snapshot: dict[str, Any]) -> None:
    """The list has identifiers and the properties that templates use, except optional ones."""
    empty = explained(document, snapshot).partition("without a value: ")[2]
    assert empty.startswith("external_id, OrderNumber, ItemNames, Categories, Brands, DiscountCode, DiscountValue, ")
    assert "phone_number" not in empty


def test_raw_properties_without_include_are_not_omissions() -> None:
    """Raw properties are sent only if the mapping includes them."""
    text = explained(message("OrderCreated", "order", order=ORDER), order={"properties": {"include": ["totalPrice"]}})
    assert "order.properties" not in text


def test_empty_properties_of_an_ignored_customer_are_named() -> None:
    """They are the reason why the customer is ignored."""
    customer = {"id": "id-1", "addresses": [{"phone": "12"}]}
    text = explained(change("ResourceUpdated", "customer"), {"customers": [customer]})
    assert "left out without a value: email left out phone_number: neither" in text
    assert "left out phone_number: neither" in text
    assert "outcome ignored and acknowledged, in stage transform: the customer has neither" in text


def test_deleted_product_has_no_omissions() -> None:
    """Nothing of it is written."""
    assert "left out" not in explained(change("ResourceDeleted", "product"))


def test_missing_price_is_named() -> None:
    """Klaviyo requires a price of a new variant, so it gets 0."""
    product = {"id": "id-1", "masterVariant": {"id": 1, "sku": "S"}}
    text = explained(message("ProductPublished", "product"), {"product-projections": [product]})
    assert "left out price of variant 1: none fits currency, price.channel, price.country and the time; 0 if" in text


@pytest.mark.parametrize("case", CASES)
def test_properties_without_a_value_are_not_sent(case: str) -> None:
    """The explanation does not contradict the request."""
    trace, mapping = golden(case)
    text = " ".join(explain_trace(1, trace, mapping).split())
    lacking = set(
        text.partition("without a value: ")[2].partition(" left out ")[0].partition(" outcome ")[0].split(", ")
    )
    for operation in trace.operations[:1]:
        attributes = (operation.resource or {}).get("attributes", {})
        assert not lacking & {*attributes, *attributes.get("properties", {})}


def test_explanation_has_no_personal_data() -> None:
    """An explanation can be attached to a ticket."""
    searched = set()
    for case in CASES:
        trace, mapping = golden(case)
        held = [list(found.values()) for _, found in trace.lookups]
        personal = {*_values(json.loads(trace.body)), *_values(held)}
        text = explain_trace(1, trace, mapping)
        assert not [value for value in personal if re.search(rf"(?<!\w){re.escape(value)}(?!\w)", text)], case
        searched |= personal
    assert {"ada@example.com", "Lovelace"} <= searched


@pytest.mark.parametrize(
    "document",
    [
        {"ada@example.com": 1, "Lovelace": {}},
        {"notificationType": "Message", "Lovelace": 1},
        message("OrderStateChanged", "order", orderState="Lovelace", createdAt="ada@example.com"),
        message("OrderShipmentStateChanged", "order", shipmentState="Lovelace", createdAt="Lovelace"),
    ],
)
def test_document_of_another_shape_shows_no_personal_data(document: dict[str, Any]) -> None:
    """Names can stand where fields, states and times are expected."""
    text = explained(document)
    assert "Lovelace" not in text
    assert "ada@" not in text


def _values(document: Any) -> list[str]:
    if isinstance(document, list):
        return [value for entry in document for value in _values(entry)]
    if not isinstance(document, dict):
        return []
    own = [value for name, value in document.items() if name in PERSONAL and isinstance(value, str) and value]
    return own + [value for entry in document.values() for value in _values(entry)]


@given(st.binary() | (json_values | near_notifications).map(lambda value: json.dumps(value).encode()))
@example(b'{" ": 1}')
def test_any_bytes_have_an_explanation(body: bytes) -> None:
    """Every line is printable and cannot be mistaken for a request."""
    lines = explain_trace(1, trace_notification(body, {}, MappingConfig()), MappingConfig()).splitlines()
    assert lines[-1].strip()
    assert all(line.isprintable() and line[0] in "1 " for line in lines)


@given(st.text(min_size=1), st.text(min_size=1), st.text())
def test_hostile_names_cannot_steer_a_terminal(kind: str, name: str, value: str) -> None:
    """Types, ids and property names come from other systems."""
    order = ORDER | {"id": value, "custom": {"fields": {name: value}}}
    for document in (message(kind, "order"), message("OrderCreated", "order", order=order)):
        body = json.dumps(document).encode()
        assert all(
            line.isprintable()
            for line in explain_trace(1, trace_notification(body, {}, MappingConfig()), MappingConfig()).splitlines()
        )


@given(json_values)
def test_printable_json_has_the_same_value(value: Any) -> None:
    """Only escapes of JSON itself are used."""
    text = json.dumps(value, ensure_ascii=False)
    assert json.loads(printable(text)) == value
    assert printable(text).isprintable()


def test_requests_are_the_same_with_and_without_explain() -> None:
    """`grep '^{'` returns the output without --explain."""
    documents = [message("OrderCreated", "order", order=ORDER), message("OrderCreated", "order", order=ORDER)]
    content = b"\n".join(json.dumps(document).encode() for document in documents)
    plain = CliRunner().invoke(main, ["transform", "-"], input=content)
    with_explain = CliRunner().invoke(main, ["transform", "--explain", "-"], input=content)
    assert (plain.exit_code, with_explain.exit_code) == (0, 0)
    assert [line for line in with_explain.stdout.splitlines() if line.startswith("{")] == plain.stdout.splitlines()
    assert "\n\n2. OrderCreated of order id-1\n" in with_explain.stdout
    assert with_explain.stderr.startswith("without --commercetools")


def test_failed_notification_is_explained_with_exit_code_1() -> None:
    """The other notifications are also explained."""
    good = json.dumps(message("OrderCreated", "order", order=ORDER)).encode()
    done = CliRunner().invoke(main, ["transform", "--explain", "-"], input=b"nonsense\n{}\x9b\n" + good)
    assert done.exit_code == 1
    assert done.stdout.count("outcome     dead-lettered, in stage parse") == 2
    assert "error" not in done.stderr


def test_requests_cannot_steer_a_terminal() -> None:
    """Their values are entered by customers."""
    order = ORDER | {"custom": {"fields": {"note": "\x9b31m\u202e\x7f"}}}
    done = CliRunner().invoke(main, ["transform", "-"], input=json.dumps(message("OrderCreated", "order", order=order)))
    (line,) = done.stdout.splitlines()
    assert line.isprintable()
    assert json.loads(line)["body"]["data"]["attributes"]["properties"]["note"] == "\x9b31m\u202e\x7f"


def test_consents_are_explained() -> None:
    """The profile is written first, and its property last."""
    customer = {"id": "id-1", "email": "ada@example.com", "custom": {"fields": {"newsletter": True}}}
    data = {"customers": [customer]}
    text = explained(change("ResourceUpdated", "customer"), data, consent={"email": "newsletter", "sms": "texts"})
    assert "subscribed to email if newsletter in Klaviyo says otherwise" in text
    assert "unsubscribed from sms if texts in Klaviyo says otherwise" in text
