"""Requests to an entity: renew locks, settle by lock token, read without a lock."""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING, Any

from proton import UNDESCRIBED, Array, Data

from tests.support.servicebus_broker.encoding import milliseconds

if TYPE_CHECKING:
    from tests.support.servicebus_broker.entities import Entity

MAX_READ = 250  # messages in a response
LOST = "com.microsoft:message-lock-lost"


def handle_request(entity: Entity, operation: str, body: dict[str, Any]) -> tuple[int, Any, str]:
    """Carry out a request; return the status, the body of the response, and the condition of the error."""
    if entity.refusal:
        return 500, None, entity.refusal
    if entity.busy:
        entity.busy -= 1
        return 503, None, "com.microsoft:server-busy"
    tokens = [uuid.UUID(str(token)) for token in body.get("lock-tokens", [])]
    if operation == "renew-lock":
        expirations = entity.renew(tokens)
        if expirations is None:
            return 410, None, LOST
        until = [milliseconds(seconds + entity.ahead) for seconds in expirations]
        return 200, {"expirations": Array(UNDESCRIBED, Data.TIMESTAMP, *until)}, ""
    if operation == "update-disposition":
        settled = [_settle(entity, token, body) for token in tokens]
        return (200, {}, "") if all(settled) else (410, None, LOST)
    if operation == "peek-message":
        found = entity.read(body["from-sequence-number"], min(body["message-count"], MAX_READ))
        return (
            (200, {"messages": [{"message": each.encode(entity.ahead)} for each in found]}, "")
            if found
            else (204, None, "")
        )
    return 501, None, "amqp:not-implemented"


def _settle(entity: Entity, token: uuid.UUID, body: dict[str, Any]) -> bool:
    match body["disposition-status"]:
        case "completed":
            return entity.complete(token)
        case "abandoned":
            return entity.abandon(token)
        case "suspended":
            return entity.dead_letter(token, body["deadletter-reason"], body["deadletter-description"])
    return False
