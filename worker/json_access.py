"""Accessors for JSON of any shape. They return an empty value for unexpected data, and never raise an error."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import orjson

if TYPE_CHECKING:
    from collections.abc import Iterable

    from worker.model import Json

MAX_ID_LENGTH = 256  # commercetools' limit for keys and SKUs, and above that for ids
_SURROGATE = re.compile("[\ud800-\udfff]")
_CAN_BE_SURROGATE = re.compile(rb"\\u[dD]|\xed")  # an escape, or the first of three bytes


def loads(text: bytes) -> Any:
    """Return decoded JSON. Raises orjson.JSONDecodeError.

    Half a surrogate pair becomes U+FFFD. orjson rejects it, although commercetools and shops' browsers can send it, and
    one such text in one record would make a whole response or message unreadable.
    """
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        if not _CAN_BE_SURROGATE.search(text):
            raise
        try:
            decoded = json.dumps(json.loads(text), ensure_ascii=False)
        except (ValueError, RecursionError):
            decoded = ""
        if not _SURROGATE.search(decoded):  # it was rejected for another reason
            raise
        return orjson.loads(_SURROGATE.sub("\N{REPLACEMENT CHARACTER}", decoded))


def as_dict(value: Any) -> Json:
    """Return `value` if it is an object, else an empty object."""
    return value if isinstance(value, dict) else {}


def as_dicts(value: Any) -> list[Json]:
    """Return the objects in `value` if it is an array, else an empty list."""
    return [entry for entry in value if isinstance(entry, dict)] if isinstance(value, list) else []


def as_text(value: Any) -> str:
    """Return `value` without surrounding white space if it is a string, else ""."""
    return value.strip() if isinstance(value, str) else ""


def as_key(value: Any) -> str:
    """Return `value` as it is if it is a string, else "": white space is part of a sku."""
    return value if isinstance(value, str) else ""


def as_id(value: Any) -> str:
    """Return `value` as as_text does if it has at most MAX_ID_LENGTH characters, else ""."""
    text = as_text(value)
    return text if len(text) <= MAX_ID_LENGTH else ""


def as_int(value: Any) -> int | None:
    """Return `value` if it is an integer and not a boolean, else None."""
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def unique(values: Iterable[str]) -> list[str]:
    """Return the non-empty strings in order, without duplicates."""
    return list(dict.fromkeys(filter(None, values)))


def pick_ids(references: Any) -> list[str]:
    """Return the ids of commercetools references, without duplicates."""
    return unique(as_text(reference.get("id")) for reference in as_dicts(references))


def parse_time(value: Any) -> datetime | None:
    """Return an RFC 3339 time as a datetime, or None if `value` is not a time. The default time zone is UTC."""
    try:
        moment = datetime.fromisoformat(as_text(value))
    except ValueError:
        return None
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def printable(text: str, keep: str = "") -> str:
    """Return `text` with JSON escapes in place of characters that could control a terminal.

    JSON keeps its meaning. `keep` lists characters that are not escaped.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else json.dumps(c)[1:-1] for c in text)


def shorten(text: str, max_length: int) -> str:
    """Return a text in at most `max_length` characters. An ellipsis replaces the rest."""
    return text if len(text) <= max_length else f"{text[: max_length - 1]}…"


def is_shallow(value: Json | list[Any], depth: int) -> bool:
    """Return whether objects and arrays are nested at most `depth` deep."""
    if depth == 0:
        return False
    for child in value.values() if isinstance(value, dict) else value:
        if isinstance(child, (dict, list)) and not is_shallow(child, depth - 1):
            return False
    return True
