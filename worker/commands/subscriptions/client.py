"""A client of commercetools' Subscriptions API."""

from __future__ import annotations

import time
from http import HTTPStatus
from typing import TYPE_CHECKING
from urllib.parse import quote

from worker.commands.subscriptions.health import HEALTHY
from worker.errors import CommercetoolsMisconfigured, Rejected, Transient, WorkerError
from worker.json_access import as_dict, as_dicts, as_text, printable

if TYPE_CHECKING:
    from collections.abc import Callable

    from worker.commercetools.client import Commercetools
    from worker.http import transport as http
    from worker.model import Json

SCOPE = "manage_subscriptions"  # for reading too: commercetools has no narrower scope
PAGE_SIZE = 500  # a project can have 50 subscriptions, so one page holds all
POLL_INTERVAL = 1.0  # seconds between two requests for the health
_ENDPOINT = "subscriptions"


class Conflict(WorkerError):
    """Another client has changed the subscription: read it again."""


class NotPermitted(CommercetoolsMisconfigured):
    """The API client lacks the scope, or CT_SCOPE does not contain it."""


class Subscriptions:
    """The subscriptions of a project. `redact` removes secrets from commercetools' error texts."""

    def __init__(self, commercetools: Commercetools, redact: Callable[[str], str] = str) -> None:
        self._commercetools = commercetools
        self._redact = redact

    def all(self) -> list[Json]:
        """Return all subscriptions. Raises CommercetoolsMisconfigured, Transient or Rejected, as all methods do."""
        results = self._request("GET", f"?limit={PAGE_SIZE}").get("results")
        if not isinstance(results, list):  # a malformed response does not mean that there are none
            raise Transient("commercetools returned no results for subscriptions")
        return as_dicts(results)

    def create(self, draft: Json) -> Json:
        """Create a subscription. Raises Conflict if its key is taken."""
        return _require_id(self._request("POST", body=draft))

    def update(self, subscription: Json, actions: list[Json]) -> Json:
        """Apply all update actions, or none. Raises Conflict if the version has changed."""
        body = {"version": subscription.get("version"), "actions": actions}
        return _require_id(self._request("POST", f"/{_id(subscription)}", body))

    def delete(self, subscription: Json) -> None:
        """Delete a subscription, if it still exists. Raises Conflict if the version has changed."""
        version = quote(str(subscription.get("version")), safe="")
        self._request("DELETE", f"/{_id(subscription)}?version={version}", may_be_missing=True)

    def wait_until_healthy(self, subscription: Json, wait: float) -> str:
        """Wait up to `wait` seconds until a subscription is healthy. Return its status, or "" if none is reported."""
        deadline = time.monotonic() + wait
        while True:
            status = self._commercetools.get_public(_ENDPOINT, f"/{_id(subscription)}/health").status
            if status == HTTPStatus.OK:
                return HEALTHY
            if status == HTTPStatus.NOT_FOUND:
                return ""
            left = deadline - time.monotonic()
            if not left > 0:  # also True for NaN
                return as_text(self._request("GET", f"/{_id(subscription)}").get("status")) or f"/health {status}"
            time.sleep(min(POLL_INTERVAL, left))

    def _request(self, method: str, path: str = "", body: Json | None = None, *, may_be_missing: bool = False) -> Json:
        response = self._commercetools.call(_ENDPOINT, method, path, body)
        is_missing = may_be_missing and response.status == HTTPStatus.NOT_FOUND
        if response.status < HTTPStatus.MULTIPLE_CHOICES or is_missing:
            return as_dict(response.json())
        raise _error_from(response, self._redact)


def _id(subscription: Json) -> str:
    return quote(as_text(subscription.get("id")), safe="")


def _require_id(subscription: Json) -> Json:
    if not _id(subscription):  # a malformed response does not mean success
        raise Transient("commercetools returned a subscription without an id")
    return subscription


def _error_from(response: http.Response, redact: Callable[[str], str]) -> WorkerError:
    document = as_dict(response.json())
    error = next(iter(as_dicts(document.get("errors"))), {})
    code = printable(as_text(error.get("code")))[:64]
    what = f"commercetools answered {response.status} {code} for subscriptions"
    if response.status == HTTPStatus.CONFLICT or code == "DuplicateField":
        return Conflict(what)
    if response.status == HTTPStatus.FORBIDDEN:
        todo = f"use an API client with the scope {SCOPE}, and include it in CT_SCOPE if that is set"
        return NotPermitted(what, todo=todo)
    if response.status in {HTTPStatus.UNAUTHORIZED, HTTPStatus.NOT_FOUND} or response.status < HTTPStatus.BAD_REQUEST:
        return CommercetoolsMisconfigured(what, todo="check CT_API_URL and CT_PROJECT_ID")
    message = as_text(error.get("message")) or as_text(document.get("message")) or "no reason given"
    redacted = printable(redact(message))[:500]  # truncated last: otherwise a part of a secret could remain
    return Rejected(f"{what}: {redacted}", response.status)
