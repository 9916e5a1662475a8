"""Rate limits in fixed windows, like Klaviyo's."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from threading import Lock
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


class Throttled(Exception):
    """A window has no requests left. It ends in `seconds`."""

    def __init__(self, seconds: int) -> None:
        super().__init__(f"throttled for {seconds} s")
        self.seconds = seconds


class FixedWindowLimiter:
    """Fixed windows of several lengths for each name."""

    def __init__(self, now: Callable[[], float] = time.time) -> None:
        self._now = now
        self._lock = Lock()
        self._used: dict[tuple[str, int], tuple[int, int]] = defaultdict(lambda: (-1, 0))

    def acquire(self, name: str, limits: Mapping[int, int]) -> tuple[int, int]:
        """Count one request against `limits` (seconds -> requests).

        Return the remaining requests of the longest window and the seconds until it ends. Raises Throttled.
        """
        now = self._now()
        counts = {}
        with self._lock:
            for seconds, limit in limits.items():
                window, used = self._used[name, seconds]
                used = used if window == int(now // seconds) else 0
                if used >= limit:
                    raise Throttled(_seconds_left(now, seconds))
                counts[seconds] = used + 1
            for seconds, used in counts.items():
                self._used[name, seconds] = (int(now // seconds), used)
        longest = max(limits)
        return limits[longest] - counts[longest], _seconds_left(now, longest)


def _seconds_left(now: float, seconds: int) -> int:
    return max(1, math.ceil(seconds - now % seconds))
