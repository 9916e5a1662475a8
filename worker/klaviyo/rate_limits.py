"""Paces calls to each Klaviyo endpoint: by the documented rate limits, corrected by the headers of its responses.

Klaviyo counts calls per account and endpoint in fixed windows of 1 s (burst) and 60 s (steady). The tiers are those of
its OpenAPI document, revision 2026-07-15, except for L: it is 750 a minute there but 700 in Klaviyo's guide, so it is
700 until a response reports another limit: https://developers.klaviyo.com/en/docs/rate_limits_and_error_handling

Several processes can share an account. Each one attributes the drop of `RateLimit-Remaining` between two of its own
responses to all of them, and uses its proportional share of the calls that remain: docs/decisions/0010-rate-limits.md.
"""

from __future__ import annotations

import math
import re
import time
from http import HTTPStatus
from threading import Lock
from typing import TYPE_CHECKING, NamedTuple

from worker.errors import Throttled, Transient
from worker.klaviyo.share_estimator import ShareEstimator
from worker.klaviyo.token_bucket import TokenBucket
from worker.telemetry.state import RateLimitStatus

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from threading import Event

WINDOW = 60.0  # seconds of the steady limit's window
MAX_WAIT = 60.0  # seconds that a call waits
MIN_FACTOR = 1 / 16  # of the rate, after repeated 429 responses
RECOVERY = 60.0  # seconds in which the factor would rise from 0 to 1
SHARE_WINDOW = 2.0  # seconds at the account's steady rate: the share is an average over that number of own calls
SAFE_BURST_SHARE = 0.7  # of the burst: the highest rate for accounts with a raised steady limit; the rest is for jitter
MIN_POLL = 0.001  # seconds until a waiting call checks the rate again, which can have changed
MAX_POLL = 1.0
S, M, L, XL = (3, 60), (10, 150), (75, 700), (350, 3500)  # calls per second, calls per minute
TIERS = (  # L for all other endpoints
    (r"POST /api/data-privacy-deletion-jobs", S),
    (r"POST /api/event-bulk-create-jobs|\w+ /api/profile-bulk-import-jobs.*", M),
    (r"(GET|POST) /api/events|GET /api/catalog-(?!(item|variant)-bulk-(create|update)-jobs).*", XL),
)


class RateLimiter:
    """Paces calls, per endpoint, to a share (0 < share <= 1) of the account's limits. Safe for many threads."""

    def __init__(self, share: float, stopping: Event, now: Callable[[], float] = time.monotonic) -> None:
        self._share = share
        self._stopping = stopping
        self._now = now
        self._limiters: dict[str, _EndpointLimiter] = {}
        self._lock = Lock()

    def acquire(self, endpoint: str) -> None:
        """Block until `endpoint` ("POST /api/events", "PATCH /api/catalog-items/{id}") can be called.

        Raises Throttled, with retry_after, as soon as the whole wait would exceed MAX_WAIT. Raises Transient if the
        call would have to wait while `stopping` is set.
        """
        limiter = self._limiter(endpoint)
        ticket = object()
        deadline = self._now() + MAX_WAIT
        try:
            while (seconds := limiter.take(ticket)) > 0:
                if self._now() + seconds > deadline:
                    raise Throttled(f"Klaviyo's rate limit for {endpoint} is used up", seconds)
                if self._stopping.wait(min(max(seconds, MIN_POLL), MAX_POLL)):
                    raise Transient(f"stopped while {endpoint} waited for Klaviyo's rate limit")
        finally:
            limiter.cancel(ticket)

    def update(self, endpoint: str, status: int, headers: Mapping[str, str], retry_after: float | None) -> None:
        """Adjust the rate to a response: to its RateLimit-* headers, or to a 429 and its Retry-After (default 1 s)."""
        limiter = self._limiter(endpoint)
        if status == HTTPStatus.TOO_MANY_REQUESTS:
            limiter.on_throttled(max(retry_after or 0.0, 1.0))
        else:
            limiter.on_headers(*(_number(headers, f"RateLimit-{name}") for name in ("Limit", "Remaining", "Reset")))

    def statuses(self) -> dict[str, RateLimitStatus]:
        """Return the status of each endpoint that was called."""
        with self._lock:
            limiters = dict(self._limiters)
        return {endpoint: limiter.status() for endpoint, limiter in limiters.items()}

    def _limiter(self, endpoint: str) -> _EndpointLimiter:
        with self._lock:
            if endpoint not in self._limiters:
                tier = next((tier for pattern, tier in TIERS if re.fullmatch(pattern, endpoint)), L)
                self._limiters[endpoint] = _EndpointLimiter(*tier, self._share, self._now)
            return self._limiters[endpoint]


class _Window(NamedTuple):
    """A window of the steady limit, as a response reported it."""

    remaining: float  # calls of the account
    rate: float  # calls per second until the window ends
    ends_at: float  # monotonic seconds


class _EndpointLimiter:
    """Paces the calls to one endpoint. Safe for many threads."""

    def __init__(self, burst: float, steady: float, share: float, now: Callable[[], float]) -> None:
        self._burst = burst  # calls per second of the account
        self._steady = steady / WINDOW  # calls per second of the account
        self._share = share  # at most this share of the account's limits
        self._now = now
        self._throttle_factor = 1.0  # of the rate; a 429 lowers it
        self._window = _Window(math.inf, math.inf, -math.inf)
        self._estimator = ShareEstimator()
        self._bucket = TokenBucket(now())
        self._lock = Lock()

    def take(self, ticket: object) -> float:
        """Take a token and return 0, or queue `ticket` and return the seconds until its token is available."""
        with self._lock:
            now = self._refill()
            missing = self._bucket.take(ticket)
            return self._seconds_until(missing, now) if missing else 0.0

    def cancel(self, ticket: object) -> None:
        """Remove `ticket` from the queue."""
        with self._lock:
            self._bucket.cancel(ticket)

    def on_headers(self, limit: float, remaining: float, reset: float) -> None:
        """Adjust the rate to the steady limit, the remaining calls of the window and the seconds until it ends.

        If `remaining` or `reset` is NaN or out of range, assume that no other process calls the endpoint.
        """
        with self._lock:
            now = self._refill()
            if 1 <= limit < math.inf:
                self._steady = min(limit / WINDOW, SAFE_BURST_SHARE * self._burst)
            if not (0 <= remaining < math.inf and 0 <= reset <= WINDOW):
                self._observe(1.0)
                return
            if abs(now + reset - self._window.ends_at) < WINDOW / 2:  # the same window as the previous response's
                self._observe(self._window.remaining - remaining)
            self._window = _Window(remaining, max(remaining, 1.0) / max(reset, 1.0), now + reset)
            if remaining < 1:
                self._bucket.pause(self._window.ends_at)

    def on_throttled(self, seconds: float) -> None:
        """Pause, then continue at half the rate. Several 429 responses in one pause halve it once."""
        with self._lock:
            now = self._refill()
            if self._bucket.refilled_at <= now:
                self._throttle_factor = max(self._throttle_factor / 2, MIN_FACTOR)
            self._bucket.pause(now + seconds)

    def status(self) -> RateLimitStatus:
        """Return how the limits are used now."""
        with self._lock:
            now = self._refill()
            rate = self._rate(now)
            used = 1 - self._bucket.tokens / self._capacity(rate)
            remaining = self._window.remaining if now < self._window.ends_at else None
            return RateLimitStatus(
                self._burst,
                self._steady * WINDOW,
                rate * WINDOW,
                min(max(used, 0.0), 1.0),
                remaining,
                self._bucket.waiting,
            )

    def _observe(self, account_calls: float) -> None:
        self._estimator.observe(account_calls, memory=1 + SHARE_WINDOW * self._steady)

    def _refill(self) -> float:
        """Add the tokens since the last refill, and return the time."""
        now = self._now()
        self._throttle_factor = min(self._throttle_factor + self._bucket.elapsed(now) / RECOVERY, 1.0)
        rate = self._rate(now)
        self._bucket.refill(now, rate, self._capacity(rate))
        return now

    def _rate(self, at: float) -> float:
        """Return the calls per second of this process at a time."""
        account = min(self._steady, self._window.rate) if at < self._window.ends_at else self._steady
        return min(self._share * self._throttle_factor * self._steady, self._estimator.share() * account)

    def _capacity(self, rate: float) -> float:
        """Return the size of the bucket: together with `rate`, one second has no more calls than the burst allows."""
        return max((self._burst / self._steady - 1) * rate, 1.0)

    def _seconds_until(self, missing: float, now: float) -> float:
        """Return the seconds until `missing` more tokens are available. The rate changes when the window ends."""
        start = max(now, self._bucket.refilled_at)
        in_window = self._rate(start) * (self._window.ends_at - start)
        if 0 < in_window < missing:
            start = self._window.ends_at
            missing -= in_window
        return start - now + missing / self._rate(start)


def _number(headers: Mapping[str, str], name: str) -> float:
    """Return the number in a header, or NaN, which compares false with everything."""
    try:
        return float(headers.get(name, "nan"))
    except ValueError:
        return math.nan
