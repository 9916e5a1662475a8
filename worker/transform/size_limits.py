"""The truncation of properties to Klaviyo's limits: https://developers.klaviyo.com/en/reference/create_event."""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING, Any, TypeAlias

import orjson

from worker.budget import MAX_PATH_LENGTH, MAX_PATHS, MORE
from worker.json_access import is_shallow

if TYPE_CHECKING:
    from worker.model import Json

# The keys of a value as nested pairs, the innermost key last; () is the root. A pair costs the same at every depth.
_Path: TypeAlias = "tuple[()] | tuple[_Path, str]"

MAX_PROPERTIES = 400
MAX_ARRAY = 4_000
MAX_DEPTH = 10
MAX_TEXT_BYTES = 100_000
EVENT_BYTES = 4_500_000  # Klaviyo's limit for an event is 5 MB, including its profile
PROFILE_BYTES = 80_000  # of the properties; Klaviyo's limit for a profile is 100 KB, including its other attributes
ATTRIBUTE_BYTES = 15_000  # of these other attributes


def own_first(own: Json, others: Json) -> Json:
    """Return both, `own` first and instead of others of the same name: what stands last is removed first."""
    return own | others | own


def truncate(properties: Json, max_bytes: int = EVENT_BYTES) -> tuple[Json, list[str]]:
    """Return properties that respect all limits, and the paths of the properties that were truncated or removed.

    At most MAX_PATHS paths are named, followed by MORE if there are more.
    """
    if _is_small(properties, max_bytes):
        return properties, []
    truncated: list[_Path] = []
    fitted = _clamp(properties, MAX_DEPTH, (), truncated)
    if len(fitted) > MAX_PROPERTIES:
        truncated.append(((), "*"))
        fitted = dict(islice(fitted.items(), MAX_PROPERTIES))
    return _shrink(fitted, max_bytes, truncated), _names(truncated)


def _is_small(properties: Json, max_bytes: int) -> bool:
    """Return True if the properties certainly respect all limits. This check is fast."""
    if len(properties) > MAX_PROPERTIES:
        return False
    try:
        encoded = orjson.dumps(properties)
    except orjson.JSONEncodeError:  # more than 254 deep
        return False
    if len(encoded) > min(2 * MAX_ARRAY, max_bytes):  # an entry of an array takes at least 2 bytes
        return False
    return encoded.count(b"{") + encoded.count(b"[") <= MAX_DEPTH or is_shallow(properties, MAX_DEPTH)


def _names(paths: list[_Path]) -> list[str]:
    """Return the first MAX_PATHS paths as texts, and MORE after them if there are more."""
    distinct = dict.fromkeys(paths)
    names = dict.fromkeys(_name(path) for path in islice(distinct, MAX_PATHS))
    return [*names, *[MORE] * (len(distinct) > MAX_PATHS)]


def _name(path: _Path) -> str:
    """Return a path as text, like `Items[].name`, in at most MAX_PATH_LENGTH characters."""
    keys: list[str] = []
    while path:
        path, key = path
        keys.append(key[:MAX_PATH_LENGTH] if key == "[]" else f".{key[:MAX_PATH_LENGTH]}")
    return "".join(reversed(keys)).removeprefix(".")[:MAX_PATH_LENGTH]


def _clamp(value: Any, depth: int, path: _Path, truncated: list[_Path]) -> Any:
    if isinstance(value, str):
        return _clamp_text(value, path, truncated)
    if not isinstance(value, dict | list):
        return value
    if depth == 0:
        truncated.append(path)
        return None
    if isinstance(value, dict):
        return {key: _clamp(entry, depth - 1, (path, key), truncated) for key, entry in value.items()}
    if len(value) > MAX_ARRAY:
        truncated.append(path)
    return [_clamp(entry, depth - 1, (path, "[]"), truncated) for entry in value[:MAX_ARRAY]]


def _clamp_text(text: str, path: _Path, truncated: list[_Path]) -> str:
    if len(text) * 4 <= MAX_TEXT_BYTES or len(raw := text.encode()) <= MAX_TEXT_BYTES:
        return text
    truncated.append(path)
    return raw[:MAX_TEXT_BYTES].decode(errors="ignore")


def _shrink(properties: Json, max_bytes: int, truncated: list[_Path]) -> Json:
    """Shrink the largest property until all properties fit: halve it if it is an array, otherwise remove it."""
    sizes = {name: len(orjson.dumps(value)) for name, value in properties.items()}
    while sum(sizes.values()) > max_bytes:
        largest = max(sizes, key=lambda name: sizes[name])
        truncated.append(((), largest))
        value = properties[largest]
        if isinstance(value, list) and len(value) > 1:
            value = value[: len(value) // 2]
            properties = properties | {largest: value}
            sizes[largest] = len(orjson.dumps(value))
        else:
            properties = {name: entry for name, entry in properties.items() if name != largest}
            del sizes[largest]
    return properties
