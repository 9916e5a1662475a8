"""`transform --explain`: what a notification is, who handles it, what is fetched, sent and left out, how it ends."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime
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


def told(document: Any, snapshot: dict[str, Any] | None = None, **mapping: Any) -> str:
    """Return the account in one line."""
    body = document if isinstance(document, bytes) else json.dumps(document).encode()
    chosen = MappingConfig.model_validate(mapping)
    return " ".join(explain_trace(1, trace_notification(body, snapshot or {}, chosen), chosen).split())


def golden(case: str) -> tuple[Trace, MappingConfig]:
    folder = HERE / case
    snapshot, mapping = folder / "commercetools.json", folder / "mapping.toml"
    chosen = load_mapping(mapping if mapping.exists() else None)
    held = json.loads(snapshot.read_bytes()) if snapshot.exists() else {}
    return trace_notification((folder / "notification.json").read_bytes(), held, chosen), chosen


def test_an_account_reads_like_this() -> None:
    """Lines of a terminal's width, which name fields and ids."""
    expected = """\
3. ResourceUpdated of customer cust-ada
   envelopes   none; 256 bytes
   format      commercetools' own (Platform)
   time        2026-11-23T10:00:00.123Z
   handler     customer_changed in worker/transform/customers.py: profile upsert
               Upsert the profile with the current customer data. The order of messages does not matter.
   fetched     customers where id in (…): found cust-ada
   operation 1 upsert_profile: POST /api/profile-import
               key: cust-ada
               attributes: email, external_id, first_name, last_name, title, organization, phone_number,
               location
               properties: Shoe size, customerNumber, customerGroup, locale, dateOfBirth, isEmailVerified
   left out    newsletter, nickname: by customer.custom_fields.include
   left out    the name shoeSize: it is sent as Shoe size, by customer.custom_fields.rename
   outcome     acknowledged when Klaviyo has accepted all operations; dead-lettered if Klaviyo refuses one"""
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
    """All that were taken off, the outer one first."""
    text = told(ENVELOPES[envelope])
    assert f"envelopes {named};" in text
    assert f"{format_name}" in text.partition(" format ")[2].partition(" time ")[0]
    assert text.startswith("1. OrderStateChanged of order o-1 ")


def test_what_cannot_be_read_says_how_far_it_was_read() -> None:
    """The envelopes that could be opened, the names in the last one, what was expected, what becomes of it."""
    text = told({"ReceiptHandle": "r", "Body": json.dumps({"Type": "Notification", "Message": "{"})})
    assert "envelopes SQS > SNS;" in text
    assert "fields Type, Message" in text
    assert "outcome dead-lettered, in stage parse: expected a JSON object" in text
    assert "fields none readable" in told(b"\xff")


def test_what_was_not_included_is_said_to_be_fetched() -> None:
    """And what is found is told apart from what is not."""
    text = told(message("OrderCreated", "order", payloadNotIncluded={"reason": "size"}), {"orders": [{"id": "id-1"}]})
    assert "payload not included" in text
    assert "fetched orders where id in (…): found id-1 " in text


def test_a_missing_resource_ends_with_nothing_to_do() -> None:
    """Nothing is said to be left out of what is not there."""
    text = told(change("ResourceUpdated", "customer"), {"customers": [{"id": "other"}]})
    assert "fetched customers where id in (…): none for id-1" in text
    assert (
        "outcome acknowledged with nothing to do, in stage transform: commercetools no longer has the customer" in text
    )
    assert "left out" not in told(message("OrderStateChanged", "order", orderState="Complete"))


def test_what_the_message_brings_is_not_said_to_be_fetched() -> None:
    """An order is taken from it; a customer only stands in for what commercetools would answer."""
    assert "fetched nothing for the order itself" in told(message("OrderCreated", "order", order=ORDER))
    customer = {"id": "id-1", "email": "ada@example.com"}
    text = told(message("CustomerCreated", "customer", customer=customer))
    assert "found id-1 (in the message)" in text
    assert "(in the message)" not in told(message("CustomerCreated", "customer"), {"customers": [customer]})


def test_many_ids_are_counted() -> None:
    """A line stays a line, whatever a product has."""
    lines = [{"productId": f"p{number:02}"} for number in range(20)]
    assert "none for p00, p01, p02, p03, p04, p05, p06, p07 and 12 more" in told(
        message("OrderCreated", "order", order=ORDER | {"lineItems": lines})
    )


def test_an_id_is_never_broken() -> None:
    """It can be searched for."""
    skus = [f"{'x' * number}-shirt-blue" for number in range(1, 30, 4)]
    product = {"id": "id-1", "masterVariant": {}, "variants": [{"sku": sku} for sku in skus]}
    body = json.dumps(message("ProductPublished", "product")).encode()
    text = explain_trace(
        1, trace_notification(body, {"product-projections": [product]}, MappingConfig()), MappingConfig()
    )
    kept = text.partition("kept: ")[2].partition("left out")[0]
    assert all(re.search(rf"(?<!\S){sku}(?![^\s,])", kept) for sku in skus)


def test_no_handler_tells_what_has_one() -> None:
    """Of the same resource, else which resources."""
    text = told(message("OrderDeleted", "order"))
    assert "handler none; order has handlers for OrderCreated, OrderImported" in text
    assert "outcome acknowledged with nothing to do, in stage parse: no handler for this type" in text
    assert "none; subscription has no handlers resource types with handlers: order, payment" in told(
        change("ResourceCreated", "subscription")
    )


def test_ignored_ones_name_the_handler_and_the_setting() -> None:
    """So that it can be changed."""
    text = told(message("OrderStateChanged", "order", orderState="Open"))
    assert "handler order_state_changed in worker/transform/orders.py" in text
    assert "no event for order state Open: see order.fulfilled_states, order.cancelled_states" in text
    text = told(message("OrderCreated", "order", order=ORDER), disabled_types=["OrderCreated"])
    assert "disabled in the mapping" in text
    assert "fetched" not in text


def test_a_rejected_one_is_a_dead_letter() -> None:
    """With the stage and the reason."""
    text = told(message("OrderCreated", "order", order={"id": "o"}))
    assert "outcome dead-lettered, in stage transform: the order has neither customerEmail nor customerId" in text


def test_what_was_cut_is_named() -> None:
    """By the path of the property."""
    order = ORDER | {"custom": {"fields": {"note": "x" * 100_001}}}
    assert "truncated to Klaviyo's limits: note " in told(message("OrderCreated", "order", order=order))


def test_what_the_mapping_leaves_out_or_renames_is_named() -> None:
    """With the setting that does so."""
    order = ORDER | {"custom": {"fields": {"a": 1, "b": 2, "c": 3, "d": 4}}, "origin": "Customer"}
    rules = {"include": ["a", "b"], "exclude": ["b"], "rename": {"a": "A", "b": "B"}}
    text = told(
        message("OrderCreated", "order", order=order),
        order={"custom_fields": rules, "properties": {"include": ["*"], "exclude": ["origin"]}},
    )
    assert "left out b: by order.custom_fields.exclude left out c, d: by order.custom_fields.include" in text
    assert "left out the name a: it is sent as A, by order.custom_fields.rename" in text
    assert "left out origin: by order.properties.exclude" in text
    assert "name b" not in text


@pytest.mark.parametrize(
    ("document", "snapshot", "expected"),
    [
        (
            message("OrderCreated", "order", order=ORDER | {"billingAddress": {"mobile": "12", "country": "DE"}}),
            {},
            "phone_number: neither mobile nor phone of the address is a valid number",
        ),
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
            "2 of 3 transactions: no refund, or its state is not in payment.refund_states",
        ),
        (
            change("ResourceUpdated", "category"),
            {"categories": [{"id": "id-1"}, *({"id": f"d{n}", "ancestors": [{"id": "id-1"}]} for n in range(501))]},
            "descendants after the first 500, if any: by category.max_descendants",
        ),
        (
            change("ResourceCreated", "inventory-entry"),
            {
                "inventory": [{"id": "id-1", "sku": "S", "availableQuantity": 3}],
                "product-projections": [{"id": "p", "masterVariant": {"sku": "S"}}],
            },
            "if Klaviyo does not have it: upsert_item p, upsert_variant S",
        ),
    ],
    ids=["order-phone", "order-sku", "customer-phone", "variant", "price", "transaction", "descendants", "instead"],
)
def test_what_else_is_left_out_is_told_with_its_reason(
    document: dict[str, Any], snapshot: dict[str, Any], expected: str
) -> None:
    """What a merchant misses in Klaviyo is explained by what commercetools holds."""
    assert expected in told(document, snapshot)


@pytest.mark.parametrize(
    ("document", "snapshot"),
    [
        (message("OrderCreated", "order", order=ORDER), {}),
        (message("OrderStateChanged", "order", orderState="Complete"), {"orders": [ORDER | {"id": "id-1"}]}),
        (message("OrderShipmentStateChanged", "order", shipmentState="Shipped"), {"orders": [ORDER | {"id": "id-1"}]}),
    ],
    ids=["placed", "state", "shipment"],
)
def test_what_an_order_lacks_is_named(document: dict[str, Any], snapshot: dict[str, Any]) -> None:
    """Whose event it is, and the properties that templates ask for; not what nobody could expect."""
    lacking = told(document, snapshot).partition("without a value: ")[2]
    assert lacking.startswith("external_id, OrderNumber, ItemNames, Categories, Brands, DiscountCode, DiscountValue, ")
    assert "phone_number" not in lacking


def test_raw_properties_that_nobody_asked_for_are_not_missed() -> None:
    """None is sent unless included: the others were not left out."""
    text = told(message("OrderCreated", "order", order=ORDER), order={"properties": {"include": ["totalPrice"]}})
    assert "order.properties" not in text


def test_what_a_customer_lacks_is_named_also_when_nothing_is_sent() -> None:
    """It is the reason why."""
    customer = {"id": "id-1", "addresses": [{"phone": "12"}]}
    text = told(change("ResourceUpdated", "customer"), {"customers": [customer]})
    assert "without a value: email, first_name, last_name, " in text
    assert "left out phone_number: neither" in text
    assert "outcome acknowledged with nothing to do, in stage transform: the customer has neither" in text


def test_a_product_that_is_gone_or_has_no_prices_lacks_nothing() -> None:
    """It is deleted; a price of 0 is no choice of the mapping's then."""
    assert "left out" not in told(change("ResourceDeleted", "product"))
    product = {"id": "id-1", "masterVariant": {"id": 1, "sku": "S"}}
    assert "left out" not in told(message("ProductPublished", "product"), {"product-projections": [product]})


def test_what_is_read_is_believed_unless_the_message_comes_from_the_future() -> None:
    """No read lags here, but a clock may be wrong."""
    now, then = datetime.now(UTC).isoformat(), "2999-01-01T00:00:00Z"
    assert "outcome acknowledged with nothing" in told(message("OrderCreated", "order", createdAt=now))
    assert "outcome held and retried, in stage enrich: commercetools does not show" in told(
        message("OrderCreated", "order", createdAt=then)
    )


@pytest.mark.parametrize("case", CASES)
def test_what_is_said_to_lack_a_value_is_not_sent(case: str) -> None:
    """The account does not contradict the request."""
    trace, mapping = golden(case)
    text = " ".join(explain_trace(1, trace, mapping).split())
    lacking = set(
        text.partition("without a value: ")[2].partition(" left out ")[0].partition(" outcome ")[0].split(", ")
    )
    for operation in trace.operations[:1]:
        attributes = (operation.resource or {}).get("attributes", {})
        assert not lacking & {*attributes, *attributes.get("properties", {})}


def test_an_account_holds_nothing_personal() -> None:
    """It may go into a ticket."""
    looked_for = set()
    for case in CASES:
        trace, mapping = golden(case)
        held = [list(found.values()) for _, found in trace.lookups]
        personal = {*_values(json.loads(trace.body)), *_values(held)}
        text = explain_trace(1, trace, mapping)
        assert not [value for value in personal if re.search(rf"(?<!\w){re.escape(value)}(?!\w)", text)], case
        looked_for |= personal
    assert {"ada@example.com", "Lovelace"} <= looked_for


def _values(document: Any) -> list[str]:
    if isinstance(document, list):
        return [value for entry in document for value in _values(entry)]
    if not isinstance(document, dict):
        return []
    own = [value for name, value in document.items() if name in PERSONAL and isinstance(value, str) and value]
    return own + [value for entry in document.values() for value in _values(entry)]


@given(st.binary() | (json_values | near_notifications).map(lambda value: json.dumps(value).encode()))
@example(b'{" ": 1}')
def test_any_bytes_have_an_account(body: bytes) -> None:
    """One that a terminal can show, and whose lines cannot be taken for requests."""
    lines = explain_trace(1, trace_notification(body, {}, MappingConfig()), MappingConfig()).splitlines()
    assert lines[-1].strip()
    assert all(line.isprintable() and line[0] in "1 " for line in lines)


@given(st.text(min_size=1), st.text(min_size=1), st.text())
def test_hostile_names_cannot_steer_a_terminal(kind: str, name: str, value: str) -> None:
    """Types, ids and property names come from elsewhere."""
    order = ORDER | {"id": value, "custom": {"fields": {name: value}}}
    for document in (message(kind, "order"), message("OrderCreated", "order", order=order)):
        body = json.dumps(document).encode()
        assert all(
            line.isprintable()
            for line in explain_trace(1, trace_notification(body, {}, MappingConfig()), MappingConfig()).splitlines()
        )


@given(json_values)
def test_json_for_a_terminal_is_the_same_json(value: Any) -> None:
    """Escapes that JSON itself knows."""
    text = json.dumps(value, ensure_ascii=False)
    assert json.loads(printable(text)) == value
    assert printable(text).isprintable()


def test_the_requests_follow_each_explanation_as_they_are_without_it() -> None:
    """`grep '^{'` gives what there is without --explain."""
    documents = [message("OrderCreated", "order", order=ORDER), message("OrderCreated", "order", order=ORDER)]
    content = b"\n".join(json.dumps(document).encode() for document in documents)
    plain = CliRunner().invoke(main, ["transform", "-"], input=content)
    told = CliRunner().invoke(main, ["transform", "--explain", "-"], input=content)
    assert (plain.exit_code, told.exit_code) == (0, 0)
    assert [line for line in told.stdout.splitlines() if line.startswith("{")] == plain.stdout.splitlines()
    assert "\n\n2. OrderCreated of order id-1\n" in told.stdout
    assert told.stderr.startswith("without --commercetools")


def test_a_failed_one_is_explained_on_stdout_and_exit_code_1() -> None:
    """The others are still explained."""
    good = json.dumps(message("OrderCreated", "order", order=ORDER)).encode()
    done = CliRunner().invoke(main, ["transform", "--explain", "-"], input=b"nonsense\n{}\x9b\n" + good)
    assert done.exit_code == 1
    assert done.stdout.count("outcome     dead-lettered, in stage parse") == 2
    assert "error" not in done.stderr


def test_requests_cannot_steer_a_terminal_either() -> None:
    """Their values are whatever customers typed."""
    order = ORDER | {"custom": {"fields": {"note": "\x9b31m\u202e\x7f"}}}
    done = CliRunner().invoke(main, ["transform", "-"], input=json.dumps(message("OrderCreated", "order", order=order)))
    (line,) = done.stdout.splitlines()
    assert line.isprintable()
    assert json.loads(line)["body"]["data"]["attributes"]["properties"]["note"] == "\x9b31m\u202e\x7f"
