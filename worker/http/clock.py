"""The difference between the clock of this machine and that of a service."""

from __future__ import annotations

import logging
import time
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING

from worker.telemetry.log import ConditionLog

if TYPE_CHECKING:
    from collections.abc import Mapping

MAX_OFFSET = 120.0  # seconds; AWS refuses requests from about 300 s on
INTERVAL = 60.0  # seconds between two readings


class Clock:
    """The clock of a service, read from the Date header of its responses at most once per INTERVAL. Thread-safe."""

    def __init__(self) -> None:
        self.offset = 0.0  # seconds by which the service's clock is ahead; 0 if unknown
        self._read_at = -INTERVAL  # monotonic seconds
        self._skew = ConditionLog("clock_skew", "clock_skew_over", logging.WARNING)

    def update(self, headers: Mapping[str, str]) -> None:
        """Read the clock from a response that has just arrived. Log a warning if it differs by MAX_OFFSET."""
        now = time.monotonic()
        if now < self._read_at + INTERVAL:
            return
        date = parse_date(headers.get("Date", ""))
        if date is None:
            return
        self.offset = date.timestamp() - time.time()
        self._read_at = now
        self._skew.log(describe(self.offset))


def parse_date(text: str) -> datetime | None:
    """Return the date in a header, or None if it is missing or malformed."""
    try:
        date = parsedate_to_datetime(text)
    except (ValueError, TypeError, OverflowError, IndexError):  # depends on what is malformed
        return None
    return date.replace(tzinfo=date.tzinfo or UTC)


def describe(offset: float) -> str:
    """Return what is wrong with the clock of this machine; "" if it is right."""
    if abs(offset) <= MAX_OFFSET:
        return ""
    return f"the clock of this machine is {abs(offset):.0f} s {'slow' if offset > 0 else 'fast'}: synchronize it"
