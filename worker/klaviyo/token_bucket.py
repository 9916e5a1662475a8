"""A token bucket with a FIFO queue."""

from __future__ import annotations

import math


class TokenBucket:
    """A token bucket with a FIFO queue: each waiting call knows how many tokens come before its own.

    It starts full. Times are monotonic seconds. Not safe for many threads: the owner holds a lock.
    """

    def __init__(self, now: float) -> None:
        self._tokens = math.inf  # the first refill cuts it to the capacity
        self._tickets: list[object] = []  # of waiting calls, in the order in which they get their tokens
        self.refilled_at = now  # in the future while paused

    @property
    def tokens(self) -> float:
        """Return the number of available tokens, as of the last refill."""
        return self._tokens

    @property
    def waiting(self) -> int:
        """Return the number of waiting calls."""
        return len(self._tickets)

    def elapsed(self, now: float) -> float:
        """Return the seconds since the last refill, without pauses."""
        return max(now - self.refilled_at, 0.0)

    def refill(self, now: float, rate: float, capacity: float) -> None:
        """Add the tokens since the last refill, at `rate` per second up to `capacity`."""
        self._tokens = min(self._tokens + self.elapsed(now) * rate, capacity)
        self.refilled_at = max(now, self.refilled_at)

    def take(self, ticket: object) -> float:
        """Take a token for `ticket` and return 0, or queue it and return the number of tokens that are missing."""
        if ticket not in self._tickets:
            self._tickets.append(ticket)
        missing = self._tickets.index(ticket) + 1 - self._tokens
        if missing > 0:
            return missing
        self._tokens -= 1
        self._tickets.remove(ticket)
        return 0.0

    def cancel(self, ticket: object) -> None:
        """Remove `ticket` from the queue, if it still waits."""
        if ticket in self._tickets:
            self._tickets.remove(ticket)

    def pause(self, until: float) -> None:
        """Drop all tokens and add none before `until`, or before the end of a longer pause."""
        self._tokens = 0.0
        self.refilled_at = max(until, self.refilled_at)
