"""Reads the attributes of dead letters, to which an adapter's `dead_letter` adds the failure and the origin."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from adapters.base import Failure

if TYPE_CHECKING:
    from collections.abc import Mapping

_FAILURE = {field.name for field in fields(Failure)}
_REQUIRED = {"reason", "message_id", "attempt"}
_ADDED = _FAILURE | _REQUIRED | {"subscription", "queue"}


@dataclass(frozen=True, slots=True)
class DeadLetterInfo:
    """Why a message was dead-lettered, after how many deliveries, and the attributes of the message itself."""

    failure: Failure
    attempt: int | None
    attributes: Mapping[str, str]


def from_worker(attributes: Mapping[str, str]) -> DeadLetterInfo | None:
    """Read the attributes of a message that a worker dead-lettered. Return None if no worker did."""
    if not attributes.keys() >= _REQUIRED:
        return None
    failure = {"stage": "", "error": "", **{name: attributes[name] for name in _FAILURE & attributes.keys()}}
    original = {name: value for name, value in attributes.items() if name not in _ADDED}
    return DeadLetterInfo(Failure(**failure), parse_attempt(attributes["attempt"]), original)


def from_policy(attempt: int | None, attributes: Mapping[str, str]) -> DeadLetterInfo:
    """Describe a message that the queue's policy dead-lettered."""
    after = f" after {attempt} deliveries" if attempt else ""
    reason = f"dead-lettered by the queue{after}: the worker's log has the reason"
    return DeadLetterInfo(Failure(reason, "queue", ""), attempt, attributes)


def parse_attempt(text: str) -> int | None:
    """Return a number of deliveries; None if `text` is not one."""
    return int(text) if re.fullmatch("[0-9]{1,9}", text) else None
