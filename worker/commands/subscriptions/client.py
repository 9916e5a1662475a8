"""commercetools' Subscriptions API."""

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

SCOPE = "manage_subscriptions"  # also to read: commercetools has no narrower one
MOST = 500  # subscriptions in an answer; a project may have 50
LOOKS = 1.0  # seconds between two looks at the health
_ENDPOINT = "subscriptions"


class Conflict(WorkerError):
    """Somebody else was first: read again."""


class NotPermitted(CommercetoolsMisconfigured):
    """The API client lacks the scope, or was not asked for it."""


class Subscriptions:
    """The subscriptions of a project. `hide` takes the secrets out of what commercetools says of a request."""

    def __init__(self, commercetools: Commercetools, hide: Callable[[str], str] = str) -> None:
        self._commercetools = commercetools
        self._hide = hide

    def all(self) -> list[Json]:
        """Return them. Raises CommercetoolsMisconfigured, Transient or Rejected, as all methods do."""
        results = self._asked("GET", f"?limit={MOST}").get("results")
        if not isinstance(results, list):  # never take a strange answer for "there is none"
            raise Transient("commercetools answered for subscriptions without results")
        return as_dicts(results)

    def create(self, draft: Json) -> Json:
        """Create one. Raises Conflict when its key is taken."""
        return _with_id(self._asked("POST", body=draft))

    def update(self, subscription: Json, actions: list[Json]) -> Json:
        """Carry out all actions, or none. Raises Conflict when it is of another version by now."""
        body = {"version": subscription.get("version"), "actions": actions}
        return _with_id(self._asked("POST", f"/{_id(subscription)}", body))

    def delete(self, subscription: Json) -> None:
        """Delete it; one that is gone is no error. Raises Conflict when it is of another version by now."""
        version = quote(str(subscription.get("version")), safe="")
        self._asked("DELETE", f"/{_id(subscription)}?version={version}", gone_is_fine=True)

    def watched(self, subscription: Json, wait: float) -> str:
        """Return the status, once it is healthy or `wait` seconds are over; "" where commercetools does not tell."""
        until = time.monotonic() + wait
        while True:
            status = self._commercetools.get_public(_ENDPOINT, f"/{_id(subscription)}/health").status
            if status == HTTPStatus.OK:
                return HEALTHY
            if status == HTTPStatus.NOT_FOUND:
                return ""
            left = until - time.monotonic()
            if not left > 0:  # nor is NaN
                return as_text(self._asked("GET", f"/{_id(subscription)}").get("status")) or f"/health {status}"
            time.sleep(min(LOOKS, left))

    def _asked(self, method: str, path: str = "", body: Json | None = None, *, gone_is_fine: bool = False) -> Json:
        response = self._commercetools.call(_ENDPOINT, method, path, body)
        if response.status < HTTPStatus.MULTIPLE_CHOICES or (gone_is_fine and response.status == HTTPStatus.NOT_FOUND):
            return as_dict(response.json())
        raise _verdict(response, self._hide)


def _id(subscription: Json) -> str:
    return quote(as_text(subscription.get("id")), safe="")


def _with_id(subscription: Json) -> Json:
    if not _id(subscription):  # never take a strange answer for "it is done"
        raise Transient("commercetools answered for subscriptions without an id")
    return subscription


def _verdict(response: http.Response, hide: Callable[[str], str]) -> WorkerError:
    document = as_dict(response.json())
    error = next(iter(as_dicts(document.get("errors"))), {})
    code = printable(as_text(error.get("code")))[:64]
    what = f"commercetools answered {response.status} {code} for subscriptions"
    if response.status == HTTPStatus.CONFLICT or code == "DuplicateField":
        return Conflict(what)
    if response.status == HTTPStatus.FORBIDDEN:
        todo = f"use an API client with the scope {SCOPE}, which CT_SCOPE must not leave out"
        return NotPermitted(what, todo=todo)
    if response.status in {HTTPStatus.UNAUTHORIZED, HTTPStatus.NOT_FOUND} or response.status < HTTPStatus.BAD_REQUEST:
        return CommercetoolsMisconfigured(what, todo="check CT_API_URL and CT_PROJECT_ID")
    message = as_text(error.get("message")) or as_text(document.get("message")) or "no reason given"
    return Rejected(f"{what}: {printable(hide(message))[:500]}", response.status)  # cut last: half a secret is one
