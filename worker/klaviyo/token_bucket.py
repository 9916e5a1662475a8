"""A token bucket with waiting requests."""

from __future__ import annotations

import math


class TokenBucket:
    """A token bucket that serves waiting requests in the order of their arrival.

    It starts full. All times are monotonic seconds. It is not thread-safe: the caller must hold a lock.
    """

    def __init__(self, now: float) -> None:
        self._tokens = math.inf  # the first refill reduces it to the capacity
        self._tickets: list[object] = []  # one per waiting request, in the order of their arrival
        self.refilled_at = now  # in the future during a pause

    @property
    def tokens(self) -> float:
        """Return the number of available tokens, as of the last refill."""
        return self._tokens

    @property
    def waiting(self) -> int:
        """Return the number of waiting requests."""
        return len(self._tickets)

    def elapsed(self, now: float) -> float:
        """Return the seconds since the last refill, without pauses."""
        return max(now - self.refilled_at, 0.0)

    def refill(self, now: float, rate: float, capacity: float) -> None:
        """Add the tokens since the last refill, at `rate` per second up to `capacity`."""
        self._tokens = min(self._tokens + self.elapsed(now) * rate, capacity)
        self.refilled_at = max(now, self.refilled_at)

    def take(self, ticket: object, reserve: float = 0.0) -> float:
        """Take a token for `ticket` and return 0. If only the `reserve` is available, let `ticket` wait.

        In that case, return the number of tokens that must be added before `ticket` gets its token.
        """
        if ticket not in self._tickets:
            self._tickets.append(ticket)
        missing = self._tickets.index(ticket) + 1 - (self._tokens - reserve)
        if missing > 0:
            return missing
        self._tokens -= 1
        self._tickets.remove(ticket)
        return 0.0

    def cancel(self, ticket: object) -> None:
        """Remove `ticket` from the waiting requests, if it still waits."""
        if ticket in self._tickets:
            self._tickets.remove(ticket)

    def pause(self, until: float) -> None:
        """Remove all tokens, and add no token before `until` or before the end of a longer pause."""
        self._tokens = 0.0
        self.refilled_at = max(until, self.refilled_at)
