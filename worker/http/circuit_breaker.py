"""Stands before each endpoint of the other side: retries, outages, refused credentials."""

from __future__ import annotations

import logging
import time
from threading import Lock
from typing import TYPE_CHECKING, ParamSpec, TypeVar

import tenacity

from worker.errors import CircuitOpen, Misconfigured, Rejected, Throttled, Transient
from worker.http.backoff import MAX_BACKOFF, backoff, max_backoff
from worker.telemetry.log import ConditionLog

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from threading import Event

    from worker.errors import WorkerError
    from worker.settings import CommercetoolsSettings

FAILURE_THRESHOLD = 5  # calls to an endpoint that gave up, without one that succeeded in between
THROTTLE_PATIENCE = 60.0  # seconds; Klaviyo's longest window
ASIDE = 1.0  # seconds after which calls that came while one was finding out come again

P = ParamSpec("P")
T = TypeVar("T")


class CircuitBreakers:
    """The gates of one service, by endpoint: one part of a service may be down while others work."""

    def __init__(self, service: str, settings: CommercetoolsSettings, stopping: Event) -> None:
        self._service = service
        self._settings = settings
        self._stopping = stopping
        self._gates: dict[str, CircuitBreaker] = {}

    def __getitem__(self, endpoint: str) -> CircuitBreaker:
        """Return the gate of an endpoint. Endpoints must be few: no ids in them."""
        if gate := self._gates.get(endpoint):
            return gate
        gate = CircuitBreaker({"service": self._service, "endpoint": endpoint}, self._settings, self._stopping)
        return self._gates.setdefault(endpoint, gate)

    def outage_reason(self) -> str:
        """Return why calls are held back, "" when none are."""
        return next(filter(None, (gate.outage_reason() for gate in list(self._gates.values()))), "")


class CircuitBreaker:
    """Calls again what failed for the moment; in an outage lets one call through in a while, to see if it is over.

    A call that raises Transient is repeated for about `retry_timeout`, with waits that grow from 0.2 s and full
    jitter; Retry-After is obeyed, and Throttled waited out for longer. Once calls have given up FAILURE_THRESHOLD times
    in a row the gate closes: it raises CircuitOpen at once, without a request, until a pause is over. Then one call
    tries, once, and opens the gate or begins a longer pause. Misconfigured closes it at once, for
    `park_retry_interval`.
    """

    def __init__(self, about: Mapping[str, str], settings: CommercetoolsSettings, stopping: Event) -> None:
        self._about = about
        self._settings = settings
        self._stopping = stopping
        self._outage = ConditionLog("outage", "outage_over", logging.WARNING)
        self._lock = Lock()
        self._failures = 0  # calls in a row that gave up
        self._pauses = 0
        self._closed_by: WorkerError | None = None
        self._open_at = 0.0  # monotonic seconds
        self._trying_since: float | None = None
        self._retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(Transient),
            stop=self._is_enough,
            wait=_wait,
            sleep=tenacity.sleep_using_event(stopping),
            reraise=True,
        )
        self._only_throttled = self._retrying.copy(retry=tenacity.retry_if_exception_type(Throttled))

    def __call__(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call `function` until it returns. Raises Transient, Misconfigured, or at once whatever else it raises."""
        return self._guarded(self._only_throttled if self._failures else self._retrying, function, *args, **kwargs)

    def once(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call `function`, and again only while it is throttled: then nothing was done. Raises as a call does."""
        return self._guarded(self._only_throttled, function, *args, **kwargs)

    def _guarded(self, retrying: tenacity.Retrying, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        finds_out = self._enter()
        try:
            result = retrying(function, *args, **kwargs)
        except (Rejected, Throttled):  # the other side is up
            self._passed()
            raise
        except (Transient, Misconfigured) as error:
            raise self._failed(error, finds_out) from None
        except BaseException:
            if finds_out:
                self._trying_since = None
            raise
        self._passed()
        return result

    def outage_reason(self) -> str:
        """Return why calls are held back, "" when they are not."""
        with self._lock:
            is_out = isinstance(self._closed_by, Transient) and time.monotonic() < self._open_at + 2 * MAX_BACKOFF
            return str(self._closed_by) if is_out else ""

    def _enter(self) -> bool:
        """Let the call through, or raise why not, with the seconds until it is worth coming again.

        Returns whether the gate is closed, and the call is the one that finds out.
        """
        now = time.monotonic()
        with self._lock:
            if self._closed_by is None:
                return False
            if self._trying_since is not None:
                raise _again(self._closed_by, max(ASIDE, now - self._trying_since))
            if now < self._open_at:
                raise _again(self._closed_by, self._open_at - now)
            self._trying_since = now
            return True

    def _passed(self) -> None:
        with self._lock:
            self._failures = self._pauses = 0
            self._closed_by = self._trying_since = None
            self._outage.log("", **self._about)

    def _failed(self, error: Transient | Misconfigured, finds_out: bool) -> Transient | Misconfigured:
        """Note that a call gave up; return what to raise: an CircuitOpen when the gate is closed."""
        with self._lock:
            self._failures += 1
            if self._closed_by is not None and not finds_out:  # begun before the gate was closed
                return _again(self._closed_by, max(self._open_at - time.monotonic(), 0.0))
            if isinstance(error, Misconfigured):
                seconds = self._settings.park_retry_interval
            elif self._failures < FAILURE_THRESHOLD and self._closed_by is None:
                return error
            else:
                longest = max_backoff(self._settings.outage_hold)
                seconds = max(error.retry_after or 0.0, backoff(self._pauses, longest))
                self._outage.log(str(error), **self._about)
            self._pauses += 1
            self._closed_by, self._open_at, self._trying_since = error, time.monotonic() + seconds, None
            return _again(error, seconds)

    def _is_enough(self, state: tenacity.RetryCallState) -> bool:
        """Tell whether to give up rather than wait once more."""
        error = state.outcome.exception() if state.outcome else None
        patience = THROTTLE_PATIENCE if isinstance(error, Throttled) else self._settings.retry_timeout
        is_over = (state.seconds_since_start or 0.0) + state.upcoming_sleep >= patience
        return is_over or self._stopping.is_set()


def _again(error: WorkerError, seconds: float) -> Transient | Misconfigured:
    """Return a new error of the same meaning: one object raised in many threads would collect their tracebacks."""
    return type(error)(str(error), seconds) if isinstance(error, Misconfigured) else CircuitOpen(str(error), seconds)


_backoff = tenacity.wait_random_exponential(multiplier=0.2, max=5)


def _wait(state: tenacity.RetryCallState) -> float:
    error = state.outcome.exception() if state.outcome else None
    asked = error.retry_after if isinstance(error, Transient) else None
    return max(asked or 0.0, _backoff(state))
