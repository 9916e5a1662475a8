"""Exponential backoff with jitter."""

from __future__ import annotations

import random

MIN_BACKOFF = 1.0  # seconds before the first retry
MAX_BACKOFF = 30.0  # seconds
BACKOFF_SHARE = 1 / 60  # of the hold, so that messages are retried several times even if the hold is short


def max_backoff(hold: float) -> float:
    """Return the maximum delay between two retries of a message that is held for `hold` seconds."""
    return min(max(hold * BACKOFF_SHARE, MIN_BACKOFF), MAX_BACKOFF)


def backoff(retries: int, maximum: float) -> float:
    """Return the delay before the next retry in seconds. It doubles with each retry and has jitter."""
    return random.uniform(0.5, 1.0) * min(MIN_BACKOFF * 2.0 ** min(retries, 16), maximum)  # noqa: S311
