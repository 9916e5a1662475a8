"""The message in a push request."""

from __future__ import annotations

import base64
import uuid
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any

import orjson

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

MAX_ID = 256  # characters; Pub/Sub's ids are shorter, and logs contain them


@dataclass(frozen=True, slots=True, eq=False)
class PushDelivery:
    """A message whose request is open. `attempt` is None if the subscription has no dead-letter policy."""

    id: str
    body: bytes = field(repr=False)
    attributes: Mapping[str, str]
    attempt: int | None
    published_at: datetime | None
    respond: Callable[[int], None] = field(repr=False)


def parse_request(body: bytes, respond: Callable[[int], None]) -> PushDelivery:
    """Parse Pub/Sub's envelope. Without an envelope, the body is the message: payload unwrapping is enabled."""
    try:
        envelope = orjson.loads(body)
        message = envelope["message"]
        name = _text(message["messageId"])[:MAX_ID]
        data = base64.b64decode(message.get("data", ""), validate=True)
        attributes = {key: _text(value) for key, value in (message.get("attributes") or {}).items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        return PushDelivery(uuid.uuid4().hex, body, {}, None, None, respond)
    attempt = envelope.get("deliveryAttempt")
    return PushDelivery(
        name,
        data,
        attributes,
        attempt if isinstance(attempt, int) else None,
        _parse_time(message.get("publishTime")),
        respond,
    )


def _text(value: Any) -> str:
    """Return a string. Raises TypeError for anything else, which no envelope of Pub/Sub contains."""
    if not isinstance(value, str):
        raise TypeError
    return value


def _parse_time(text: Any) -> datetime | None:
    try:
        moment = datetime.fromisoformat(text)
    except (ValueError, TypeError):
        return None
    return moment if moment.tzinfo else None
