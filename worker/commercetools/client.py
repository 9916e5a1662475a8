"""The commercetools client: raw JSON with chunked `id in (...)` queries.

The SDK is used only to fetch the token. Its typed models cost much CPU and fail on values that are newer than the SDK:
docs/decisions/0002-raw-json-over-sdk-models.md.
"""

from __future__ import annotations

import math
from http import HTTPStatus
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import orjson

from worker.commercetools.queries import Query, QueryResult, group_by_value
from worker.commercetools.token import AccessToken
from worker.errors import CommercetoolsMisconfigured, Rejected, Transient, WorkerError
from worker.http import transport as http
from worker.http.chunks import chunked
from worker.http.circuit_breaker import CircuitBreakers
from worker.json_access import as_dict, as_dicts, as_int, as_text

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator
    from threading import Event

    from worker.model import Json
    from worker.settings import CommercetoolsSettings

PAGE_SIZE = 500  # the maximum that commercetools allows
MAX_WHERE_BYTES = 6_000  # percent-encoded; commercetools' load balancers accept URIs of up to 8 KB
_ADVICE: dict[int, str] = {
    HTTPStatus.UNAUTHORIZED: "check that CT_API_URL and CT_AUTH_URL are in the same region",
    HTTPStatus.NOT_FOUND: "check CT_PROJECT_ID, and that CT_API_URL is in the region of this project",
}


class Commercetools:
    """A Reader over commercetools' HTTP API. Safe for many threads."""

    def __init__(
        self, settings: CommercetoolsSettings, stopping: Event, observe: http.Observe = http.unobserved
    ) -> None:
        self._token = AccessToken(settings, observe)
        self._url = f"{settings.ct_api_url}/{quote(settings.ct_project_id, safe='')}"
        self._breakers = CircuitBreakers("commercetools", settings, stopping)
        self._transport = http.Transport(http.pool(self._url, settings.threads), settings, observe)

    def find(self, query: Query, values: Collection[str]) -> QueryResult:
        """Find the resources with chunked queries. If a query fails, only the values in its chunk have an error."""
        found: QueryResult = {}
        for chunk in _chunks(sorted(values), query):
            found |= self._find_chunk(query, chunk)
        return found

    def outage_reason(self) -> str:
        """Return why a circuit is open, or "" if commercetools has no outage."""
        return self._breakers.outage_reason()

    def clock_offset(self) -> float:
        """Return how far the clock of commercetools is ahead of this machine's, in seconds; 0 if unknown."""
        return self._transport.clock.offset

    def call(self, endpoint: str, method: str, path: str = "", body: Json | None = None) -> http.Response:
        """Send a request to `endpoint` + `path` and return the response. A response with status 4xx is returned, too.

        If the result is unknown, only a GET request is repeated. Raises Transient, and CommercetoolsMisconfigured if
        commercetools refuses a token.
        """
        breaker = self._breakers[endpoint]
        content = None if body is None else orjson.dumps(body)
        request = breaker if method == "GET" else breaker.call_once
        return request(self._request_with_token, endpoint, method, f"{self._url}/{endpoint}{path}", content)

    def get_public(self, endpoint: str, path: str) -> http.Response:
        """Send one request without a token and return the response with any status. Raises Transient."""
        return self._request(endpoint, "GET", f"{self._url}/{endpoint}{path}")

    def _find_chunk(self, query: Query, chunk: list[str]) -> QueryResult:
        """Query one chunk. If commercetools rejects the query (400), halve the chunk to isolate the invalid value."""
        try:
            return group_by_value(query, chunk, self._all_pages(query, chunk))
        except Rejected as error:
            if len(chunk) == 1:
                return {chunk[0]: error}
            middle = len(chunk) // 2
            return self._find_chunk(query, chunk[:middle]) | self._find_chunk(query, chunk[middle:])
        except WorkerError as error:
            return dict.fromkeys(chunk, error)

    def page(self, query: Query, where: str = "", after: str = "") -> list[Json]:
        """Return the first PAGE_SIZE resources with ids greater than `after`, in order of id. Raises WorkerError."""
        parameters = f"limit={PAGE_SIZE}&sort=id%20asc&withTotal=false"
        document = self._breakers[query.path](self._get, query, where, after, parameters)
        return as_dicts(document["results"])

    def count(self, query: Query, where: str = "", after: str = "") -> int:
        """Return the number of resources on all pages. Raises WorkerError."""
        return as_int(self._breakers[query.path](self._get, query, where, after, "limit=0").get("total")) or 0

    def _all_pages(self, query: Query, chunk: list[str]) -> list[Json]:
        """Return the resources of all pages.

        Each page starts after the last id. Offsets are not used: they are limited, and they skip resources during
        concurrent writes.
        """
        results: list[Json] = []
        after = ""
        while True:
            page = self.page(query, _where(query, chunk), after)
            results += page
            if len(page) < PAGE_SIZE:
                return results
            after = as_text(page[-1].get("id"))

    def _get(self, query: Query, where: str, after: str, parameters: str) -> Json:
        parts = filter(None, (where, f"id > {_quoted(after)}" if after else ""))
        if predicate := " and ".join(f"({part})" for part in parts):
            parameters += f"&where={quote(predicate)}"
        parameters += "".join(f"&expand={quote(path)}" for path in query.expand)
        response = self._request_with_token(query.path, "GET", f"{self._url}/{query.path}?{parameters}")
        document = as_dict(_decode(response, query.path))
        if not isinstance(document.get("results"), list):  # this must not be taken for an empty list
            raise Transient(f"commercetools answered for {query.path} without results")
        return document

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


def _decode(response: http.Response, path: str) -> Any:
    """Return the decoded body of a response with status 200. Raises an error for any other status."""
    if response.status == HTTPStatus.OK:
        return response.json()
    error = next(iter(as_dicts(as_dict(response.json()).get("errors"))), {})
    what = f"commercetools answered {response.status} {as_text(error.get('code'))[:64]} for {path}"
    if advice := _ADVICE.get(response.status):
        raise CommercetoolsMisconfigured(what, todo=advice)
    if response.status < HTTPStatus.BAD_REQUEST or response.status == HTTPStatus.FORBIDDEN:
        raise CommercetoolsMisconfigured(
            what, todo="check CT_API_URL, CT_PROJECT_ID, CT_API_CLIENT and its scopes", lacks_scope=True
        )
    raise Rejected(what, response.status)


def _quoted(value: str) -> str:
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _where(query: Query, values: list[str]) -> str:
    # str.format is not used, because a value can contain braces.
    joined = ",".join(map(_quoted, values))
    return query.predicate.replace("{0}", "{}").replace("{}", joined)


def _chunks(values: list[str], query: Query) -> Iterator[list[str]]:
    """Split values so that the values in each query's predicate take at most MAX_WHERE_BYTES when encoded."""
    repeats = query.predicate.count("{")
    return chunked(values, lambda value: repeats * len(quote(f",{_quoted(value)}")), MAX_WHERE_BYTES, math.inf)
