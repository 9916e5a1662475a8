"""The parse stage: bytes -> Notification."""

from __future__ import annotations

import base64
import json
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.errors import Ignored, Rejected
from worker.parse import MAX_ENVELOPES, parse

if TYPE_CHECKING:
    from collections.abc import Callable

STATE_CHANGED = {
    "notificationType": "Message",
    "projectKey": "shop",
    "id": "m-1",
    "version": 1,
    "sequenceNumber": 2,
    "resource": {"typeId": "order", "id": "o-1"},
    "resourceVersion": 2,
    "type": "OrderStateChanged",
    "orderState": "Complete",
    "createdAt": "2026-11-23T10:00:00.123Z",
}
TEXT = json.dumps(STATE_CHANGED)


def cloudevent(payload: object) -> dict[str, object]:
    kind = "com.commercetools.order.message.OrderStateChanged"
    return {"specversion": "1.0", "id": "m-1", "type": kind, "source": "/shop/orders", "data": payload}


def eventbridge(payload: object) -> dict[str, object]:
    return {"version": "0", "detail-type": "OrderStateChanged", "source": "aws.partner/x", "detail": payload}


def sns(text: str) -> dict[str, object]:
    return {"Type": "Notification", "MessageId": "1", "TopicArn": "arn", "Message": text}


def sqs(text: str) -> dict[str, object]:
    return {"MessageId": "1", "ReceiptHandle": "r", "Body": text, "Attributes": {}}


def push(text: str) -> dict[str, object]:
    return {"message": {"data": base64.b64encode(text.encode()).decode(), "messageId": "1"}, "subscription": "s"}


ENVELOPES = {
    "bare": STATE_CHANGED,
    "cloudevent": cloudevent(STATE_CHANGED),
    "cloudevent_with_string": cloudevent(TEXT),
    "pubsub_push": push(TEXT),
    "pubsub_push_of_cloudevent": push(json.dumps(cloudevent(STATE_CHANGED))),
    "sqs": sqs(TEXT),
    "sns": sns(TEXT),
    "sns_in_sqs": sqs(json.dumps(sns(TEXT))),
    "eventbridge": eventbridge(STATE_CHANGED),
    "eventbridge_in_sqs": sqs(json.dumps(eventbridge(STATE_CHANGED))),
}


@pytest.mark.parametrize("name", ENVELOPES)
def test_notification_is_the_same_in_every_envelope(name: str) -> None:
    """The envelope does not affect the notification."""
    notification = parse(json.dumps(ENVELOPES[name]).encode())
    assert (notification.type, notification.resource_type, notification.resource_id) == (
        "OrderStateChanged",
        "order",
        "o-1",
    )
    assert notification.time == "2026-11-23T10:00:00.123Z"
    assert notification.payload == STATE_CHANGED


def test_byte_order_mark_is_skipped() -> None:
    """Some publishers write a byte order mark before the JSON."""
    assert parse(b"\xef\xbb\xbf" + TEXT.encode()).resource_id == "o-1"


def test_type_of_a_change_is_its_notification_type() -> None:
    """ResourceUpdated has no `type`; its time is `modifiedAt`."""
    change = {
        "notificationType": "ResourceUpdated",
        "resource": {"typeId": "customer", "id": "c"},
        "modifiedAt": "2026-01-01T00:00:00Z",
    }
    notification = parse(json.dumps(change).encode())
    assert (notification.type, notification.time) == ("ResourceUpdated", "2026-01-01T00:00:00Z")


def test_type_is_read_from_payload_not_included() -> None:
    """If the payload is too large for the queue, commercetools puts its type into payloadNotIncluded."""
    message = {k: v for k, v in STATE_CHANGED.items() if k != "type"}
    message["payloadNotIncluded"] = {"reason": "too big", "payloadType": "OrderCreated"}
    assert parse(json.dumps(message).encode()).type == "OrderCreated"


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b"", "the body is empty"),
        (b"  \n", "the body is empty"),
        (b"{", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[]", "found an array"),
        (b"12", "found a number"),
        (b"null", "found null"),
        (b"true", "found a boolean"),
        (b'"' + b"x" * 1_000_000 + b'"', "found a string"),
        (b'{"a":' * 2_000, "not JSON"),
        (b"{}", "`notificationType`"),
        (b'{"notificationType": 7}', "`notificationType`"),
        (b'{"notificationType": "Message", "type": "X"}', "`resource`"),
        (b'{"notificationType": "Message", "type": "X", "resource": {"typeId": "order"}}', "`resource.id`"),
        (b'{"notificationType": "Message", "type": "X", "resource": {"id": "o"}}', "`resource.typeId`"),
        (b'{"notificationType": "Message", "resource": {"typeId": "order", "id": "o"}}', "`type`"),
        (b'{"specversion": "1.0", "data": [1]}', "an array"),
        (b'{"specversion": "1.0"}', "empty"),
        (b'{"message": {"data": "%%"}, "subscription": "s"}', "base64"),
        (b'{"message": {"data": 5}, "subscription": "s"}', "base64"),
    ],
)
def test_unreadable_body_is_rejected_with_what_was_expected(body: bytes, expected: str) -> None:
    """The reason of the dead letter names what was expected."""
    with pytest.raises(Rejected, match="expected") as error:
        parse(body)
    assert expected in str(error.value)


@pytest.mark.parametrize("identifier", ["", "x" * 257, "a\nb", 5, None])
def test_invalid_resource_id_is_rejected(identifier: object) -> None:
    """Hostile ids never reach a query or a log."""
    message = STATE_CHANGED | {"resource": {"typeId": "order", "id": identifier}}
    with pytest.raises(Rejected, match=r"resource\.id"):
        parse(json.dumps(message).encode())


@pytest.mark.parametrize("kind", ["Event", "SomethingNew"])
def test_notification_without_a_resource_is_ignored(kind: str) -> None:
    """Event notifications and unknown notification types are acked, not dead-lettered."""
    with pytest.raises(Ignored):
        parse(json.dumps({"notificationType": kind, "id": "1"}).encode())


def test_too_many_nested_envelopes_are_rejected() -> None:
    """A body that consists only of envelopes cannot keep the worker busy."""
    text = TEXT
    for _ in range(MAX_ENVELOPES + 1):
        text = json.dumps(sqs(text))
    with pytest.raises(Rejected, match="nested envelopes"):
        parse(text.encode())


def test_equal_mistakes_have_equal_reasons() -> None:
    """With positions, twenty broken messages would be twenty kinds of failures and hide all others."""
    reasons = set()
    for number in range(3):
        with pytest.raises(Rejected) as error:
            parse(b'{"notificationType":' + b" " * number + b"tru")
        reasons.add(str(error.value))
    assert len(reasons) == 1


def test_rejection_does_not_quote_the_body() -> None:
    """Reasons appear in logs and dead letters, so they must not contain personal data."""
    with pytest.raises(Rejected) as error:
        parse(b'{"email": "ada@example.com" ada@example.com}')
    assert "ada" not in str(error.value)


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)
KEYS = ["notificationType", "resource", "type", "specversion", "data", "message", "detail", "detail-type", "Message"]
KEYS += ["Type", "Body", "ReceiptHandle", "subscription", "payloadNotIncluded", "createdAt", "modifiedAt"]
near_notifications = st.dictionaries(
    st.sampled_from(KEYS),
    json_values
    | st.sampled_from(["Message", "Event", "ResourceCreated", "Notification", {"typeId": "order", "id": "1"}]),
)


@given(st.binary() | json_values.map(lambda value: json.dumps(value).encode()))
def test_any_bytes_are_parsed_rejected_or_ignored(body: bytes) -> None:
    """No input raises another error."""
    try:
        parse(body)
    except (Rejected, Ignored) as outcome:
        assert str(outcome)


@given(near_notifications)
def test_any_notification_like_object_is_parsed_rejected_or_ignored(document: dict[str, object]) -> None:
    """Unexpected values in the fields that parse reads raise no other error."""
    try:
        notification = parse(json.dumps(document).encode())
    except (Rejected, Ignored) as outcome:
        assert str(outcome)
    else:
        assert notification.type
        assert notification.resource_id


XML_HEAD = b"@\x06string\x083http://schemas.microsoft.com/2003/10/Serialization/"
BYTES_HEAD = XML_HEAD.replace(b"\x06string", b"\x0cbase64Binary")


def dotnet(kind: int, text: bytes, length: int) -> bytes:
    return bytes([kind]) + len(text).to_bytes(length, "little") + text


@pytest.mark.parametrize(
    "wrap",
    [
        lambda text: XML_HEAD + dotnet(0x9B, text, 2),
        lambda text: XML_HEAD + dotnet(0x9C, text, 4) + b"\x01",
        lambda text: XML_HEAD + dotnet(0x98, text[:200], 1) + dotnet(0x9B, text[200:], 2),
        lambda text: BYTES_HEAD + dotnet(0xA1, text, 2),
        lambda text: b"\xef\xbb\xbf" + XML_HEAD + dotnet(0x9D, text, 4),
    ],
)
def test_body_that_dotnet_serialized_is_opened(wrap: Callable[[bytes], bytes]) -> None:
    """Older clients of Service Bus wrap text and bytes in binary XML, in one or several parts."""
    message = STATE_CHANGED | {"padding": "é" * 200}
    text = json.dumps(message, ensure_ascii=False).encode()
    assert parse(wrap(text)).payload == message
    assert parse(wrap(json.dumps(cloudevent(message)).encode())).payload == message


@pytest.mark.parametrize("rest", [b"", b"\x99", b"\x99\x05{}", b"\x50\x02{}", b"\x98\x02{}", b"\x9d\xff\xff\xff\xff{}"])
def test_malformed_binary_xml_is_rejected(rest: bytes) -> None:
    """The message is dead-lettered with the reason."""
    with pytest.raises(Rejected, match="malformed binary XML"):
        parse(XML_HEAD + rest)
