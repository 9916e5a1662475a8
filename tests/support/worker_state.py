"""A fake of the running worker that metrics and health read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from worker.telemetry.state import BulkEventsStatus, RateLimitStatus

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_HEALTHY = {
    "in_flight": 7,
    "held": 3,
    "oldest_age": 90.0,
    "lanes": 4,
    "parked_reason": "",
    "outage_reasons": {"klaviyo": "", "commercetools": ""},
    "refused_endpoints": [],
    "backlog": 120,
    "dead_letters": 2,
    "has_received": True,
    "stall_reason": "",
    "paused_reason": "",
    "is_stopping": False,
    "batch_sizes": {"events": [12, 0], "profiles": [0, 1], "deletions": [0, 0], "catalog": [0, 0]},
    "bulk_events": BulkEventsStatus(in_bulk=True, reason="the account ignores repeats"),
    "rate_limit_status": {"POST /api/events": RateLimitStatus(350.0, 3500.0, 3100.0, 0.25, 2900.0, 2)},
}


class FakeWorkerState:
    """A healthy worker, except for the given values. A value that is an exception is raised."""

    def __init__(self, **values: Any) -> None:
        self.values = _HEALTHY | values

    def _value(self, name: str) -> Any:
        value = self.values[name]
        if isinstance(value, Exception):
            raise value
        return value

    def in_flight(self) -> int:
        return int(self._value("in_flight"))

    def held(self) -> int:
        return int(self._value("held"))

    def oldest_age(self) -> float | None:
        seconds: float | None = self._value("oldest_age")
        return seconds

    def lanes(self) -> int:
        return int(self._value("lanes"))

    def parked_reason(self) -> str:
        return str(self._value("parked_reason"))

    def outage_reasons(self) -> Mapping[str, str]:
        return dict(self._value("outage_reasons"))

    def refused_endpoints(self) -> Sequence[str]:
        return list(self._value("refused_endpoints"))

    def backlog(self) -> int | None:
        number: int | None = self._value("backlog")
        return number

    def dead_letters(self) -> int | None:
        number: int | None = self._value("dead_letters")
        return number

    def has_received(self) -> bool:
        return bool(self._value("has_received"))

    def stall_reason(self) -> str:
        return str(self._value("stall_reason"))

    def paused_reason(self) -> str:
        return str(self._value("paused_reason"))

    def is_stopping(self) -> bool:
        return bool(self._value("is_stopping"))

    def batch_sizes(self) -> Mapping[str, Sequence[int]]:
        return dict(self._value("batch_sizes"))

    def bulk_events(self) -> BulkEventsStatus:
        found: BulkEventsStatus = self._value("bulk_events")
        return found

    def rate_limit_status(self) -> Mapping[str, RateLimitStatus]:
        return dict(self._value("rate_limit_status"))
