"""A plain HTTP client for the Klaviyo emulator."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import orjson
import pytest
import urllib3

from worker.sandbox.klaviyo.api import KEY

if TYPE_CHECKING:
    from worker.sandbox import Sandbox

HEADERS = {
    "Authorization": f"Klaviyo-API-Key {KEY}",
    "revision": "2026-07-15",
    "Content-Type": "application/vnd.api+json",
}


class Caller:
    """A plain HTTP client for the Klaviyo emulator."""

    def __init__(self, sandbox: Sandbox) -> None:
        self._url = sandbox.klaviyo.url
        self._pool = urllib3.PoolManager(retries=False, timeout=60)

    def __call__(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
        content = None if body is None else body if isinstance(body, bytes) else orjson.dumps(body)
        merged = {name: value for name, value in (HEADERS | headers).items() if value}
        response = self._pool.request(method, self._url + path, body=content, headers=merged)
        return response.status, orjson.loads(response.data) if response.data else None


@pytest.fixture
def call(sandbox: Sandbox) -> Caller:
    return Caller(sandbox)
