"""The truncation of properties to Klaviyo's limits: https://developers.klaviyo.com/en/reference/create_event."""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING, Any

import orjson

from worker.json_access import is_shallow

if TYPE_CHECKING:
    from worker.model import Json

MAX_PROPERTIES = 400
MAX_ARRAY = 4_000
MAX_DEPTH = 10
MAX_TEXT_BYTES = 100_000
EVENT_BYTES = 4_500_000  # Klaviyo's limit for an event is 5 MB, including its profile
PROFILE_BYTES = 80_000  # Klaviyo's limit for a profile is 100 KB, including its other attributes


def truncate(properties: Json, max_bytes: int = EVENT_BYTES) -> tuple[Json, list[str]]:
    """Return properties that respect all limits, and the paths of the properties that were truncated or removed."""
    if _is_small(properties):
        return properties, []
    truncated: list[str] = []
    fitted = _clamp(properties, MAX_DEPTH, "", truncated)
    if len(fitted) > MAX_PROPERTIES:
        truncated.append("*")
        fitted = dict(islice(fitted.items(), MAX_PROPERTIES))
    return _shrink(fitted, max_bytes, truncated), truncated


def _is_small(properties: Json) -> bool:
    """Return True if the properties certainly respect all limits. This check is fast."""
    # An entry of an array takes at least 2 bytes.
    if len(orjson.dumps(properties)) > 2 * MAX_ARRAY or len(properties) > MAX_PROPERTIES:
        return False
    return is_shallow(properties, MAX_DEPTH)


def _clamp(value: Any, depth: int, path: str, truncated: list[str]) -> Any:
    if isinstance(value, str):
        return _clamp_text(value, path, truncated)
    if not isinstance(value, dict | list):
        return value
    if depth == 0:
        truncated.append(path)
        return None
    if isinstance(value, dict):
        return {key: _clamp(entry, depth - 1, f"{path}.{key}".lstrip("."), truncated) for key, entry in value.items()}
    if len(value) > MAX_ARRAY:
        truncated.append(path)
    return [_clamp(entry, depth - 1, f"{path}[]", truncated) for entry in value[:MAX_ARRAY]]


def _clamp_text(text: str, path: str, truncated: list[str]) -> str:
    if len(text) * 4 <= MAX_TEXT_BYTES or len(raw := text.encode()) <= MAX_TEXT_BYTES:
        return text
    truncated.append(path)
    return raw[:MAX_TEXT_BYTES].decode(errors="ignore")


def _shrink(properties: Json, max_bytes: int, truncated: list[str]) -> Json:
    """Shrink the largest property until all properties fit: halve it if it is an array, otherwise remove it."""
    sizes = {name: len(orjson.dumps(value)) for name, value in properties.items()}
    while sum(sizes.values()) > max_bytes:
        largest = max(sizes, key=lambda name: sizes[name])
        truncated.append(largest)
        value = properties[largest]
        if isinstance(value, list) and len(value) > 1:
            value = value[: len(value) // 2]
            properties = properties | {largest: value}
            sizes[largest] = len(orjson.dumps(value))
        else:
            properties = {name: entry for name, entry in properties.items() if name != largest}
            del sizes[largest]
    return properties
