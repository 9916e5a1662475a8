"""One HTTP request, as both clients make it. Network faults and passing statuses become Transient."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from threading import local
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import orjson
import urllib3
from requests.utils import get_environ_proxies

from worker.errors import Throttled, Transient

if TYPE_CHECKING:
    from collections.abc import Mapping

    from worker.settings import CommercetoolsSettings

_TRANSIENT = frozenset({HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_EARLY, HTTPStatus.TOO_MANY_REQUESTS})
MAX_RETRY_AFTER = 3600.0
CHUNK = 65_536  # bytes read at once, at most
_ID = re.compile(r"^(/api/[^/]+)/[^/]+")  # in Klaviyo's paths
BODY_TIMEOUT_FACTOR = 10  # read timeouts that a whole answer may take: one is the time between two packets

Observe = Callable[[str, int | None, float], None]


def unobserved(endpoint: str, status: int | None, seconds: float) -> None:
    """Observe nothing."""


@dataclass(frozen=True, slots=True)
class Response:
    """An answer, whatever its status."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    target: str  # method, host and path, ids left out

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


class Transport:
    """Sends requests and reads whole answers. Safe for many threads.

    `observe` is told the endpoint, the status (None: no answer) and the seconds of each.
    """

    def __init__(self, pool: urllib3.PoolManager, settings: CommercetoolsSettings, observe: Observe) -> None:
        self._pool = pool
        self._timeout = urllib3.Timeout(connect=settings.connect_timeout, read=settings.read_timeout)
        self._read_timeout = settings.read_timeout
        self._observe = observe
        self._here = local()

    @property
    def requests_sent(self) -> int:
        """Return how many requests the calling thread has made."""
        return getattr(self._here, "requests_sent", 0)

    def request(
        self, endpoint: str, method: str, url: str, headers: Mapping[str, str], body: bytes | None = None
    ) -> Response:
        """Send one request. Raises Transient when there is no whole answer."""
        self._here.requests_sent = self.requests_sent + 1
        began = time.monotonic()
        status = None
        try:
            answer = self._pool.request(
                method,
                url,
                body=body,
                headers=dict(headers),
                timeout=self._timeout,
                retries=False,
                redirect=False,
                preload_content=False,
            )
            content = _read(answer, began + BODY_TIMEOUT_FACTOR * self._read_timeout)
            status = answer.status
        except urllib3.exceptions.HTTPError as error:
            raise Transient(f"no answer to {_target(method, url)}: {type(error).__name__}") from None
        finally:
            self._observe(endpoint, status, time.monotonic() - began)
        return Response(answer.status, answer.headers, content, _target(method, url))


def _read(answer: urllib3.BaseHTTPResponse, deadline: float) -> bytes:
    """Read a body, before `deadline` (monotonic seconds): a sender that dawdles must not keep a lane for ever."""
    parts = []
    while part := answer.read1(CHUNK):
        parts.append(part)
        if time.monotonic() > deadline:
            answer.close()
            raise urllib3.exceptions.TimeoutError
    return b"".join(parts)


def _target(method: str, url: str) -> str:
    """Name a request by host and path only: a query may hold what belongs to a person, and an outage is no record's."""
    target = urlsplit(url)
    path = _ID.sub(r"\1/{id}", target.path)
    return f"{method} {target.netloc}{path}"


def raise_for_transient(response: Response) -> None:
    """Raise Transient or Throttled when an answer says nothing about the request, only about the moment."""
    status = response.status
    if status == HTTPStatus.TOO_MANY_REQUESTS:
        raise Throttled(f"{status} to {response.target}", retry_after(response.headers))
    if is_transient(status):
        raise Transient(f"{status} to {response.target}", retry_after(response.headers))
    if (
        status < HTTPStatus.MULTIPLE_CHOICES and response.body and response.json() is None
    ):  # a maintenance page, a proxy
        raise Transient(f"{status} to {response.target} with something that is no JSON")


def is_transient(status: int) -> bool:
    """Tell whether a status is about the moment, not about the request; proxies have 5xx of their own."""
    return status >= HTTPStatus.INTERNAL_SERVER_ERROR or status in _TRANSIENT


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
