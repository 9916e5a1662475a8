"""HTTP requests for the commercetools client and the Klaviyo client.

Network errors and transient statuses are raised as Transient.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from threading import local
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import orjson
import urllib3

from worker.errors import Throttled, Transient
from worker.http.clock import Clock, parse_date
from worker.http.connection_errors import connection_error
from worker.network import proxy_for

if TYPE_CHECKING:
    from collections.abc import Mapping

    from worker.settings import CommercetoolsSettings

MAX_RETRY_AFTER = 3600.0  # seconds
BODY_TIMEOUT_FACTOR = 10  # a whole body can take this number of read timeouts; one applies between two packets
CHUNK_SIZE = 65_536  # bytes
_TRANSIENT = frozenset({HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_EARLY, HTTPStatus.TOO_MANY_REQUESTS})
_SECONDS = re.compile("[0-9]+")
_ID = re.compile(r"^(/api/[^/]+)/[^/]+")  # in Klaviyo's paths

Observe = Callable[[str, int | None, float], None]  # called with endpoint, status (None: no response) and seconds


def unobserved(endpoint: str, status: int | None, seconds: float) -> None:
    """Ignore the request."""


@dataclass(frozen=True, slots=True)
class Response:
    """A complete response with any status."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    target: str  # method, host and path, without ids

    def json(self) -> Any:
        """Return the decoded body, or None if it is not JSON."""
        try:
            return orjson.loads(self.body)
        except orjson.JSONDecodeError:
            return None


def pool(url: str, size: int) -> urllib3.PoolManager:
    """Return a connection pool for `size` threads. It verifies TLS and uses the proxy that the environment names."""
    proxy = proxy_for(url, os.environ)
    if proxy:
        headers = dict(proxy.headers)
        return urllib3.ProxyManager(proxy.url, maxsize=size, proxy_headers=headers, cert_reqs="CERT_REQUIRED")
    return urllib3.PoolManager(maxsize=size, cert_reqs="CERT_REQUIRED")


class Transport:
    """Sends requests and reads complete responses. Safe for many threads."""

    def __init__(self, pool: urllib3.PoolManager, settings: CommercetoolsSettings, observe: Observe) -> None:
        self._pool = pool
        self._timeout = urllib3.Timeout(connect=settings.connect_timeout, read=settings.read_timeout)
        self._read_timeout = settings.read_timeout
        self._observe = observe
        self._thread = local()
        self.clock = Clock()  # of the service

    @property
    def requests_sent(self) -> int:
        """Return the number of requests that the calling thread has sent."""
        return getattr(self._thread, "requests_sent", 0)

    def request(
        self, endpoint: str, method: str, url: str, headers: Mapping[str, str], body: bytes | None = None
    ) -> Response:
        """Send one request and return its response.

        Raises Transient if there is no complete response, and ProxyMisconfigured if the proxy refuses its credentials.
        """
        self._thread.requests_sent = self.requests_sent + 1
        start = time.monotonic()
        status = None
        try:
            response = self._pool.request(
                method,
                url,
                body=body,
                headers=dict(headers),
                timeout=self._timeout,
                retries=False,
                redirect=False,
                preload_content=False,
            )
            content = _read(response, start + BODY_TIMEOUT_FACTOR * self._read_timeout)
            status = response.status
            self.clock.update(response.headers)
        except urllib3.exceptions.HTTPError as error:
            raise connection_error(error, url, f"no response to {_target(method, url)}") from None
        finally:
            self._observe(endpoint, status, time.monotonic() - start)
        return Response(response.status, response.headers, content, _target(method, url))


def _read(response: urllib3.BaseHTTPResponse, deadline: float) -> bytes:
    """Return the body. Raises TimeoutError after `deadline` (monotonic seconds): slow servers must not block a lane."""
    parts = []
    while part := response.read1(CHUNK_SIZE):
        parts.append(part)
        if time.monotonic() > deadline:
            response.close()
            raise urllib3.exceptions.TimeoutError
    return b"".join(parts)


def _target(method: str, url: str) -> str:
    """Return method, host and path, without query and ids.

    A query can contain personal data. An id would make every reason of an outage unique.
    """
    target = urlsplit(url)
    path = _ID.sub(r"\1/{id}", target.path)
    return f"{method} {target.netloc}{path}"


def raise_for_transient(response: Response) -> None:
    """Raise Transient or Throttled if the same request can succeed later."""
    status = response.status
    if status == HTTPStatus.TOO_MANY_REQUESTS:
        raise Throttled(f"{status} to {response.target}", retry_after(response.headers))
    if is_transient(status):
        raise Transient(f"{status} to {response.target}", retry_after(response.headers))
    if status < HTTPStatus.MULTIPLE_CHOICES and response.body and response.json() is None:  # a page of a proxy
        raise Transient(f"{status} to {response.target} with a body that is not JSON")


def is_transient(status: int) -> bool:
    """Return whether the same request can succeed later. Proxies use 5xx statuses of their own, so all 5xx count."""
    return status >= HTTPStatus.INTERNAL_SERVER_ERROR or status in _TRANSIENT


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Return the Retry-After header in seconds, or None if it is missing or invalid. It is a number or an HTTP date."""
    value = headers.get("Retry-After", "").strip()
    if _SECONDS.fullmatch(value):
        return min(float(value), MAX_RETRY_AFTER)
    date = parse_date(value)
    return None if date is None else min(max(date.timestamp() - time.time(), 0.0), MAX_RETRY_AFTER)
