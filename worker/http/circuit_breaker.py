"""A circuit breaker per endpoint: retries with backoff, and an open circuit during outages.

A call is a request with its retries. docs/decisions/0012-hold-and-circuit-breakers.md has the reasons.
"""

from __future__ import annotations

import logging
import time
from enum import Enum
from threading import Lock
from typing import TYPE_CHECKING, ParamSpec, TypeVar

import tenacity

from worker.errors import (
    CircuitOpen,
    EndpointRefused,
    Misconfigured,
    Rejected,
    RequestBlocked,
    ResponseTooLarge,
    Throttled,
    Transient,
)
from worker.http.backoff import MAX_BACKOFF, backoff, max_backoff
from worker.telemetry.log import ConditionLog

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from threading import Event

    from worker.settings import CommercetoolsSettings

FAILURE_THRESHOLD = 5  # consecutive failed calls that open a circuit
THROTTLE_TIMEOUT = 60.0  # seconds during which a throttled request is retried: Klaviyo's longest window
PROBE_WAIT = 1.0  # seconds; minimum delay until the retry of a call that failed because a probe was running

P = ParamSpec("P")
T = TypeVar("T")


class CircuitBreakers:
    """The circuit breakers of one service, by endpoint, because one endpoint can fail while others work."""

    def __init__(self, service: str, settings: CommercetoolsSettings, stopping: Event) -> None:
        self._service = service
        self._settings = settings
        self._stopping = stopping
        self._breakers: dict[str, CircuitBreaker] = {}

    def __getitem__(self, endpoint: str) -> CircuitBreaker:
        """Return the circuit breaker of an endpoint. `endpoint` must not contain ids: breakers are never removed."""
        if breaker := self._breakers.get(endpoint):
            return breaker
        breaker = CircuitBreaker({"service": self._service, "endpoint": endpoint}, self._settings, self._stopping)
        return self._breakers.setdefault(endpoint, breaker)

    def outage_reason(self) -> str:
        """Return why a circuit is open, or "" if the service has no outage. A refusal is no outage."""
        return next((str(cause) for cause in self._causes().values() if not isinstance(cause, _REFUSALS)), "")

    def refusal_reason(self) -> str:
        """Return why the whole service refuses the worker, or "" if it does not."""
        return next((str(cause) for cause in self._causes().values() if isinstance(cause, Misconfigured)), "")

    def refused_endpoints(self) -> dict[str, str]:
        """Return the reason of each endpoint that refuses the worker, while the service accepts its credentials."""
        return {name: str(cause) for name, cause in self._causes().items() if isinstance(cause, EndpointRefused)}

    def _causes(self) -> dict[str, Transient | Misconfigured]:
        causes = {endpoint: breaker.cause() for endpoint, breaker in list(self._breakers.items())}
        return {endpoint: cause for endpoint, cause in causes.items() if cause is not None}


class CircuitState(Enum):
    """The state of a circuit."""

    CLOSED = "closed"  # calls send requests
    OPEN = "open"  # calls fail without a request; the first call after the backoff becomes the probe
    HALF_OPEN = "half_open"  # the probe is running; all other calls fail without a request


_REFUSALS = (EndpointRefused, Misconfigured)
_NO_CAUSE = Transient("")  # the cause while the circuit is closed


class CircuitBreaker:
    """Retries the requests to one endpoint, and stops sending them during an outage.

    A request that raises Transient is retried for up to `retry_timeout`, except for EndpointRefused and
    ResponseTooLarge. A request that raises Throttled is retried for up to THROTTLE_TIMEOUT. The delay before a retry is
    random, at first up to 0.2 s and later up to 5 s. It is never shorter than Retry-After.

    After FAILURE_THRESHOLD consecutive failed calls the circuit opens: calls raise CircuitOpen without a request.
    After a backoff, one call becomes the probe. It sends a request without retries. If the probe succeeds, the circuit
    closes. If it fails, the circuit opens again with a longer backoff. EndpointRefused and Misconfigured open the
    circuit immediately, for `park_retry_interval`.
    """

    def __init__(self, labels: Mapping[str, str], settings: CommercetoolsSettings, stopping: Event) -> None:
        self._labels = labels  # fields of the log lines
        self._settings = settings
        self._stopping = stopping
        self._outage = ConditionLog("outage", "outage_over", logging.WARNING)
        self._refusal = ConditionLog("endpoint_refused", "endpoint_accepted", logging.WARNING)
        self._lock = Lock()
        self._state = CircuitState.CLOSED
        self._failures = 0  # consecutive failed calls
        self._openings = 0  # since the circuit was last closed
        self._cause: Transient | Misconfigured = _NO_CAUSE  # the error that opened the circuit
        self._open_until = 0.0  # monotonic seconds
        self._probing_since = 0.0  # monotonic seconds
        self._retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception(_is_worth_a_retry),
            stop=self._stop,
            wait=_wait,
            sleep=tenacity.sleep_using_event(stopping),
            reraise=True,
        )
        self._only_throttled = self._retrying.copy(retry=tenacity.retry_if_exception_type(Throttled))

    def __call__(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call `function` with retries. Raises its last error.

        If the circuit is open, raises CircuitOpen or Misconfigured without calling `function`.
        """
        return self._guarded(self._only_throttled if self._failures else self._retrying, function, *args, **kwargs)

    def call_once(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call `function`. Retry it only if it was throttled, and so had no effect. Raises as `__call__` does."""
        return self._guarded(self._only_throttled, function, *args, **kwargs)

    def _guarded(self, retrying: tenacity.Retrying, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        is_probe = self._before_call()
        try:
            result = retrying(function, *args, **kwargs)
        except (Rejected, RequestBlocked, ResponseTooLarge, Throttled):  # the service is up
            self._on_success()
            raise
        except (Transient, Misconfigured) as error:
            raise self._on_failure(error, is_probe) from None
        except BaseException:
            if is_probe:
                self._abandon_probe()
            raise
        self._on_success()
        return result

    def cause(self) -> Transient | Misconfigured | None:
        """Return the error that opened the circuit, or None if the circuit is closed.

        If no call has probed the endpoint for 2 * MAX_BACKOFF seconds after the backoff, the cause counts as gone.
        """
        with self._lock:
            is_open = self._state is not CircuitState.CLOSED and time.monotonic() < self._open_until + 2 * MAX_BACKOFF
            return self._cause if is_open else None

    def _before_call(self) -> bool:
        """Return whether the call is the probe. Raises CircuitOpen or Misconfigured if it must not send a request."""
        now = time.monotonic()
        with self._lock:
            if self._state is CircuitState.CLOSED:
                return False
            if self._state is CircuitState.HALF_OPEN:
                raise _copy_of(self._cause, max(PROBE_WAIT, now - self._probing_since))
            if now < self._open_until:
                raise _copy_of(self._cause, self._open_until - now)
            self._half_open(now)
            return True

    def _on_success(self) -> None:
        with self._lock:
            self._close()

    def _on_failure(self, error: Transient | Misconfigured, is_probe: bool) -> Transient | Misconfigured:
        """Count a failed call and return the error to raise: CircuitOpen, not Transient, if the circuit is open."""
        with self._lock:
            self._failures += 1
            is_closed = self._state is CircuitState.CLOSED
            if not is_closed and not is_probe:  # a call that started before the circuit opened
                return _copy_of(self._cause, max(self._open_until - time.monotonic(), 0.0))
            if is_closed and not isinstance(error, _REFUSALS) and self._failures < FAILURE_THRESHOLD:
                return error
            seconds = self._open_seconds(error)
            self._open(error, seconds)
            return _copy_of(error, seconds)

    def _abandon_probe(self) -> None:
        """Let the next call be the probe. This probe ended with an unexpected error of the worker itself."""
        with self._lock:
            if self._state is CircuitState.HALF_OPEN:
                self._state = CircuitState.OPEN

    # The transitions. The caller holds the lock.

    def _close(self) -> None:
        self._state = CircuitState.CLOSED
        self._failures = 0
        self._openings = 0
        self._cause = _NO_CAUSE  # the previous cause would keep its traceback alive
        self._outage.log("", **self._labels)
        self._refusal.log("", **self._labels)

    def _open(self, cause: Transient | Misconfigured, seconds: float) -> None:
        self._state = CircuitState.OPEN
        self._openings += 1
        self._cause = cause
        self._open_until = time.monotonic() + seconds
        if not isinstance(cause, _REFUSALS):
            self._outage.log(str(cause), **self._labels)
        elif isinstance(cause, EndpointRefused):
            self._refusal.log(str(cause), **self._labels)

    def _half_open(self, now: float) -> None:
        self._state = CircuitState.HALF_OPEN
        self._probing_since = now

    def _open_seconds(self, cause: Transient | Misconfigured) -> float:
        """Return the number of seconds during which the circuit must stay open."""
        if isinstance(cause, _REFUSALS):
            return self._settings.park_retry_interval
        return max(cause.retry_after or 0.0, backoff(self._openings, max_backoff(self._settings.outage_hold)))

    def _stop(self, state: tenacity.RetryCallState) -> bool:
        """Return whether to stop retrying, because the next retry would exceed the timeout or the worker stops."""
        error = state.outcome.exception() if state.outcome else None
        timeout = THROTTLE_TIMEOUT if isinstance(error, Throttled) else self._settings.retry_timeout
        return (state.seconds_since_start or 0.0) + state.upcoming_sleep >= timeout or self._stopping.is_set()


def _copy_of(error: Transient | Misconfigured, seconds: float) -> Transient | Misconfigured:
    """Return an equivalent error. If threads raised the same object, it would collect the tracebacks of all of them."""
    if isinstance(error, Misconfigured):
        return type(error)(error.reason, seconds, todo=error.todo, lacks_scope=error.lacks_scope)
    if isinstance(error, EndpointRefused):
        return EndpointRefused(error.reason, seconds, todo=error.todo)
    return CircuitOpen(str(error), seconds)


def _is_worth_a_retry(error: BaseException) -> bool:
    return isinstance(error, Transient) and not isinstance(error, EndpointRefused | ResponseTooLarge)


_retry_delay = tenacity.wait_random_exponential(multiplier=0.2, max=5)


def _wait(state: tenacity.RetryCallState) -> float:
    """Return the delay before the next retry, in seconds."""
    error = state.outcome.exception() if state.outcome else None
    retry_after = error.retry_after if isinstance(error, Transient) else None
    return max(retry_after or 0.0, _retry_delay(state))
