"""Converts Service Bus messages to deliveries."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from azure.servicebus.amqp import AmqpMessageBodyType

if TYPE_CHECKING:
    from collections.abc import Mapping
    from datetime import datetime

    from azure.servicebus import ServiceBusReceivedMessage


@dataclass(frozen=True, slots=True)
class ServiceBusDelivery:
    """A locked message. `id` is the publisher's message id, or else the sequence number."""

    id: str
    body: bytes = field(repr=False)
    attributes: Mapping[str, str]
    attempt: int | None
    published_at: datetime | None
    message: ServiceBusReceivedMessage = field(repr=False)

    @property
    def sequence_number(self) -> str:
        """The number that the queue gave the message. Redeliveries have the same number."""
        return str(self.message.sequence_number)


def delivery_of(message: ServiceBusReceivedMessage) -> ServiceBusDelivery:
    """Return a received message as a delivery."""
    return ServiceBusDelivery(
        id=_text(message.message_id or message.sequence_number),
        body=_body_of(message),
        attributes=_attributes_of(message),
        attempt=(message.delivery_count or 0) + 1,
        published_at=message.enqueued_time_utc,
        message=message,
    )


def _body_of(message: ServiceBusReceivedMessage) -> bytes:
    try:
        return body_of(message.body_type, message.body)
    except (AttributeError, TypeError, ValueError):  # the SDK decodes it now, and cannot
        return b""


def _attributes_of(message: ServiceBusReceivedMessage) -> dict[str, str]:
    """Return the application properties. They concern only their message, so none of them can be an error."""
    try:
        properties: Mapping[Any, Any] = message.application_properties or {}
        return {_text(name): _text(value) for name, value in properties.items()}
    except (AttributeError, TypeError, ValueError):
        return {}


def body_of(kind: AmqpMessageBodyType, body: Any) -> bytes:
    """Return the body as bytes: data sections joined, text and bytes unchanged, other values as JSON.

    A body that cannot be converted is empty: the message is then dead-lettered, and the others are still received.
    """
    try:
        return _bytes(kind, body)
    except (RecursionError, TypeError, ValueError):
        return b""


def _bytes(kind: AmqpMessageBodyType, body: Any) -> bytes:
    if kind is AmqpMessageBodyType.DATA:
        return b"".join(memoryview(section) for section in body)
    if kind is AmqpMessageBodyType.SEQUENCE:
        body = [item for section in body for item in section]
    if isinstance(body, bytes | bytearray | memoryview):  # the SDK reads text as bytes
        return bytes(body)
    if isinstance(body, str):
        return body.encode(errors="surrogatepass")
    return b"" if body is None else json.dumps(_plain(body)).encode()


def _plain(value: Any) -> Any:
    """Return an AMQP value with the types of JSON."""
    if isinstance(value, dict):
        return {_text(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, bool | int | float) else _text(value)


def _text(value: Any) -> str:
    """Return a value as text, and a list or a map, which no publisher of notifications uses, as an empty text."""
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value).decode(errors="replace")
    return "" if isinstance(value, dict | list | tuple | set) else str(value)
