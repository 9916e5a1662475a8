"""Rate limits in fixed windows, as Klaviyo counts them."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from threading import Lock
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


class Throttled(Exception):
    """A window is used up; it ends in `seconds`."""

    def __init__(self, seconds: int) -> None:
        super().__init__(f"throttled for {seconds} s")
        self.seconds = seconds


class Limiter:
    """Fixed windows, several at a time, per name."""

    def __init__(self, now: Callable[[], float] = time.time) -> None:
        self._now = now
        self._lock = Lock()
        self._used: dict[tuple[str, int], tuple[int, int]] = defaultdict(lambda: (-1, 0))

    def take(self, name: str, limits: Mapping[int, int]) -> tuple[int, int]:
        """Count one request against `limits` (seconds -> requests).

        Returns what remains in the longest window and the seconds until it ends. Raises Throttled.
        """
        now = self._now()
        counts = {}
        with self._lock:
            for seconds, limit in limits.items():
                window, used = self._used[name, seconds]
                used = used if window == int(now // seconds) else 0
                if used >= limit:
                    raise Throttled(_rest(now, seconds))
                counts[seconds] = used + 1
            for seconds, used in counts.items():
                self._used[name, seconds] = (int(now // seconds), used)
        longest = max(limits)
        return limits[longest] - counts[longest], _rest(now, longest)


def _rest(now: float, seconds: int) -> int:
    return max(1, math.ceil(seconds - now % seconds))
