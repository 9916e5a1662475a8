"""The budget of a message: what is beyond it is rejected with its reason, and what is within it has bounded costs."""

from __future__ import annotations

import base64
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from worker import budget
from worker.commercetools.queries import InMemoryReader, Query, QueryResult
from worker.enrich import Enricher
from worker.errors import Ignored, Rejected, WorkerError
from worker.mapping import MappingConfig
from worker.model import Enriched, Json, Notification, Operation
from worker.parse import parse
from worker.transform import transform
from worker.transform.fields import product_url
from worker.transform.size_limits import EVENT_BYTES, truncate

if TYPE_CHECKING:
    from collections.abc import Collection

HEAD: Json = {
    "notificationType": "Message",
    "type": "OrderCreated",
    "resource": {"typeId": "order", "id": "o"},
    "createdAt": "2026-11-23T10:00:00.123Z",
}
MAPPING = MappingConfig.model_validate(
    {
        "order": {"properties": {"include": ["*"]}, "raw_line_item": True},
        "product_url_template": "https://shop.example/{{productSlug}}?sku={{sku}}",
    }
)


class CountingReader(InMemoryReader):
    """A Reader that counts the values that were looked up."""

    looked_up = 0

    def find(self, query: Query, values: Collection[str]) -> QueryResult:
        self.looked_up += len(values)
        return super().find(query, values)


def body_of(order: Json, **message: Any) -> bytes:
    return orjson.dumps(HEAD | {"order": {"id": "o", "customerEmail": "ada@example.com"} | order} | message)


def processed(body: bytes, shop: dict[str, list[Json]] | None = None) -> tuple[list[Operation], int]:
    """Run the stages before sending. Return the operations and the number of values that were looked up."""
    reader = CountingReader(shop or {})
    (enriched,) = Enricher(reader, MAPPING).enrich([parse(body)])
    if isinstance(enriched, WorkerError):
        raise enriched
    return list(transform(enriched, MAPPING)), reader.looked_up


def bytes_of(operations: list[Operation]) -> int:
    return sum(len(orjson.dumps(operation.resource)) for operation in operations)


def enveloped(body: bytes) -> bytes:
    return orjson.dumps({"message": {"data": base64.b64encode(body).decode()}})


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (body_of({"orderNumber": "x" * budget.MAX_BYTES}), "bytes"),
        (body_of({"lineItems": [{}] * budget.MAX_VALUES}), "values"),
        (body_of({"custom": {"fields": {"x": [[]] * budget.MAX_VALUES}}}), "values"),
        (body_of({"custom": {"fields": {"x": [0] * budget.MAX_VALUES}}}), "values"),
        (enveloped(body_of({"lineItems": [{}] * budget.MAX_VALUES})), "values"),
        (b"[" * budget.MAX_VALUES + b"[", "values"),
    ],
)
def test_message_beyond_the_budget_is_rejected_before_it_is_decoded(
    body: bytes, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Decoded, it would take up to a hundred times its size."""
    decoded: list[int] = []
    loads = orjson.loads

    def recording(text: bytes) -> object:
        decoded.append(len(text))
        return loads(text)

    monkeypatch.setattr("worker.parse.orjson.loads", recording)
    with pytest.raises(Rejected, match=rf"the message has [\d,]+ {reason}: expected at most [\d,]+"):
        parse(body)
    assert decoded == ([len(body)] if b'"data"' in body else [])  # an envelope is decoded, its content is not


@pytest.mark.parametrize("lines", ["lineItems", "customLineItems"])
def test_order_with_too_many_lines_is_rejected_before_anything_is_looked_up(lines: str) -> None:
    """An order in commercetools has up to 500 line items; each becomes an event and a lookup."""
    order = {lines: [{"id": str(n), "productId": str(n)} for n in range(budget.MAX_LINES + 1)]}
    with pytest.raises(Rejected, match="the order has 1,001 lines: expected at most 1,000"):
        processed(body_of(order), {})


def test_order_that_is_fetched_has_the_same_budget() -> None:
    """An answer of commercetools can be larger than a message."""
    order = {"id": "o", "customerEmail": "a@example.com", "lineItems": [{"productId": str(n)} for n in range(10_000)]}
    with pytest.raises(Rejected, match="10,000 lines"):
        processed(orjson.dumps(HEAD), {"orders": [order]})


def test_largest_order_of_commercetools_is_within_the_budget() -> None:
    """500 lines, each with 50 prices, and 500 custom lines."""
    price = {"id": "p" * 36, "value": {"centAmount": 1, "currencyCode": "EUR", "fractionDigits": 2}, "country": "DE"}
    line = {"productId": "p" * 36, "variant": {"sku": "S", "prices": [price] * 50, "attributes": [{}] * 50}}
    order = {"lineItems": [line | {"id": f"l{n}"} for n in range(500)], "customLineItems": [{"slug": "s"}] * 500}
    operations, _ = processed(body_of(order))
    assert len(operations) == 1_001


def test_product_in_too_many_categories_is_rejected() -> None:
    """Otherwise the message would need thousands of queries."""
    product = {"id": "p", "categories": [{"id": str(n)} for n in range(100_000)]}
    change = HEAD | {"type": "ProductPublished", "resource": {"typeId": "product", "id": "p"}}
    with pytest.raises(Rejected, match="the product has 100,000 categories: expected at most 1,000"):
        processed(orjson.dumps(change), {"product-projections": [product]})
    with pytest.raises(Rejected, match="the product has 100,000 categories"):
        processed(body_of({"lineItems": [{"productId": "p"}]}), {"product-projections": [product]})


def test_variants_of_a_product_are_limited_by_the_lookup_of_their_stock() -> None:
    """A product in commercetools has up to 100 variants by default."""
    change = orjson.dumps(HEAD | {"type": "ProductPublished", "resource": {"typeId": "product", "id": "p"}})
    variants = [{"id": n, "sku": f"s{n}"} for n in range(budget.MAX_LOOKUPS)]
    shop = {"product-projections": [{"id": "p", "masterVariant": {"sku": "s"}, "variants": variants[1:]}]}
    operations, looked_up = processed(change, shop)
    assert (len(operations), looked_up) == (budget.MAX_LOOKUPS + 2, budget.MAX_LOOKUPS + 1)
    shop["product-projections"][0]["variants"] = variants
    with pytest.raises(Rejected, match="the message has 10,001 ids to look up: expected at most 10,000"):
        processed(change, shop)


def test_placeholder_in_a_value_is_not_replaced() -> None:
    """Otherwise a slug of placeholders would repeat the SKU as often."""
    template = "https://shop.example/{{productSlug}}?s={{sku}}&x={{other}}"
    url = product_url({"en-US": "{{sku}}" * 1_000}, "p", {"sku": "s" * 10_000}, "en-US", template)
    assert url == f"https://shop.example/{'%7B%7Bsku%7D%7D' * 1_000}?s={'s' * 10_000}&x={{{{other}}}}"


def test_long_ids_are_not_looked_up() -> None:
    """No id in commercetools is longer than 256 characters, but a query for one would fill a request."""
    lines = [{"id": str(n), "productId": f"{n}".ljust(3_000, "p")} for n in range(300)]
    operations, looked_up = processed(body_of({"lineItems": lines, "discountCodes": [_code("d" * 257), _code("d")]}))
    assert (len(operations), looked_up) == (301, 1)


def _code(identifier: str) -> Json:
    return {"discountCode": {"id": identifier}, "state": "MatchesCart"}


def test_payment_with_too_many_refunds_is_rejected() -> None:
    """Each refund becomes an event with all properties of the order."""
    with pytest.raises(Rejected, match="the payment has 101 refunds: expected at most 100"):
        _refunds(budget.MAX_REFUNDS + 1, {})


def test_refunds_share_the_size_of_one_event() -> None:
    """A large order is truncated in the refunds' events, but their own properties are kept."""
    custom = {f"p{n}": "x" * 90_000 for n in range(45)} | {f"q{n}": n for n in range(400)}
    operations = _refunds(50, {"custom": {"fields": custom}})
    assert len(operations) == 50
    assert bytes_of(operations) <= EVENT_BYTES
    for operation in operations:
        assert operation.resource is not None
        assert operation.resource["attributes"]["properties"].keys() >= {"RefundAmount", "TransactionId"}
        assert "*" in operation.truncated


def _refunds(number: int, order: Json) -> list[Operation]:
    money = {"centAmount": 100, "currencyCode": "EUR"}
    refund = {"type": "Refund", "state": "Success", "amount": money}
    payment = {"id": "pay", "transactions": [refund | {"id": f"t{n}"} for n in range(number)]}
    notification = Notification("PaymentTransactionAdded", "payment", "pay", "2026-11-23T10:00:00Z", {})
    order = {"id": "o", "customerEmail": "ada@example.com"} | order
    now = datetime(2026, 11, 24, tzinfo=UTC)
    return list(transform(Enriched(notification, now, payment=payment, order=order), MappingConfig()))


@pytest.mark.parametrize("kind", ["T" * 257, "a\nb", "\u202e", "", 5])
@pytest.mark.parametrize("field", ["type", "payloadNotIncluded"])
def test_message_type_is_a_short_printable_text(kind: object, field: str) -> None:
    """It appears in every log line and dead letter of the message."""
    message = {name: value for name, value in HEAD.items() if name != "type"}
    message[field] = kind if field == "type" else {"payloadType": kind}
    with pytest.raises(Rejected, match=r"`type` or `payloadNotIncluded\.payloadType`"):
        parse(orjson.dumps(message))


def test_long_texts_are_not_repeated_in_every_event() -> None:
    """An identifier that is no identifier appears in no event; a text of the order only in its own event."""
    long = "x" * 100_000
    order = {"customerEmail": long, "customerId": "c", "orderNumber": long, "createdAt": long, "id": long}
    body = body_of(order | {"lineItems": [{"id": str(n)} for n in range(1_000)]})
    operations, _ = processed(body)
    assert bytes_of(operations) < 2 * len(body) + 400 * len(operations)


def test_names_of_truncated_properties_are_bounded() -> None:
    """A log line names at most 20 paths of 200 characters, however many values were truncated."""
    value: Json = {f"{n:x}": {} for n in range(20_000)}
    for n in range(8):
        value = {"p" * 100_000 + str(n): value}
    fitted, truncated = truncate({"deep": value})
    assert len(orjson.dumps(fitted)) <= EVENT_BYTES
    assert truncated[-1] == budget.MORE
    assert len(truncated) <= budget.MAX_PATHS + 1
    assert max(map(len, truncated)) <= budget.MAX_PATH_LENGTH


def test_depth_is_truncated() -> None:
    """JSON can be nested up to 1,024 deep. Deeper bodies are unreadable."""
    line = {"variant": {"attributes": [{"name": "brand", "value": "DEEP"}]}}
    body = body_of({"custom": {"fields": {"deep": "DEEP"}}, "lineItems": [line]})
    operations, _ = processed(body.replace(b'"DEEP"', b"[" * 1_000 + b'"leaf"' + b"]" * 1_000))
    assert "deep" + "[]" * 9 in operations[0].truncated
    with pytest.raises(Rejected, match="not JSON"):
        parse(body.replace(b'"DEEP"', b"[" * 1_024 + b"]" * 1_024))


TEXTS = st.sampled_from(["", "a", "é" * 100, "x" * 20_000])
NUMBERS = st.sampled_from([0, 300])
VALUES = st.recursive(
    st.none() | st.just(2**63) | TEXTS | st.builds(lambda text, number: [text] * number, TEXTS, st.just(3)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=5,
)
LINE_FIELDS = ["id", "productId", "name", "variant", "totalPrice", "price", "productSlug", "quantity", "slug", "money"]
LINES = st.builds(
    lambda line, number: [line] * number, st.dictionaries(st.sampled_from(LINE_FIELDS), VALUES, max_size=1), NUMBERS
)
CODES = st.builds(lambda code, number: [_code(code)] * number, TEXTS, NUMBERS)
FIELDS: dict[str, st.SearchStrategy[Any]] = {
    **dict.fromkeys(("id", "orderNumber", "customerEmail", "customerId", "createdAt"), TEXTS),
    **dict.fromkeys(("billingAddress", "shippingAddress", "totalPrice", "custom", "shippingInfo"), VALUES),
    **dict.fromkeys(("lineItems", "customLineItems"), LINES),
    "discountCodes": CODES,
}


@settings(max_examples=60)
@given(order=st.fixed_dictionaries({}, optional=FIELDS))
def test_an_order_costs_in_proportion_to_its_bytes(order: Json) -> None:
    """Operations, lookups, bytes to send and names to log are bounded by the bytes of the message."""
    body = body_of(order)
    try:
        operations, looked_up = processed(body)
    except (Ignored, Rejected):
        return
    assert len(operations) <= 1 + len(order.get("lineItems", ())) + len(order.get("customLineItems", ()))
    assert looked_up <= len(body)
    assert bytes_of(operations) <= 10 * len(body) + 2_000 * len(operations)
    assert all(len(operation.truncated) <= budget.MAX_PATHS + 1 for operation in operations)
