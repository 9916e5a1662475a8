"""Reads what `dead_letter` wrote with a message that it buried itself: the reason, and where the message came from."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from adapters.base import Failure

if TYPE_CHECKING:
    from collections.abc import Mapping

_FAILURE = {field.name for field in fields(Failure)}
_ALWAYS = {"reason", "message_id", "attempt"}
_OURS = _FAILURE | _ALWAYS | {"subscription", "queue"}


@dataclass(frozen=True, slots=True)
class Burial:
    """Why a message was given up on, after how many deliveries, and the attributes that are its own."""

    failure: Failure
    attempt: int | None
    attributes: Mapping[str, str]


def direct(attributes: Mapping[str, str]) -> Burial | None:
    """Read the attributes of a letter; None when it was not us who buried it."""
    if not attributes.keys() >= _ALWAYS:
        return None
    told = {"stage": "", "error": "", **{name: attributes[name] for name in _FAILURE & attributes.keys()}}
    own = {name: value for name, value in attributes.items() if name not in _OURS}
    return Burial(Failure(**told), count(attributes["attempt"]), own)


def by_policy(attempt: int | None, attributes: Mapping[str, str]) -> Burial:
    """Return what is known of a letter that the queue itself gave up on."""
    after = f" after {attempt} deliveries" if attempt else ""
    return Burial(Failure(f"gave up{after}: the worker's log has the reason", "queue", ""), attempt, attributes)


def count(text: str) -> int | None:
    """Read a number of deliveries; None for what is none."""
    return int(text) if re.fullmatch("[0-9]{1,9}", text) else None
