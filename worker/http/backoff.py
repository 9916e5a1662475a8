"""How long to wait before the next try."""

from __future__ import annotations

import random

MIN_BACKOFF, MAX_BACKOFF = 1.0, 30.0  # seconds between two tries


BACKOFF_SHARE = 1 / 60  # of the hold; no pause is longer, so that a short hold has its tries too


def max_backoff(hold: float) -> float:
    """Return the longest time between two tries, where messages are kept for `hold`; in seconds."""
    return min(max(hold * BACKOFF_SHARE, MIN_BACKOFF), MAX_BACKOFF)


def backoff(retries: int, maximum: float) -> float:
    """Return how long to wait after a number of failed tries, in seconds: doubling, with jitter."""
    return random.uniform(0.5, 1.0) * min(MIN_BACKOFF * 2.0 ** min(retries, 16), maximum)  # noqa: S311
