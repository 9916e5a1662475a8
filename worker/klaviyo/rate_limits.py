"""The rate limiter: paces the requests to each Klaviyo endpoint.

It starts with the documented rate limits and adjusts them to the headers of Klaviyo's responses. Before the first
response it sends only few requests, because the limits of an account can be lower than documented. Klaviyo counts
requests per account and endpoint in fixed windows of 1 s (burst) and 60 s (steady). The tiers are those of its OpenAPI
document, revision 2026-07-15, except for L: that document says 750 a minute, but Klaviyo's guide says 700
(https://developers.klaviyo.com/en/docs/rate_limits_and_error_handling). The limiter uses 700 until a response reports
another limit.

Several processes can share an account. The drop of `RateLimit-Remaining` between two responses to one process counts
the requests of all processes in that time. Each process uses it to estimate its own share of the requests, and then
uses the same share of the remaining requests: docs/decisions/0010-rate-limits.md.
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

WINDOW = 60.0  # seconds; the window of the steady limit
MAX_WAIT = 60.0  # seconds; the maximum wait of a request
MIN_FACTOR = 1 / 16  # the lowest throttle factor, which repeated 429 responses lead to
RECOVERY = 60.0  # seconds in which the throttle factor would rise from 0 to 1
SHARE_WINDOW = 2.0  # the share is an average over the requests that the steady rate allows in this number of seconds
BACKGROUND_PART = 0.4  # of this process's share, for requests that give way to others
SAFE_BURST_SHARE = 0.7  # of the burst; the maximum steady rate
MIN_POLL, MAX_POLL = 0.001, 1.0  # seconds until a waiting request checks again: the rate can change
FIRST_POLL = 0.02  # seconds; the same until the first response, which usually lets all waiting requests continue
_QUOTA = re.compile(r"([0-9]{1,12}(?:\.[0-9]{1,9})?)(?:;\s*w=([0-9]{1,9}))?")
S, M, L, XL = (3, 60), (10, 150), (75, 700), (350, 3500)  # requests per second, requests per minute
TIERS = (  # all other endpoints have tier L
    (r"POST /api/data-privacy-deletion-jobs", S),
    (r"POST /api/(event-bulk-create-jobs|profile-merge)|\w+ /api/profile-bulk-import-jobs.*", M),
    (r"(GET|POST) /api/events|GET /api/catalog-(?!(item|variant)-bulk-(create|update)-jobs).*", XL),
)


class RateLimiter:
    """Paces the requests to each endpoint to a share of the account's limits (0 < share <= 1). Thread-safe."""

    def __init__(self, share: float, stopping: Event, now: Callable[[], float] = time.monotonic) -> None:
        self._share = share
        self._stopping = stopping
        self._now = now
        self._limiters: dict[str, _EndpointLimiter] = {}
        self._background_limiters: dict[str, _EndpointLimiter] = {}
        self._lock = Lock()

    def acquire(self, endpoint: str, *, background: bool = False) -> None:
        """Block until a request to `endpoint` ("POST /api/events", "PATCH /api/catalog-items/{id}") can be sent.

        A `background` request needs this in addition, and first. Together, these requests use at most BACKGROUND_PART
        of the rate, so they never use up what other requests need.

        Raises Throttled, with retry_after, as soon as the whole wait would exceed MAX_WAIT. Raises Transient if the
        request would have to wait while `stopping` is set.
        """
        limiter = self._limiter(endpoint, background=background)
        ticket = object()
        deadline = self._now() + MAX_WAIT
        try:
            while (seconds := limiter.take(ticket)) > 0:
                if self._now() + seconds > deadline:
                    raise Throttled(f"Klaviyo's rate limit for {endpoint} is used up", seconds)
                if self._stopping.wait(min(max(seconds, MIN_POLL), limiter.max_poll())):
                    raise Transient(f"stopped while {endpoint} waited for Klaviyo's rate limit")
        finally:
            limiter.cancel(ticket)

    def update(self, endpoint: str, status: int, headers: Mapping[str, str], retry_after: float | None) -> None:
        """Adjust the rate to the headers of a response. After a 429, pause for `retry_after` seconds, at least 1 s."""
        limiters = [self._limiter(endpoint)]
        with self._lock:
            limiters += filter(None, [self._background_limiters.get(endpoint)])
        for limiter in limiters:
            if status == HTTPStatus.TOO_MANY_REQUESTS:
                limiter.on_throttled(max(retry_after or 0.0, 1.0))
            else:
                limiter.on_report(parse_report(headers))

    def statuses(self) -> dict[str, RateLimitStatus]:
        """Return the status of each endpoint that received a request."""
        with self._lock:
            limiters = dict(self._limiters)
        return {endpoint: limiter.status() for endpoint, limiter in limiters.items()}

    def _limiter(self, endpoint: str, *, background: bool = False) -> _EndpointLimiter:
        limiters, part = (self._background_limiters, BACKGROUND_PART) if background else (self._limiters, 1.0)
        with self._lock:
            if endpoint not in limiters:
                tier = next((tier for pattern, tier in TIERS if re.fullmatch(pattern, endpoint)), L)
                limiters[endpoint] = _EndpointLimiter(*tier, self._share, self._now, part)
            return limiters[endpoint]


class Report(NamedTuple):
    """The limits and counts of the account that a response reports. NaN: unknown."""

    burst: float  # requests per second
    steady: float  # requests per minute
    remaining: float  # requests that are left in the steady window
    reset: float  # seconds until the steady window ends


class _Window(NamedTuple):
    """A window of the steady limit, as the latest response reported it."""

    remaining: float  # requests that the account can still send in the window
    rate: float  # requests per second that would use them up by the end of the window
    ends_at: float  # monotonic seconds


class _EndpointLimiter:
    """Paces the requests to one endpoint. Safe for many threads."""

    def __init__(self, burst: float, steady: float, share: float, now: Callable[[], float], part: float = 1.0) -> None:
        self._burst = burst  # the account's limit in requests per second
        self._steady = steady / WINDOW  # the account's limit in requests per second
        self._share = share  # the maximum share of the account's limits
        self._part = part  # the part of this process's share that the requests of this limiter can use
        self._now = now
        self._throttle_factor = 1.0  # a 429 lowers it, and so the rate
        self._window = _Window(math.inf, math.inf, -math.inf)
        self._estimator = ShareEstimator()
        self._bucket = TokenBucket(now())
        self._are_known = False  # True after the first response: the limits can be lower than documented
        self._lock = Lock()

    def max_poll(self) -> float:
        """Return the maximum number of seconds until a waiting request checks again."""
        return MAX_POLL if self._are_known else FIRST_POLL

    def take(self, ticket: object) -> float:
        """Take a token and return 0, or let `ticket` wait and return the seconds until its token is available."""
        with self._lock:
            now = self._refill()
            reserve = 0.0 if self._are_known else self._capacity(self._rate(now)) - 1
            missing = self._bucket.take(ticket, reserve)
            return self._seconds_until(missing, now) if missing else 0.0

    def cancel(self, ticket: object) -> None:
        """Remove `ticket` from the waiting requests."""
        with self._lock:
            self._bucket.cancel(ticket)

    def on_report(self, report: Report) -> None:
        """Adjust the rate to the RateLimit-* headers of a response.

        If `remaining` or `reset` is NaN or out of range, count only this process's request.
        """
        with self._lock:
            now = self._refill()
            self._learn_limits(report)
            if not (0 <= report.remaining < math.inf and 0 <= report.reset <= WINDOW):
                self._observe(1.0)
                return
            if abs(now + report.reset - self._window.ends_at) < WINDOW / 2:  # the window of the previous response
                self._observe(self._window.remaining - report.remaining)
            rate = max(report.remaining, 1.0) / max(report.reset, 1.0)
            self._window = _Window(report.remaining, rate, now + report.reset)
            if report.remaining < 1:
                self._bucket.pause(self._window.ends_at)

    def _learn_limits(self, report: Report) -> None:
        """Use the limits of the account."""
        if report.burst >= 1:
            self._burst = report.burst
        if report.steady >= 1:
            self._steady = report.steady / WINDOW
        self._steady = min(self._steady, SAFE_BURST_SHARE * self._burst)
        self._are_known = True

    def on_throttled(self, seconds: float) -> None:
        """Pause, then continue at half the rate. Several 429 responses during one pause halve the rate only once."""
        with self._lock:
            now = self._refill()
            if self._bucket.refilled_at <= now:
                self._throttle_factor = max(self._throttle_factor / 2, MIN_FACTOR)
            self._bucket.pause(now + seconds)

    def status(self) -> RateLimitStatus:
        """Return the current use of the limits."""
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

    def _observe(self, account_requests: float) -> None:
        self._estimator.observe(account_requests, memory=1 + SHARE_WINDOW * self._steady)

    def _refill(self) -> float:
        """Add the tokens since the last refill, and return the time."""
        now = self._now()
        self._throttle_factor = min(self._throttle_factor + self._bucket.elapsed(now) / RECOVERY, 1.0)
        rate = self._rate(now)
        self._bucket.refill(now, rate, self._capacity(rate))
        return now

    def _rate(self, at: float) -> float:
        """Return the number of requests per second that this process can send at a time."""
        account = min(self._steady, self._window.rate) if at < self._window.ends_at else self._steady
        own = min(self._share * self._throttle_factor * self._steady, self._estimator.share() * account)
        return self._part * own

    def _capacity(self, rate: float) -> float:
        """Return the size of the bucket. A full bucket and one second at `rate` stay within the burst limit."""
        return max((self._burst / self._steady - 1) * rate, 1.0)

    def _seconds_until(self, missing: float, now: float) -> float:
        """Return the seconds until `missing` more tokens are available. The rate can change when the window ends."""
        start = max(now, self._bucket.refilled_at)
        in_window = self._rate(start) * (self._window.ends_at - start)
        if 0 < in_window < missing:
            start = self._window.ends_at
            missing -= in_window
        return start - now + missing / self._rate(start)


def parse_report(headers: Mapping[str, str]) -> Report:
    """Return the limits in the RateLimit-* headers of a response.

    Klaviyo documents one number, which concerns the steady window. It also sends lists that start with another number:
    `350, 350;w=1, 3500;w=60`, where `w` is the length of a window in seconds.
    """
    limits = _quotas(headers, "RateLimit-Limit")
    steady, remaining, reset = (
        _steady(_quotas(headers, f"RateLimit-{name}")) for name in ("Limit", "Remaining", "Reset")
    )
    return Report(limits.get(1, math.nan), steady, remaining, reset)


def _quotas(headers: Mapping[str, str], name: str) -> dict[int, float]:
    """Return the numbers in a header by their window in seconds; 0: without a window. Malformed ones are left out."""
    matches = (_QUOTA.fullmatch(part.strip()) for part in headers.get(name, "").split(","))
    return {int(match[2] or 0): float(match[1]) for match in matches if match}


def _steady(quotas: Mapping[int, float]) -> float:
    """Return the number for the steady window, or NaN, which compares false with everything."""
    plain = quotas.get(0, math.nan) if quotas.keys() <= {0} else math.nan
    return quotas.get(int(WINDOW), plain)
