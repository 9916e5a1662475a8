"""One HTTP request, and the retries both clients share. Network faults and retryable statuses become Transient."""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar
from urllib.parse import urlsplit

import orjson
import tenacity
import urllib3
from requests.utils import get_environ_proxies

from worker.errors import Transient

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from threading import Event

MULTIPLE_CHOICES, REQUEST_TIMEOUT, TOO_EARLY, TOO_MANY_REQUESTS, INTERNAL_SERVER_ERROR = 300, 408, 425, 429, 500
MAX_RETRY_AFTER = 3600.0

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Response:
    """An answer, whatever its status."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:
        """Return the decoded body; None when it is no JSON."""
        try:
            return orjson.loads(self.body)
        except orjson.JSONDecodeError:
            return None


def pool(url: str, size: int) -> urllib3.PoolManager:
    """Return a connection pool for `size` threads that verifies TLS and goes through the environment's proxy."""
    proxy = proxy_for(url)
    if proxy:
        return urllib3.ProxyManager(proxy, maxsize=size, cert_reqs="CERT_REQUIRED")
    return urllib3.PoolManager(maxsize=size, cert_reqs="CERT_REQUIRED")


def proxy_for(url: str) -> str | None:
    """Return the proxy that HTTPS_PROXY and NO_PROXY ask for, or None."""
    proxies: dict[str, str] = get_environ_proxies(url)
    return proxies.get(urlsplit(url).scheme)


def request(
    pool: urllib3.PoolManager,
    method: str,
    url: str,
    *,
    headers: Mapping[str, str],
    timeout: urllib3.Timeout,
    body: bytes | None = None,
) -> Response:
    """Send one request and read the whole answer. Raises Transient when that fails or should be tried again.

    Texts name host and path only: a query may hold what belongs to a person.
    """
    target = urlsplit(url)
    what = f"{method} {target.netloc}{target.path}"
    try:
        answer = pool.request(
            method, url, body=body, headers=dict(headers), timeout=timeout, retries=False, redirect=False
        )
    except urllib3.exceptions.HTTPError as error:
        raise Transient(f"no answer to {what}: {type(error).__name__}") from None
    response = Response(answer.status, answer.headers, answer.data)
    if passes(response.status):
        raise Transient(f"{response.status} to {what}", retry_after(response.headers))
    if response.status < MULTIPLE_CHOICES and response.body and response.json() is None:
        raise Transient(f"{response.status} to {what} with something that is no JSON")  # a maintenance page, a proxy
    return response


def passes(status: int) -> bool:
    """Tell whether a status is about the moment, not about the request; proxies have 5xx of their own."""
    return status >= INTERNAL_SERVER_ERROR or status in {REQUEST_TIMEOUT, TOO_EARLY, TOO_MANY_REQUESTS}


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Return the Retry-After header in seconds (a number or an HTTP date), or None."""
    value = headers.get("Retry-After", "")
    try:
        seconds = float(value) if not value.endswith("GMT") else _until(value)
    except ValueError:
        return None
    return min(max(seconds, 0.0), MAX_RETRY_AFTER) if math.isfinite(seconds) else None


def _until(http_date: str) -> float:
    return (parsedate_to_datetime(http_date) - datetime.now(UTC)).total_seconds()


class Retry:
    """Calls again what raised Transient, for about `seconds`, and no longer once `stopping`.

    Waits grow from 0.2 s with full jitter. Retry-After is obeyed; when it reaches beyond `seconds` the error is
    raised at once, for the queue to wait instead. Once a call gave up, the others are tried only once until one
    succeeds: in an outage a batch of hundreds of calls must not take hundreds of times `seconds`.
    """

    def __init__(self, seconds: float, stopping: Event) -> None:
        self._gave_up = False
        self._retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(Transient),
            stop=tenacity.stop_before_delay(seconds) | tenacity.stop_when_event_set(stopping),
            wait=_wait,
            sleep=tenacity.sleep_using_event(stopping),
            reraise=True,
        )

    def __call__(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call `function` until it returns. Raises its last Transient, or at once whatever else it raises."""
        try:
            result = function(*args, **kwargs) if self._gave_up else self._retrying(function, *args, **kwargs)
        except Transient:
            self._gave_up = True
            raise
        self._gave_up = False
        return result


_backoff = tenacity.wait_random_exponential(multiplier=0.2, max=5)


def _wait(state: tenacity.RetryCallState) -> float:
    error = state.outcome.exception() if state.outcome else None
    asked = error.retry_after if isinstance(error, Transient) else None
    return max(asked or 0.0, _backoff(state))
