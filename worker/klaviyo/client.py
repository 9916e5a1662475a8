"""The Klaviyo client: raw JSON over the connection pool of klaviyo-api.

klaviyo-api provides the host, the authentication and the connection pool. Its models are not used: they cost much CPU
and drop attributes that they do not know (docs/decisions/0002-raw-json-over-sdk-models.md).
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from http import HTTPStatus
from typing import TYPE_CHECKING, Protocol
from urllib.parse import unquote, urlsplit

import orjson
from klaviyo_api import KlaviyoAPI
from openapi_client.rest import RESTClientObject

from worker.errors import KlaviyoMisconfigured, Rejected, Transient
from worker.http import transport as http
from worker.http.service_client import ServiceClient
from worker.json_access import as_dict, as_dicts, as_text
from worker.klaviyo.rate_limits import RateLimiter
from worker.klaviyo.responses import decode_error, decode_success
from worker.model import Effect, Json
from worker.network import proxy_for

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from threading import Event

    import urllib3

    from worker.settings import Settings
    from worker.telemetry.state import RateLimitStatus

REVISION = "2026-07-15"  # the API revision of the request bodies; the SDK's revision changes with each release
MEDIA_TYPE = "application/vnd.api+json"
Body = Json | bytes | Callable[[], bytes] | None
MAX_PAGES = 1_000  # of a list
NEUTRAL_ID = "klaviyo-worker-neutral"  # no catalog entry, profile or job can have this id
# One of these accepts a neutral request if Klaviyo accepts the key, whichever scopes the key has.
NEUTRAL_ENDPOINTS = ("GET /api/catalog-items", "POST /api/events", "POST /api/profile-import")
_REFUSALS: Mapping[int, str] = {  # statuses that concern the key, its scopes or the API revision -> what to do
    HTTPStatus.UNAUTHORIZED: "check KLAVIYO_AUTH_KEY",
    HTTPStatus.FORBIDDEN: "check KLAVIYO_AUTH_KEY and its scopes",
    HTTPStatus.METHOD_NOT_ALLOWED: "check KLAVIYO_API_URL",
    HTTPStatus.GONE: "check KLAVIYO_API_URL",
}
_ID = re.compile(r"^(\w+ /api/[^/]+)/[^/]+")


class KlaviyoClient(Protocol):
    """The part of Klaviyo's HTTP API that the send stage uses. The class `Klaviyo` and fakes in tests implement it."""

    def call(self, method: str, path: str, body: Body = None, *, idempotent: bool = True) -> Json:
        """Send a request with retries and return the decoded response. Raises WorkerError.

        `body` is a JSON object, encoded JSON, or a function that returns encoded JSON. The function is called before
        every request, when the rate limiter has granted the request. If `idempotent` is False, a request with an
        unknown result is not repeated.
        """

    def requests_sent(self) -> int:
        """Return the number of requests that the calling thread has sent."""


class Klaviyo(ServiceClient):
    """Klaviyo's HTTP API. Safe for many threads."""

    possessive, url_setting = "Klaviyo's", "KLAVIYO_API_URL"

    def __init__(self, settings: Settings, stopping: Event, observe: http.Observe = http.unobserved) -> None:
        key = settings.klaviyo_auth_key.get_secret_value()
        sdk = KlaviyoAPI(key, max_retries=1, test_host=settings.klaviyo_api_url)
        configuration = sdk.api_client.configuration
        configuration.connection_pool_maxsize = len(Effect) * settings.max_requests + settings.threads
        if proxy := proxy_for(settings.klaviyo_api_url, os.environ):
            configuration.proxy, configuration.proxy_headers = proxy.url, dict(proxy.headers)
        pool: urllib3.PoolManager = RESTClientObject(configuration).pool_manager
        super().__init__("klaviyo", http.Transport(pool, settings, observe), NEUTRAL_ENDPOINTS, settings, stopping)
        self._rate_limiter = RateLimiter(settings.rate_limit_share, stopping)
        self._host: str = configuration.host
        self._headers = {
            "User-Agent": "klaviyo-worker",
            "Accept": MEDIA_TYPE,
            "Content-Type": MEDIA_TYPE,
            "revision": REVISION,
            "Authorization": configuration.auth_settings()["Klaviyo-API-Key"]["value"],
        }

    def call(self, method: str, path: str, body: Body = None, *, idempotent: bool = True) -> Json:
        """Send a request with retries and return the decoded response. See KlaviyoClient for the parameters.

        Raises Transient, Rejected (with the status) or KlaviyoMisconfigured.
        """
        content = orjson.dumps(body) if isinstance(body, dict) else body
        endpoint = endpoint_of(method, path)
        breaker = self._breakers[endpoint]
        return (breaker if idempotent else breaker.call_once)(self._call, endpoint, path, content)

    def requests_sent(self) -> int:
        """Return the number of requests that the calling thread has sent."""
        return self._transport.requests_sent

    def rate_limit_status(self) -> Mapping[str, RateLimitStatus]:
        """Return the status of the rate limits, by endpoint."""
        return self._rate_limiter.statuses()

    def background(self) -> KlaviyoClient:
        """Return a client for requests that give way to others: they use only a part of the rate limits."""
        return _BackgroundClient(self, self._rate_limiter)

    def _call(self, endpoint: str, path: str, content: bytes | Callable[[], bytes] | None) -> Json:
        response = self._send(endpoint, path, content)
        document = decode_success(endpoint, response)
        if document is not None:
            return document
        error = decode_error(response)
        if error is None:
            raise self._blocked_or_foreign(endpoint, response)
        what = f"Klaviyo answered {response.status} to {endpoint}"
        if todo := _REFUSALS.get(response.status):
            lacks_scope = response.status == HTTPStatus.FORBIDDEN
            raise self._refusal(endpoint, KlaviyoMisconfigured(what, todo=todo, lacks_scope=lacks_scope), todo)
        raise _rejection(what, response.status, error)

    def _send(self, endpoint: str, path: str, content: bytes | Callable[[], bytes] | None) -> http.Response:
        """Send one request when the rate limiter grants it. Raises Transient."""
        self._rate_limiter.acquire(endpoint)
        content = content() if callable(content) else content
        method = endpoint.partition(" ")[0]
        response = self._transport.request(endpoint, method, self._host + path, self._headers, content)
        self._rate_limiter.update(endpoint, response.status, response.headers, http.retry_after(response.headers))
        http.raise_for_transient(response)
        return response

    def _accepts(self, endpoint: str) -> bool:
        """Return whether Klaviyo does not refuse a neutral request to an endpoint. Raises Transient.

        It contains an empty document, which Klaviyo never accepts, and the id of nothing.
        """
        method, path = endpoint.split(" ")
        query = "" if "{id}" in path or method != "GET" else "?page%5Bsize%5D=1"
        content = b"{}" if method in {"POST", "PATCH"} else None
        response = self._send(endpoint, path.replace("{id}", NEUTRAL_ID) + query, content)
        if decode_success(endpoint, response) is None and decode_error(response) is None:
            raise self._foreign_response(response)
        return response.status not in _REFUSALS


class _BackgroundClient:
    """A client whose requests give way to those of another client. Safe for many threads."""

    def __init__(self, client: KlaviyoClient, rate_limiter: RateLimiter) -> None:
        self._client = client
        self._rate_limiter = rate_limiter

    def call(self, method: str, path: str, body: Body = None, *, idempotent: bool = True) -> Json:
        """Send a request as the other client does, but wait first until the part of the rate limits allows it."""
        self._rate_limiter.acquire(endpoint_of(method, path), background=True)
        return self._client.call(method, path, body, idempotent=idempotent)

    def requests_sent(self) -> int:
        """Return the number of requests that the calling thread has sent."""
        return self._client.requests_sent()


def endpoint_of(method: str, path: str) -> str:
    """Return the endpoint, like `PATCH /api/catalog-items/{id}`.

    Each endpoint has its own rate limits, circuit breaker and metrics.
    """
    return _ID.sub(r"\1/{id}", f"{method} {path.partition('?')[0]}")


def _rejection(what: str, status: int, error: Json) -> Rejected:
    """Return the error for a rejected record. Klaviyo's `detail` is omitted, because it can quote the record."""
    pointer = as_text(as_dict(error.get("source")).get("pointer"))[:200]
    duplicate = as_text(as_dict(error.get("meta")).get("duplicate_profile_id"))
    return Rejected(f"{what}: {_reason(error, pointer)}", status, duplicate, pointer)


def _reason(error: Json, pointer: str) -> str:
    """Return the reason of a rejection: `Invalid input (invalid) at /data/attributes/email`."""
    title = as_text(error.get("title"))[:100].rstrip(".")
    code = as_text(error.get("code"))[:100]
    reason = f"{title} ({code})" if title and code else title or code or "no reason given"
    return f"{reason} at {pointer}" if pointer else reason


def iter_resources(client: KlaviyoClient, path: str) -> Iterator[Json]:
    """Yield the resources of all pages of a list. Raises as iter_pages does."""
    for page in iter_pages(client, path):
        yield from as_dicts(page.get("data"))


def iter_pages(client: KlaviyoClient, path: str) -> Iterator[Json]:
    """Yield the pages of a list. Raises WorkerError.

    Raises Transient if the link to the next page names another list, or if there are more than MAX_PAGES pages.
    """
    own_path = path.partition("?")[0]
    for _ in range(MAX_PAGES):
        page = client.call("GET", path)
        yield page
        next_url = as_text(as_dict(page.get("links")).get("next"))
        if not next_url:
            return
        following = urlsplit(next_url)
        if not unquote(following.path).endswith(unquote(own_path)):
            raise Transient(f"Klaviyo's link to the next page of {endpoint_of('GET', path)} names another list")
        path = f"{own_path}?{following.query}"
    raise Transient(f"Klaviyo's list {endpoint_of('GET', path)} has more than {MAX_PAGES} pages")
