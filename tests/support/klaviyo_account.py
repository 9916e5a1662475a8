"""A KlaviyoClient that reaches the emulator's account without a network."""

from __future__ import annotations

from threading import local
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlsplit

import orjson

from worker.errors import Rejected
from worker.sandbox.http import ApiRequest
from worker.sandbox.klaviyo.account import Account
from worker.sandbox.klaviyo.api import KEY, KlaviyoApi

if TYPE_CHECKING:
    from collections.abc import Callable

    from worker.klaviyo.client import Body
    from worker.model import Json

HEADERS = {
    "Authorization": f"Klaviyo-API-Key {KEY}",
    "revision": "2026-07-15",
    "Host": "klaviyo.example",
    "Content-Type": "application/json",
}


class AccountClient:
    """A client of an account. Its calls are listed as "METHOD /path", with their bodies.

    `before` is called before each request, for example to change the account or to raise an error.
    """

    def __init__(self, account: Account | None = None) -> None:
        self.account = account or Account()
        self.calls: list[tuple[str, Json]] = []
        self.before: Callable[[str, Json], object] = lambda *_: None
        self._api = KlaviyoApi(self.account, rate_limits=0.0)
        self._thread = local()

    def requests_sent(self) -> int:
        return getattr(self._thread, "requests", 0)

    def call(self, method: str, path: str, body: Body = None, *, idempotent: bool = True) -> Json:
        content = body() if callable(body) else body
        data = content if isinstance(content, bytes) else orjson.dumps(content)
        document: Json = orjson.loads(data) or {}
        parts = urlsplit(path)
        name = f"{method} {parts.path}"
        self.before(name, document)
        self._thread.requests = self.requests_sent() + 1
        self.calls.append((name, document))
        sent = data if body is not None else b""
        response = self._api.handle(ApiRequest(method, parts.path, parse_qs(parts.query), HEADERS, sent, path))
        if response.status < 300:
            return response.document or {}
        error: Json = response.document["errors"][0]
        duplicate = error["meta"].get("duplicate_profile_id", "")
        raise Rejected(error["detail"], response.status, duplicate, error["source"].get("pointer", ""))

    @property
    def names(self) -> list[str]:
        """Return the requests without their bodies."""
        return [name for name, _ in self.calls]

    def profile(self, **attributes: Any) -> Json:
        """Add a profile to the account and return its attributes, which change with it."""
        created: Json = self.account.create_profile({"type": "profile", "attributes": attributes})["attributes"]
        return created
