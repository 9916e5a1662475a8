"""The commercetools client: raw JSON with chunked `id in (...)` queries.

The SDK is used only to fetch the token. Its typed models cost much CPU and fail on values that are newer than the SDK:
docs/decisions/0002-raw-json-over-sdk-models.md.
"""

from __future__ import annotations

import math
from http import HTTPStatus
from typing import TYPE_CHECKING
from urllib.parse import quote

import orjson

from adapters.shared.chunks import chunked
from worker.commercetools.page_sizes import MAX_PAGE_SIZE, PageSizes
from worker.commercetools.queries import Query, QueryResult, group_by_value, is_unique, trim
from worker.commercetools.responses import TRANSIENT_CODES, decode_error, decode_page, is_own
from worker.commercetools.token import AccessToken
from worker.errors import (
    CommercetoolsMisconfigured,
    Rejected,
    RequestBlocked,
    ResponseTooLarge,
    Transient,
    WorkerError,
)
from worker.http import transport as http
from worker.http.service_client import ServiceClient
from worker.json_access import as_dicts, as_int, as_text

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping
    from threading import Event

    from worker.model import Json
    from worker.settings import CommercetoolsSettings

# Of the answer to a query for some values; decoded, it takes several times this memory. commercetools limits a resource
# to 16 MB: https://docs.commercetools.com/api/limits
MAX_QUERY_BYTES = 20_000_000
MAX_CONCURRENT_QUERIES = 8  # in addition to one per lane
MAX_WHERE_BYTES = 6_000  # percent-encoded; commercetools' load balancers accept URIs of up to 8 KB
# One of these accepts a neutral request if commercetools accepts the API client, whichever scopes it has.
NEUTRAL_ENDPOINTS = ("orders", "customers", "product-projections")
_NEUTRAL = "limit=0&withTotal=false"  # the parameters of a query that depends on no message
_SCOPE_ADVICE = "check CT_API_URL, CT_PROJECT_ID, CT_API_CLIENT and its scopes"
_REFUSALS: Mapping[int, str] = {  # status -> what to do if all endpoints refuse the worker
    HTTPStatus.UNAUTHORIZED: "check that CT_API_URL and CT_AUTH_URL are in the same region",
    HTTPStatus.FORBIDDEN: _SCOPE_ADVICE,
    HTTPStatus.NOT_FOUND: "check CT_PROJECT_ID, and that CT_API_URL is in the region of this project",
}


class Commercetools(ServiceClient):
    """A Reader over commercetools' HTTP API. Safe for many threads."""

    possessive, url_setting = "commercetools'", "CT_API_URL"

    def __init__(
        self, settings: CommercetoolsSettings, stopping: Event, observe: http.Observe = http.unobserved
    ) -> None:
        self._token = AccessToken(settings, observe)
        self._url = f"{settings.ct_api_url}/{quote(settings.ct_project_id, safe='')}"
        transport = http.Transport(http.pool(self._url, settings.threads + MAX_CONCURRENT_QUERIES), settings, observe)
        super().__init__("commercetools", transport, NEUTRAL_ENDPOINTS, settings, stopping)
        self._page_sizes = PageSizes()

    def find(self, query: Query, values: Collection[str]) -> QueryResult:
        """Find the resources with chunked queries. If a query fails, only the values in its chunk have an error."""
        found: QueryResult = {}
        remaining = sorted(values)
        while remaining:
            chunk = next(_chunks(remaining, query, self._page_sizes.next_size(query) if is_unique(query) else math.inf))
            found |= self._find_chunk(query, chunk)
            remaining = remaining[len(chunk) :]
        return found

    def call(self, endpoint: str, method: str, path: str = "", body: Json | None = None) -> http.Response:
        """Send a request to `endpoint` + `path` and return commercetools' response with a status of 2xx or 4xx.

        If the result is unknown, only a GET request is repeated. Raises Transient, and CommercetoolsMisconfigured if
        commercetools refuses a token.
        """
        breaker = self._breakers[endpoint]
        content = None if body is None else orjson.dumps(body)
        request = breaker if method == "GET" else breaker.call_once
        return request(self._request_own, endpoint, method, f"{self._url}/{endpoint}{path}", content)

    def get_public(self, endpoint: str, path: str) -> http.Response:
        """Send one request without a token and return the response with any status. Raises Transient."""
        return self._request(endpoint, "GET", f"{self._url}/{endpoint}{path}")

    def _find_chunk(self, query: Query, chunk: list[str]) -> QueryResult:
        """Query one chunk. If it is rejected, blocked or too large, halve it to isolate the value at fault."""
        try:
            return group_by_value(query, chunk, self._all_pages(query, chunk))
        except (Rejected, RequestBlocked, ResponseTooLarge) as error:
            if len(chunk) == 1:
                return {chunk[0]: error}
            if isinstance(error, ResponseTooLarge):
                self._page_sizes.halve(query, len(chunk))
            middle = len(chunk) // 2
            return self._find_chunk(query, chunk[:middle]) | self._find_chunk(query, chunk[middle:])
        except WorkerError as error:
            return dict.fromkeys(chunk, error)

    def page(self, query: Query, where: str = "", after: str = "") -> list[Json]:
        """Return the first resources with ids greater than `after`, in order of id. Raises WorkerError.

        Return [] only if there are none.
        """
        page, _ = self._page(query, where, after)
        return page

    def count(self, query: Query, where: str = "", after: str = "") -> int:
        """Return the number of resources on all pages. Raises WorkerError."""
        return as_int(self._breakers[query.path](self._get, query, where, after, "limit=0").get("total")) or 0

    def _all_pages(self, query: Query, chunk: list[str]) -> list[Json]:
        """Return the resources of all pages, or of the first ones if the query has `max_resources`.

        If each value has at most one resource, the first page has all of them. Each page starts after the last id.
        Offsets are not used: they are limited, and they skip resources during concurrent writes.
        """
        where = _where(query, chunk)
        if is_unique(query):
            return self._read(query, where, "", MAX_PAGE_SIZE)
        results: list[Json] = []
        after = ""
        while True:
            page, size = self._page(query, where, after)
            results += page
            is_enough = 0 < query.max_resources <= len(results)
            if len(page) < size or is_enough:
                return results
            last = as_text(page[-1].get("id"))
            if last <= after:
                raise Transient(f"commercetools answered for {query.path} with the same page again")
            after = last

    def _page(self, query: Query, where: str, after: str) -> tuple[list[Json], int]:
        """Return the resources of a page, and the number that was requested. A page that is too large is halved."""
        while True:
            size = self._page_sizes.next_size(query)
            try:
                return self._read(query, where, after, size), size
            except ResponseTooLarge:
                if size == 1:
                    raise
                self._page_sizes.halve(query, size)

    def _read(self, query: Query, where: str, after: str, size: int) -> list[Json]:
        parameters = f"limit={size}&sort=id%20asc&withTotal=false"
        document = self._breakers[query.path](self._get, query, where, after, parameters)
        return [trim(query, resource) for resource in as_dicts(document["results"])]

    def _get(self, query: Query, where: str, after: str, parameters: str) -> Json:
        later = f"id > {_quoted(after)}" if after else ""
        if predicate := f"({where}) and ({later})" if where and later else where or later:
            parameters += f"&where={quote(predicate)}"
        parameters += "".join(f"&expand={quote(path)}" for path in query.expand)
        response = self._query(query.path, parameters)
        if len(response.body) > MAX_QUERY_BYTES:
            raise ResponseTooLarge(f"commercetools answered for {query.path} with more than {MAX_QUERY_BYTES:,} bytes")
        document = decode_page(response)
        if document is None:
            raise self._error_from(query.path, response)
        self._page_sizes.observe(query, len(response.body), len(document["results"]))
        return document

    def _query(self, path: str, parameters: str) -> http.Response:
        return self._request_with_token(path, "GET", f"{self._url}/{path}?{parameters}")

    def _error_from(self, path: str, response: http.Response) -> WorkerError:
        """Return the error for a query that did not succeed. Raises WorkerError."""
        code = decode_error(response)
        if code is None:  # this must not be taken for an empty list
            return self._blocked_or_foreign(path, response)
        what = f"commercetools answered {response.status} {code} for {path}"
        if code in TRANSIENT_CODES:
            return Transient(what, http.retry_after(response.headers))
        if not (todo := _REFUSALS.get(response.status)):
            return Rejected(what, response.status)
        lacks_scope = response.status == HTTPStatus.FORBIDDEN
        error = CommercetoolsMisconfigured(what, todo=todo, lacks_scope=lacks_scope)
        return self._refusal(path, error, _SCOPE_ADVICE)

    def _accepts(self, path: str) -> bool:
        """Return whether commercetools does not refuse a query that depends on no message. Raises WorkerError."""
        response = self._query(path, _NEUTRAL)
        if decode_page(response) is None and decode_error(response) is None:
            raise self._foreign_response(response)
        return response.status not in _REFUSALS

    def _request_own(self, endpoint: str, method: str, url: str, body: bytes | None) -> http.Response:
        response = self._request_with_token(endpoint, method, url, body)
        if not is_own(response):
            raise self._foreign_response(response)
        return response

    def _request_with_token(self, endpoint: str, method: str, url: str, body: bytes | None = None) -> http.Response:
        token = self._token.get()
        response = self._request(endpoint, method, url, body, token)
        if response.status == HTTPStatus.UNAUTHORIZED:  # the token was revoked before its expiry
            response = self._request(endpoint, method, url, body, self._token.replace(token))
        http.raise_for_transient(response)
        return response

    def _request(
        self, endpoint: str, method: str, url: str, body: bytes | None = None, token: str = ""
    ) -> http.Response:
        headers = {"Accept-Encoding": "gzip", "User-Agent": "klaviyo-worker"}
        if token:
            headers["Authorization"] = f"Bearer {token}"
        if body is not None:
            headers["Content-Type"] = "application/json"
        return self._transport.request(endpoint, method, url, headers, body)


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"')


def _quoted(value: str) -> str:
    return f'"{_escaped(value)}"'


def _where(query: Query, values: list[str]) -> str:
    # str.format is not used, because a value can contain braces.
    joined = ",".join(map(_quoted, values))
    return query.predicate.replace("{0}", "{}").replace("{}", joined)


def _chunks(values: list[str], query: Query, max_values: float = math.inf) -> Iterator[list[str]]:
    """Split values so that each query has at most `max_values`, of at most MAX_WHERE_BYTES when encoded."""
    repeats = query.predicate.count("{")
    around = len(quote(',""'))
    # quote is fast if it has nothing to encode.
    return chunked(values, lambda value: repeats * (len(quote(_escaped(value))) + around), MAX_WHERE_BYTES, max_values)
