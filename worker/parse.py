"""The parse stage: opens all envelopes of a message and returns the notification. It is pure.

It reads both delivery formats of commercetools: Platform and CloudEvents.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections import deque
from typing import TYPE_CHECKING, Any

import orjson

from worker import data_contract
from worker.budget import check_bytes, check_values
from worker.errors import Excluded, Ignored, Rejected
from worker.json_access import MAX_ID_LENGTH, as_id, loads
from worker.model import Json, Notification

if TYPE_CHECKING:
    from collections.abc import Iterator

MAX_ENVELOPES = 6  # a message with this number of nested envelopes is rejected
_CHANGES = frozenset({"ResourceCreated", "ResourceUpdated", "ResourceDeleted"})
_PROJECT_KEY = re.compile(r"[A-Za-z0-9_-]{1,64}")  # any other text could be anything, so it is not logged


def parse(body: bytes) -> Notification:
    """Return the notification in `body`.

    Raises Rejected if it is unreadable or beyond the budget of a message, Ignored if it concerns no resource.
    """
    check_bytes(body)
    ((_, document),) = deque(layers(body), maxlen=1)  # the outer documents need not stay in memory
    return _notification(document)


def check_project(notification: Notification, project: str) -> None:
    """Check that the notification is from the commercetools project with this key.

    Raises Excluded if it is from another project: staging and production can share a queue. Raises Rejected if it names
    no project, which every notification of commercetools does.
    """
    key = notification.payload.get("projectKey")
    if key == project:
        return
    if not isinstance(key, str) or not key:
        raise Rejected("expected `projectKey`, a string: without it, nothing shows from which project the message is")
    other = f"the commercetools project {key}" if _PROJECT_KEY.fullmatch(key) else "another commercetools project"
    raise Excluded(f"from {other}, but CT_PROJECT_ID is {project}", "project")


def layers(body: bytes) -> Iterator[tuple[str, Json]]:
    """Yield the name and content of every envelope from the outside in, then "" and the innermost document.

    Envelopes can be nested (EventBridge inside SQS). Raises Rejected if an envelope cannot be opened.
    """
    content: Any = body
    for _ in range(MAX_ENVELOPES):
        document = content if isinstance(content, dict) else _document(content)
        envelope, content = _open_envelope(document)
        yield envelope, document
        if not envelope:
            return
    raise Rejected(f"expected a commercetools notification; found at least {MAX_ENVELOPES} nested envelopes")


def _document(text: Any) -> Json:
    if not isinstance(text, str | bytes):
        raise Rejected(f"expected a JSON object in the envelope; found {_json_type(text)}")
    raw = (
        text.encode("utf-8", "surrogatepass") if isinstance(text, str) else _unwrap(text.removeprefix(b"\xef\xbb\xbf"))
    )
    if not raw.strip():
        raise Rejected("expected a JSON object; the body is empty")
    check_values(raw)
    try:
        document = loads(raw)
    except orjson.JSONDecodeError as error:
        # `error.doc` quotes the body, `error.msg` does not. Without a position, equal mistakes have equal reasons.
        raise Rejected(f"expected a JSON object; the body is not JSON ({error.msg})") from None
    if not isinstance(document, dict):
        raise Rejected(f"expected a JSON object; found {_json_type(document)}")
    return document


def _unwrap(body: bytes) -> bytes:
    try:
        return data_contract.unwrap(body)
    except ValueError:
        raise Rejected("expected a JSON object; the body is malformed binary XML of .NET") from None


def _open_envelope(document: Json) -> tuple[str, Any]:
    """Return the name and the content of an envelope; "" and None if `document` is not an envelope."""
    if "notificationType" in document:
        return "", None
    if "specversion" in document:  # structured mode, which Event Grid also uses
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
        raise Rejected("expected a commercetools notification with `notificationType`, a string")
    if kind == "Event":
        raise Ignored("an Event notification has no resource")
    if kind != "Message" and kind not in _CHANGES:
        raise Ignored("unknown notificationType")
    resource = payload.get("resource")
    if not isinstance(resource, dict):
        raise Rejected("expected `resource`, an object with typeId and id")
    time = payload.get("createdAt") if kind == "Message" else payload.get("modifiedAt")
    return Notification(
        type=_message_type(payload) if kind == "Message" else kind,
        resource_type=_identifier(resource.get("typeId"), "resource.typeId"),
        resource_id=_identifier(resource.get("id"), "resource.id"),
        time=as_id(time) or None,
        payload=payload,
    )


def _message_type(payload: Json) -> str:
    """Return the message type. commercetools moves it to `payloadNotIncluded` if the payload is too large."""
    not_included = payload.get("payloadNotIncluded")
    kind = payload.get("type") or (not_included.get("payloadType") if isinstance(not_included, dict) else None)
    return _identifier(kind, "type", "payloadNotIncluded.payloadType")


def _identifier(value: Any, *fields: str) -> str:
    """Return a value that logs and queries can contain. `fields` are the fields of the notification that it is from."""
    if not isinstance(value, str) or not value or len(value) > MAX_ID_LENGTH or not value.isprintable():
        names = " or ".join(f"`{field}`" for field in fields)
        raise Rejected(f"expected {names}, a string of 1 to {MAX_ID_LENGTH} printable characters")
    return value


def _json_type(value: Any) -> str:
    names = {list: "an array", str: "a string", bool: "a boolean", type(None): "null", dict: "an object"}
    return names.get(type(value), "a number")
