"""The recent failures of messages, for the status page."""

from __future__ import annotations

from datetime import UTC, datetime
from threading import Lock
from typing import TYPE_CHECKING, Any

from worker.errors import kind_of
from worker.json_access import shorten

if TYPE_CHECKING:
    from collections.abc import Mapping

MAX_FAILURES = 20
MAX_TEXT = 300  # characters of each field
_KEY_FIELDS = ("outcome", "stage", "error")  # failures with the same values and the same kind of reason share an entry
_FIELDS = (*_KEY_FIELDS, "reason", "message_type", "resource_type", "resource_id", "message_id", "attempt")


class RecentFailures:
    """The last MAX_FAILURES distinct failures, each with its newest message. Thread-safe.

    Each entry counts its repetitions, so that an outage with a thousand messages does not displace all other failures.
    """

    def __init__(self) -> None:
        self._failures: dict[tuple[Any, ...], dict[str, Any]] = {}  # oldest first
        self._lock = Lock()

    def add(self, line: Mapping[str, Any]) -> None:
        """Add a failure from the fields of its canonical log line."""
        failure = {name: _truncate(line[name]) for name in _FIELDS}
        key = (*(failure[name] for name in _KEY_FIELDS), kind_of(failure["reason"] or ""))
        failure["at"] = datetime.now(UTC).isoformat(timespec="seconds")
        with self._lock:
            previous = self._failures.pop(key, None)
            self._failures[key] = failure | {"times": previous["times"] + 1 if previous else 1}
            if len(self._failures) > MAX_FAILURES:
                del self._failures[next(iter(self._failures))]

    def newest(self) -> list[dict[str, Any]]:
        """Return all failures, newest first."""
        with self._lock:
            return list(reversed(self._failures.values()))


def _truncate(value: Any) -> Any:
    return shorten(value, MAX_TEXT) if isinstance(value, str) else value
