"""Why messages failed lately."""

from __future__ import annotations

from datetime import UTC, datetime
from threading import Lock
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

MAX_FAILURES = 20  # reasons kept
MAX_TEXT = 300  # characters of each text
_SAME = ("outcome", "stage", "error", "reason")  # what makes two failures one, that came twice
_TOLD = (*_SAME, "message_type", "resource_type", "resource_id", "message_id", "attempt")


class RecentFailures:
    """The last MAX_FAILURES different failures, each with its newest message. Safe for many threads.

    One that comes again is counted, so that an outage of a thousand messages does not push out all others.
    """

    def __init__(self) -> None:
        self._failures: dict[tuple[Any, ...], dict[str, Any]] = {}  # the oldest first
        self._lock = Lock()

    def add(self, line: Mapping[str, Any]) -> None:
        """Note a failure, with the fields of its canonical log line."""
        told = {name: _bounded(line[name]) for name in _TOLD}
        same = tuple(told[name] for name in _SAME)
        told["at"] = datetime.now(UTC).isoformat(timespec="seconds")
        with self._lock:
            before = self._failures.pop(same, None)
            self._failures[same] = told | {"times": before["times"] + 1 if before else 1}
            if len(self._failures) > MAX_FAILURES:
                del self._failures[next(iter(self._failures))]

    def newest(self) -> list[dict[str, Any]]:
        """Return all, the newest first."""
        with self._lock:
            return list(reversed(self._failures.values()))


def _bounded(value: Any) -> Any:
    return f"{value[: MAX_TEXT - 1]}…" if isinstance(value, str) and len(value) > MAX_TEXT else value
