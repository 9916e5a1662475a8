"""How fast each Klaviyo endpoint may be called: what Klaviyo documents, then what its answers say.

It counts per account and endpoint in fixed windows of 1 s (burst) and 60 s (steady). Tiers are as in its OpenAPI
document, revision 2026-07-15, but L, 750 a minute there, is 700 until an answer says more, as in its guide:
https://developers.klaviyo.com/en/docs/rate_limits_and_error_handling

Workers that share an account know nothing of each other. Each takes it that what `RateLimit-Remaining` falls by between
two of its own answers was called by all, and takes its part of what remains (docs/decisions/0010-rate-limits.md).
"""

from __future__ import annotations

import math
import re
import time
from http import HTTPStatus
from threading import Lock
from typing import TYPE_CHECKING

from worker.errors import Throttled, Transient
from worker.telemetry.state import RateLimitStatus

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from threading import Event

STEADY = LONGEST_WAIT = 60.0  # seconds of the long window
LEAST, RECOVERY = 1 / 16, 60.0  # of the pace; seconds in which it would rise from nothing to the full one
FIRST_PART = 1 / 4  # of the account's calls, before answers tell
MEMORY = 2.0  # seconds at the account's steady pace: of so many own calls the part is an average
EVENING = 0.8  # power of the part: below one, so that who has less than others gains on them
SAFE = 0.7  # of the burst, as a pace for accounts whose steady limit was raised; the rest is for jitter
SHORTEST_LOOK, LONGEST_LOOK = 0.001, 1.0  # seconds until a waiter looks again: the pace may have changed
S, M, L, XL = (3, 60), (10, 150), (75, 700), (350, 3500)  # calls per second, calls per minute
TIERS = (  # L for all others
    (r"POST /api/data-privacy-deletion-jobs", S),
    (r"POST /api/event-bulk-create-jobs|\w+ /api/profile-bulk-import-jobs.*", M),
    (r"(GET|POST) /api/events|GET /api/catalog-(?!(item|variant)-bulk-(create|update)-jobs).*", XL),
)


class RateLimiter:
    """Paces calls, per endpoint, to a share (0 < share <= 1) of the account's limits. Safe for many threads."""

    def __init__(self, share: float, stopping: Event, now: Callable[[], float] = time.monotonic) -> None:
        self._share, self._stopping, self._now = share, stopping, now
        self._buckets: dict[str, _Bucket] = {}
        self._lock = Lock()

    def wait(self, endpoint: str) -> None:
        """Block until `endpoint` ("POST /api/events", "PATCH /api/catalog-items/{id}") may be called.

        Raises Throttled, with retry_after, as soon as that would take longer than LONGEST_WAIT in all; Transient when
        `stopping` is set and there is anything to wait for.
        """
        bucket, place, deadline = self._bucket(endpoint), object(), self._now() + LONGEST_WAIT
        try:
            while (seconds := bucket.take(place)) > 0:
                if self._now() + seconds > deadline:
                    raise Throttled(f"no call to {endpoint} is left within Klaviyo's limits", seconds)
                if self._stopping.wait(min(max(seconds, SHORTEST_LOOK), LONGEST_LOOK)):
                    raise Transient(f"stopped while {endpoint} had to wait for Klaviyo's limits")
        finally:
            bucket.leave(place)

    def answered(self, endpoint: str, status: int, headers: Mapping[str, str], retry_after: float | None) -> None:
        """Learn from an answer: its RateLimit-* headers, or a 429 and the seconds it asks for (None: one)."""
        bucket = self._bucket(endpoint)
        if status == HTTPStatus.TOO_MANY_REQUESTS:
            bucket.throttled(max(retry_after or 0.0, 1.0))
        else:
            bucket.told(*(_number(headers, f"RateLimit-{name}") for name in ("Limit", "Remaining", "Reset")))

    def statuses(self) -> dict[str, RateLimitStatus]:
        """Return how each endpoint that was called stands."""
        with self._lock:
            buckets = dict(self._buckets)
        return {endpoint: bucket.status() for endpoint, bucket in buckets.items()}

    def _bucket(self, endpoint: str) -> _Bucket:
        with self._lock:
            if endpoint not in self._buckets:
                tier = next((tier for pattern, tier in TIERS if re.fullmatch(pattern, endpoint)), L)
                self._buckets[endpoint] = _Bucket(*tier, self._share, self._now)
            return self._buckets[endpoint]


class _Bucket:
    """A token bucket with a queue: who waits knows when there will be a token for each before it, and one more."""

    def __init__(self, burst: float, steady: float, share: float, now: Callable[[], float]) -> None:
        self._burst, self._share, self._now = burst, share, now
        self._steady, self._factor = steady / STEADY, 1.0  # the account's calls per second; how much since a 429
        self._guide, self._guided_until = math.inf, -math.inf  # calls per second that Klaviyo's window has left
        self._remaining, self._own, self._all = math.inf, 1.0, 1 / FIRST_PART  # calls left; lately made; made by all
        self._tokens, self._counted_at = math.inf, now()  # counted in the future: none until then
        self._queue: list[object] = []
        self._lock = Lock()

    def take(self, place: object) -> float:
        """Take a token and return 0, or queue up and return the seconds until this place's turn."""
        with self._lock:
            now = self._count()
            if place not in self._queue:
                self._queue.append(place)
            missing = self._queue.index(place) + 1 - self._tokens
            if missing > 0:
                return self._seconds(missing, now)
            self._tokens -= 1
            self._queue.remove(place)
            return 0.0

    def leave(self, place: object) -> None:
        with self._lock:
            self._queue = [other for other in self._queue if other is not place]

    def status(self) -> RateLimitStatus:
        with self._lock:
            now = self._count()
            pace = self._pace(now)
            remaining = self._remaining if now < self._guided_until else None
            used = 1 - self._tokens / self._capacity(pace)
            return RateLimitStatus(
                self._burst, self._steady * STEADY, pace * STEADY, min(max(used, 0.0), 1.0), remaining, len(self._queue)
            )

    def told(self, limit: float, remaining: float, reset: float) -> None:
        """Note the steady limit and what remains of its window; nan, or what cannot be, tells of no other callers."""
        with self._lock:
            now = self._count()
            if 1 <= limit < math.inf:
                self._steady = min(limit / STEADY, SAFE * self._burst)
            if not (0 <= remaining < math.inf and 0 <= reset <= STEADY):
                self._learn(1.0)
                return
            if abs(now + reset - self._guided_until) < STEADY / 2:  # the window of the answer before
                self._learn(self._remaining - remaining)
            self._remaining = remaining
            self._guide, self._guided_until = max(remaining, 1.0) / max(reset, 1.0), now + reset
            if remaining < 1:
                self._pause(now + reset)

    def _learn(self, calls: float) -> None:
        """Count one own call, and all calls since the one before; many may only mean that this worker was idle."""
        kept = 1 - 1 / (1 + MEMORY * self._steady)
        self._own, self._all = self._own * kept + 1, self._all * kept + min(calls, 1 / LEAST)

    def throttled(self, seconds: float) -> None:
        """Pause, and go on at half the pace. Once per pause: many calls in flight may be refused."""
        with self._lock:
            now = self._count()
            if self._counted_at <= now:
                self._factor = max(self._factor / 2, LEAST)
            self._pause(now + seconds)

    def _pause(self, until: float) -> None:
        self._tokens, self._counted_at = 0.0, max(until, self._counted_at)

    def _count(self) -> float:
        """Add what came since the last count; return the time."""
        now = self._now()
        passed = max(now - self._counted_at, 0.0)
        self._factor = min(self._factor + passed / RECOVERY, 1.0)
        pace = self._pace(now)
        tokens = min(self._tokens + passed * pace, self._capacity(pace))
        self._tokens, self._counted_at = tokens, max(now, self._counted_at)
        return now

    def _capacity(self, pace: float) -> float:
        return max((self._burst / self._steady - 1) * pace, 1.0)

    def _seconds(self, missing: float, now: float) -> float:
        start = max(now, self._counted_at)
        guided = self._pace(start) * (self._guided_until - start)
        if 0 < guided < missing:
            start, missing = self._guided_until, missing - guided
        return start - now + missing / self._pace(start)

    def _pace(self, at: float) -> float:
        part = math.pow(self._own / max(self._own, self._all), EVENING)
        account = min(self._steady, self._guide if at < self._guided_until else math.inf)
        return min(self._share * self._factor * self._steady, part * account)


def _number(headers: Mapping[str, str], name: str) -> float:
    """Return a header's number, or nan, which is neither less nor more than anything."""
    try:
        return float(headers.get(name, "nan"))
    except ValueError:
        return math.nan
