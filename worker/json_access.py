"""Read JSON that may have any shape: odd data gives something empty, never an error."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable

    from worker.model import Json


def as_dict(value: Any) -> Json:
    """Return `value` when it is an object, else an empty one."""
    return value if isinstance(value, dict) else {}


def as_dicts(value: Any) -> list[Json]:
    """Return the objects in `value` when it is an array, else none."""
    return [entry for entry in value if isinstance(entry, dict)] if isinstance(value, list) else []


def as_text(value: Any) -> str:
    """Return `value` without outer white space when it is a text, else ""."""
    return value.strip() if isinstance(value, str) else ""


def as_int(value: Any) -> int | None:
    """Return `value` when it is a whole number (a bool is none), else None."""
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def unique(values: Iterable[str]) -> list[str]:
    """Return the texts that are not empty, once each, in order."""
    return list(dict.fromkeys(value for value in values if value))


def pick_ids(references: Any) -> list[str]:
    """Return the ids of commercetools references, once each."""
    return unique(as_text(reference.get("id")) for reference in as_dicts(references))


def parse_time(value: Any) -> datetime | None:
    """Return an RFC 3339 time, or None."""
    try:
        moment = datetime.fromisoformat(as_text(value))
    except ValueError:
        return None
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def printable(text: str, keep: str = "") -> str:
    """Return `text` with JSON escapes for what a terminal could take for a command; JSON stays the same JSON."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else json.dumps(c)[1:-1] for c in text)
