"""The responses of Klaviyo's endpoints: what a success is, and what an error document is.

Everything else is not Klaviyo's response: a proxy, a firewall or a maintenance page has answered. The statuses and
shapes are those of Klaviyo's OpenAPI document, revision 2026-07-15.
"""

from __future__ import annotations

import re
from enum import Enum
from functools import cache
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, NamedTuple

from worker.json_access import as_dict, as_dicts, as_text

if TYPE_CHECKING:
    from worker.http.transport import Response
    from worker.model import Json


class Shape(Enum):
    """The content of a successful response."""

    EMPTY = "empty"  # no body
    RESOURCE = "resource"  # a JSON:API document with one resource
    RESOURCES = "resources"  # a JSON:API document with a list of resources


class Success(NamedTuple):
    """The statuses and the content of an endpoint's successful responses."""

    statuses: frozenset[int]
    shape: Shape


_OK, _CREATED, _ACCEPTED = HTTPStatus.OK, HTTPStatus.CREATED, HTTPStatus.ACCEPTED
_SUCCESSES = (  # the first match applies
    (r"POST /api/(events|(event-bulk-create|data-privacy-deletion)-jobs)", {_ACCEPTED}, Shape.EMPTY),
    (r"POST /api/profile-subscription-bulk-(create|delete)-jobs", {_ACCEPTED}, Shape.EMPTY),
    (r"POST /api/profile-import", {_OK, _CREATED}, Shape.RESOURCE),
    (r"POST /api/profile(s|-merge)", {_CREATED}, Shape.RESOURCE),
    (r"POST /api/(profile-bulk-import|catalog-\w+-bulk-\w+)-jobs", {_ACCEPTED}, Shape.RESOURCE),
    (r"POST /api/catalog-\w+", {_CREATED}, Shape.RESOURCE),
    (r"PATCH /api/(profiles|catalog-\w+)/{id}", {_OK}, Shape.RESOURCE),
    (r"DELETE /api/catalog-\w+/{id}", {HTTPStatus.NO_CONTENT}, Shape.EMPTY),
    (r"GET /api/[\w-]+/{id}", {_OK}, Shape.RESOURCE),
    (r"GET /api/[\w-]+(/{id}/[\w-]+)?", {_OK}, Shape.RESOURCES),
)


@cache
def success_of(endpoint: str) -> Success:
    """Return what a successful response of an endpoint is. Raises LookupError for an endpoint without a definition."""
    for pattern, statuses, shape in _SUCCESSES:
        if re.fullmatch(pattern, endpoint):
            return Success(frozenset(statuses), shape)
    raise LookupError(f"worker/klaviyo/responses.py does not define what a success of {endpoint} is")


def decode_success(endpoint: str, response: Response) -> Json | None:
    """Return the document of a successful response, {} for one without a body; None if it is not a success."""
    statuses, shape = success_of(endpoint)
    if response.status not in statuses:
        return None
    if shape is Shape.EMPTY:
        return None if response.body else {}
    document = as_dict(response.json())
    data = document.get("data")
    resources = data if shape is Shape.RESOURCES else [data]
    return document if isinstance(resources, list) and all(map(_is_resource, resources)) else None


def decode_error(response: Response) -> Json | None:
    """Return the first error of Klaviyo's error document; None if the response is not such a document."""
    if response.status < HTTPStatus.BAD_REQUEST:
        return None
    error = next(iter(as_dicts(as_dict(response.json()).get("errors"))), {})
    return error if as_text(error.get("code")) or as_text(error.get("title")) else None


def _is_resource(value: Any) -> bool:
    return bool(as_text(as_dict(value).get("id")))
