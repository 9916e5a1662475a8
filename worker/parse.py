"""bytes -> Notification. Pure; knows every envelope and both delivery formats of commercetools."""

from __future__ import annotations

import base64
import binascii
from typing import TYPE_CHECKING, Any

import orjson

from worker.errors import Ignored, Rejected
from worker.model import Json, Notification

if TYPE_CHECKING:
    from collections.abc import Iterator

MAX_WRAPPERS = 6
MAX_ID_LENGTH = 256  # commercetools' own limit for ids and keys
_CHANGES = frozenset({"ResourceCreated", "ResourceUpdated", "ResourceDeleted"})


def parse(body: bytes) -> Notification:
    """Return the notification in `body`. Raises Rejected (unreadable) or Ignored (not about a resource)."""
    *_, (_, document) = layers(body)
    return _notification(document)


def layers(body: bytes) -> Iterator[tuple[str, Json]]:
    """Yield every envelope with its name, and last, with "", what is in the innermost: the notification, hopefully.

    They nest (EventBridge inside SQS). Raises Rejected where one cannot be opened.
    """
    content: Any = body
    for _ in range(MAX_WRAPPERS):
        document = content if isinstance(content, dict) else _document(content)
        envelope, content = _opened(document)
        yield envelope, document
        if not envelope:
            return
    raise Rejected(f"expected a commercetools notification; found more than {MAX_WRAPPERS} nested envelopes")


def _document(text: Any) -> Json:
    if not isinstance(text, str | bytes):
        raise Rejected(f"expected a JSON object in the envelope; found {_json_type(text)}")
    raw = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text.removeprefix(b"\xef\xbb\xbf")
    if not raw.strip():
        raise Rejected("expected a JSON object; the body is empty")
    try:
        document = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        # The decoder's message never quotes the body; error.doc would.
        raise Rejected(f"expected a JSON object; the body is not JSON ({error.msg} at {error.pos})") from None
    if not isinstance(document, dict):
        raise Rejected(f"expected a JSON object; found {_json_type(document)}")
    return document


def _opened(document: Json) -> tuple[str, Any]:
    """Return an envelope's name and what it holds; "" when `document` is none."""
    if "notificationType" in document:
        return "", None
    if "specversion" in document:  # structured mode; also Event Grid
        return "CloudEvents", document.get("data", "")
    if document.get("Type") == "Notification" and "Message" in document:
        return "SNS", document["Message"]
    if "detail-type" in document:
        return "EventBridge", document.get("detail", "")
    if "ReceiptHandle" in document:
        return "SQS", document.get("Body", "")
    message = document.get("message")
    if isinstance(message, dict) and "data" in message:
        return "Pub/Sub push", _base64(message["data"])
    return "", None


def _base64(data: Any) -> bytes:
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, TypeError, ValueError):
        raise Rejected("expected base64 in message.data of the Pub/Sub push envelope") from None


def _notification(payload: Json) -> Notification:
    kind = payload.get("notificationType")
    if not isinstance(kind, str):
        raise Rejected("expected a commercetools notification with `notificationType`, a text")
    if kind == "Event":
        raise Ignored("an Event notification names no resource")
    if kind != "Message" and kind not in _CHANGES:
        raise Ignored("unknown notificationType")
    resource = payload.get("resource")
    if not isinstance(resource, dict):
        raise Rejected("expected `resource`, an object with typeId and id")
    time = payload.get("createdAt") if kind == "Message" else payload.get("modifiedAt")
    return Notification(
        type=_message_type(payload) if kind == "Message" else kind,
        resource_type=_identifier(resource, "typeId"),
        resource_id=_identifier(resource, "id"),
        time=time if isinstance(time, str) else None,
        payload=payload,
    )


def _message_type(payload: Json) -> str:
    """Return the message's type; a payload that did not fit the queue carries it elsewhere."""
    absent = payload.get("payloadNotIncluded")
    kind = payload.get("type") or (absent.get("payloadType") if isinstance(absent, dict) else None)
    if not isinstance(kind, str) or not kind:
        raise Rejected("expected `type` or `payloadNotIncluded.payloadType`, a text, in a Message")
    return kind


def _identifier(resource: Json, name: str) -> str:
    value = resource.get(name)
    if not isinstance(value, str) or not value or len(value) > MAX_ID_LENGTH or not value.isprintable():
        raise Rejected(f"expected `resource.{name}`, a text of 1 to {MAX_ID_LENGTH} printable characters")
    return value


def _json_type(value: Any) -> str:
    names = {list: "an array", str: "a text", bool: "a boolean", type(None): "null", dict: "an object"}
    return names.get(type(value), "a number")
