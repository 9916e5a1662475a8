"""The responses of commercetools' API: what a success is, and what an error document is.

Everything else is not commercetools' response: a proxy, a firewall or a maintenance page has answered.
https://docs.commercetools.com/api/errors describes the error document.
"""

from __future__ import annotations

from http import HTTPStatus
from typing import TYPE_CHECKING

from worker.json_access import as_dict, as_dicts, as_text

if TYPE_CHECKING:
    from worker.http.transport import Response
    from worker.model import Json

# Codes of errors that disappear by themselves. commercetools sends the first one with the status 400.
TRANSIENT_CODES = frozenset({"QueryTimedOut", "OverCapacity", "PendingOperation", "ConcurrentModification"})


def decode_page(response: Response) -> Json | None:
    """Return the document of a successful query; None if the response is not one, or has a resource without an id."""
    document = as_dict(response.json()) if response.status == HTTPStatus.OK else {}
    results = document.get("results")
    return document if isinstance(results, list) and all(map(_is_resource, results)) else None


def decode_error(response: Response) -> str | None:
    """Return the code of commercetools' error document, or ""; None if the response is not such a document."""
    document = as_dict(response.json())
    errors = as_dicts(document.get("errors"))
    if response.status < HTTPStatus.BAD_REQUEST or document.get("statusCode") != response.status or not errors:
        return None
    return as_text(errors[0].get("code"))[:64]


def is_own(response: Response) -> bool:
    """Return whether commercetools itself has answered: with a JSON object or with its error document."""
    if response.status < HTTPStatus.MULTIPLE_CHOICES:
        return isinstance(response.json(), dict)
    return decode_error(response) is not None


def _is_resource(value: object) -> bool:
    return isinstance(value, dict) and bool(as_text(value.get("id")))
