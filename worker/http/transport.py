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

from worker.errors import ResponseTooLarge, Throttled, Transient
from worker.http.clock import Clock, parse_date
from worker.http.connection_errors import connection_error
from worker.json_access import loads
from worker.network import proxy_for

if TYPE_CHECKING:
    from collections.abc import Mapping

    from worker.settings import CommercetoolsSettings

MAX_RETRY_AFTER = 3600.0  # seconds
BODY_TIMEOUT_FACTOR = 10  # a whole body can take this number of read timeouts; one applies between two packets
CHUNK_SIZE = 65_536  # bytes
MAX_BODY_BYTES = 64_000_000  # decoded; a page of 500 large products has about 30 MB
_TRANSIENT = frozenset({HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_EARLY, HTTPStatus.TOO_MANY_REQUESTS})
_NO_CONNECTION = (
    urllib3.exceptions.NewConnectionError,
    urllib3.exceptions.ConnectTimeoutError,
    urllib3.exceptions.ProxyError,
)
_SECONDS = re.compile(r"[0-9]{1,9}(\.[0-9]+)?")
_MEDIA_TYPE = re.compile(r"[\w.+-]{1,40}/[\w.+-]{1,40}", re.ASCII)
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
            return loads(self.body)
        except orjson.JSONDecodeError:
            return None

    def __str__(self) -> str:
        """Describe the response without its content: `403 with text/html to GET api.example/orders`."""
        media_type = _MEDIA_TYPE.match(self.headers.get("Content-Type", ""))
        content = "an empty body" if not self.body else media_type[0] if media_type else "an unknown content type"
        return f"{self.status} with {content} to {self.target}"


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
        """Send one request and return its response. A request without a connection counts as not sent.

        Raises Transient if there is no complete response, ResponseTooLarge if it has more than MAX_BODY_BYTES, and
        ProxyMisconfigured if the proxy refuses its credentials.
        """
        self._thread.requests_sent = self.requests_sent + 1
        start = time.monotonic()
        status = None
        try:
            response = self._send(method, url, dict(headers), body)
            content = _read(response, _target(method, url), start + BODY_TIMEOUT_FACTOR * self._read_timeout)
            status = response.status
            self.clock.update(response.headers)
        except urllib3.exceptions.HTTPError as error:
            if isinstance(error, _NO_CONNECTION):
                self._thread.requests_sent -= 1
            raise connection_error(error, url, f"no response to {_target(method, url)}") from None
        finally:
            self._observe(endpoint, status, time.monotonic() - start)
        return Response(response.status, response.headers, content, _target(method, url))

    def _send(self, method: str, url: str, headers: dict[str, str], body: bytes | None) -> urllib3.BaseHTTPResponse:
        """Send a request over a connection of the pool.

        PoolManager.request would do the same, but it encodes the long URL of a query a third time. No proxy needs the
        whole URL: see proxy_for.
        """
        parts = urlsplit(url)
        pool = self._pool.connection_from_host(parts.hostname, parts.port, parts.scheme)
        return pool.urlopen(
            method,
            url[url.index(parts.netloc) + len(parts.netloc) :],
            body=body,
            headers=headers,
            timeout=self._timeout,
            retries=False,
            redirect=False,
            assert_same_host=False,
            preload_content=False,
        )


def _read(response: urllib3.BaseHTTPResponse, target: str, deadline: float) -> bytes:
    """Return the decoded body.

    Raises TimeoutError after `deadline` (monotonic seconds), because slow servers must not block a lane. Raises
    ResponseTooLarge after MAX_BODY_BYTES.
    """
    parts = []
    size = 0
    while part := response.read1(CHUNK_SIZE):
        parts.append(part)
        size += len(part)
        if size > MAX_BODY_BYTES:
            response.close()
            raise ResponseTooLarge(f"the response to {target} has more than {MAX_BODY_BYTES:,} bytes")
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
    """Raise Transient or Throttled if the same request can succeed later.

    Proxies use 5xx statuses of their own, so all 5xx statuses count.
    """
    status = response.status
    if status == HTTPStatus.TOO_MANY_REQUESTS:
        raise Throttled(f"{status} to {response.target}", retry_after(response.headers))
    if status >= HTTPStatus.INTERNAL_SERVER_ERROR or status in _TRANSIENT:
        raise Transient(f"{status} to {response.target}", retry_after(response.headers))


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Return the Retry-After header in seconds, or None if it is missing or invalid. It is a number or an HTTP date."""
    value = headers.get("Retry-After", "").strip()
    if _SECONDS.fullmatch(value):
        return min(float(value), MAX_RETRY_AFTER)
    date = parse_date(value)
    return None if date is None else min(max(date.timestamp() - time.time(), 0.0), MAX_RETRY_AFTER)
