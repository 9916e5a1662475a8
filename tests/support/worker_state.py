"""A running worker, as metrics and health see it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from worker.telemetry.state import RateLimitStatus

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_WELL = {
    "in_flight": 7,
    "waiting": 3,
    "oldest_age": 90.0,
    "lanes": 4,
    "parked": "",
    "outages": {"klaviyo": "", "commercetools": ""},
    "backlog": 120,
    "dead_letters": 2,
    "has_begun": True,
    "is_alive": True,
    "is_stopping": False,
    "at_work": {"events": [12, 0], "profiles": [0, 1], "catalog": [0, 0]},
    "limits": {"POST /api/events": RateLimitStatus(350.0, 3500.0, 3100.0, 0.25, 2900.0, 2)},
}


class FakeState:
    """Tells what it was given; all is well unless told otherwise. An exception is raised."""

    def __init__(self, **values: Any) -> None:
        self.values = _WELL | values

    def _tell(self, name: str) -> Any:
        value = self.values[name]
        if isinstance(value, Exception):
            raise value
        return value

    def in_flight(self) -> int:
        return int(self._tell("in_flight"))

    def waiting(self) -> int:
        return int(self._tell("waiting"))

    def oldest_age(self) -> float | None:
        seconds: float | None = self._tell("oldest_age")
        return seconds

    def lanes(self) -> int:
        return int(self._tell("lanes"))

    def parked(self) -> str:
        return str(self._tell("parked"))

    def outages(self) -> Mapping[str, str]:
        return dict(self._tell("outages"))

    def backlog(self) -> int | None:
        number: int | None = self._tell("backlog")
        return number

    def dead_letters(self) -> int | None:
        number: int | None = self._tell("dead_letters")
        return number

    def has_begun(self) -> bool:
        return bool(self._tell("has_begun"))

    def is_alive(self) -> bool:
        return bool(self._tell("is_alive"))

    def is_stopping(self) -> bool:
        return bool(self._tell("is_stopping"))

    def at_work(self) -> Mapping[str, Sequence[int]]:
        return dict(self._tell("at_work"))

    def limits(self) -> Mapping[str, RateLimitStatus]:
        return dict(self._tell("limits"))
