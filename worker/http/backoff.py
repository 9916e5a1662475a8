"""How long to wait before the next try."""

from __future__ import annotations

import random

FIRST_PAUSE, LONGEST_PAUSE = 1.0, 30.0  # seconds between two tries


PAUSE_SHARE = 1 / 60  # of the hold; no pause is longer, so that a short hold has its tries too


def longest_pause(hold: float) -> float:
    """Return the longest time between two tries, where messages are kept for `hold`; in seconds."""
    return min(max(hold * PAUSE_SHARE, FIRST_PAUSE), LONGEST_PAUSE)


def pause(tries: int, longest: float) -> float:
    """Return how long to wait after a number of failed tries, in seconds: doubling, with jitter."""
    return random.uniform(0.5, 1.0) * min(FIRST_PAUSE * 2.0 ** min(tries, 16), longest)  # noqa: S311
