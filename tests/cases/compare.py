"""The comparison of a result with what is expected."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

    from worker.model import Json


def differences(expected: Json, result: Json) -> list[str]:
    """Return a line for each difference.

    `expected` names only what the case is about: fields that it does not name can have any value. Null: there is no
    value. Lists have exactly these entries. `max_calls`: the largest number of requests by the start of "METHOD /path".
    """
    rest = dict(expected)
    calls = rest.pop("max_calls", {})
    return [*_compare(rest, result, ""), *_too_many(calls, result["calls"])]


def _too_many(limits: dict[str, int], calls: dict[str, int]) -> Iterator[str]:
    for start, limit in limits.items():
        number = sum(count for call, count in calls.items() if call.startswith(start))
        if number > limit:
            yield f"calls: expected at most {limit} x {start}, but there were {number}"


def _compare(expected: Any, actual: Any, path: str) -> Iterator[str]:
    if isinstance(expected, dict) and isinstance(actual, dict):
        for name, value in expected.items():
            yield from _compare(value, actual.get(name), f"{path}.{name}" if path else name)
    elif isinstance(expected, list) and isinstance(actual, list):
        if len(expected) != len(actual):
            yield f"{path}: expected {len(expected)} entries, but there are {len(actual)}: {actual}"
        else:
            for index, (value, found) in enumerate(zip(expected, actual, strict=True)):
                yield from _compare(value, found, f"{path}[{index}]")
    elif expected != actual or isinstance(expected, bool) is not isinstance(actual, bool):
        yield f"{path}: expected {expected!r}, but it is {actual!r}"
