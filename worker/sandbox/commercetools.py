"""The commercetools stand-in: tokens and queries over a Shop."""

from __future__ import annotations

import base64
import secrets
import time
from threading import Lock
from typing import TYPE_CHECKING, Any

from worker.sandbox.predicate import PredicateError, matches
from worker.sandbox.server import Answer, Request

if TYPE_CHECKING:
    from worker.sandbox.shop import Shop

PROJECT = "sandbox-shop"
CLIENT_ID, CLIENT_SECRET = "sandbox-client", "sandbox-client-secret"
MAX_URI = 8_192
MAX_LIMIT, DEFAULT_LIMIT = 500, 20


def problem(status: int, code: str = "", message: str = "") -> Any:
    """Return an error document as commercetools forms it."""
    codes = {400: "InvalidInput", 401: "invalid_token", 403: "insufficient_scope", 404: "ResourceNotFound"}
    code = code or codes.get(status, "General")
    return {
        "statusCode": status,
        "message": message or code,
        "error": code,
        "errors": [{"code": code, "message": message or code}],
    }


class Commercetools:
    """Answers like commercetools' HTTP API, reading from a Shop."""

    def __init__(self, shop: Shop, token_lifetime: int) -> None:
        self._shop = shop
        self._lifetime = token_lifetime
        self._lock = Lock()
        self._tokens: dict[str, float] = {}
        self.tokens_issued = 0

    def revoke_tokens(self) -> None:
        """Refuse all tokens issued so far."""
        with self._lock:
            self._tokens.clear()

    def handle(self, request: Request) -> Answer:
        """Answer a request."""
        if len(request.target) > MAX_URI:
            return Answer(413, problem(413))
        if request.path == "/oauth/token":
            return self._token(request)
        if not self._is_known(request.headers.get("Authorization", "")):
            return Answer(401, problem(401))
        parts = request.path.strip("/").split("/")
        if request.method != "GET" or parts[0] != PROJECT or len(parts) not in {2, 3}:
            return Answer(404, problem(404))
        collection = self._shop.collection(parts[1])
        if collection is None:
            return Answer(404, problem(404))
        if len(parts) == 2:  # noqa: PLR2004 - /project/collection
            return self._query(collection, request)
        resource = collection.get(parts[2])
        return Answer(200, resource) if resource else Answer(404, problem(404))

    def _token(self, request: Request) -> Answer:
        credentials = base64.b64encode(f"{CLIENT_ID}:{CLIENT_SECRET}".encode()).decode()
        if request.headers.get("Authorization") != f"Basic {credentials}":
            return Answer(401, problem(401, "invalid_client", "Please provide valid client credentials."))
        if b"grant_type=client_credentials" not in request.body:
            return Answer(400, problem(400, "unsupported_grant_type"))
        token = secrets.token_urlsafe(24)
        with self._lock:
            self._tokens[token] = time.monotonic() + self._lifetime
            self.tokens_issued += 1
        granted = {"scope": f"view_orders:{PROJECT} view_customers:{PROJECT} view_products:{PROJECT}"}
        return Answer(200, {"access_token": token, "token_type": "Bearer", "expires_in": self._lifetime, **granted})

    def _is_known(self, authorization: str) -> bool:
        token = authorization.removeprefix("Bearer ")
        with self._lock:
            return self._tokens.get(token, 0.0) > time.monotonic()

    def _query(self, collection: dict[str, Any], request: Request) -> Answer:
        try:
            limit = int(request.query.get("limit", [str(DEFAULT_LIMIT)])[0])
            offset = int(request.query.get("offset", ["0"])[0])
            tests = [matches(where) for where in request.query.get("where", [])]
        except (PredicateError, ValueError) as error:
            return Answer(400, problem(400, message=f"Malformed parameter: {error}"))
        if not 0 <= limit <= MAX_LIMIT:
            return Answer(400, problem(400, message="limit must be between 0 and 500"))
        found = [resource for resource in list(collection.values()) if all(test(resource) for test in tests)]
        for sort in reversed(request.query.get("sort", [])):
            field, _, direction = sort.partition(" ")
            found.sort(key=lambda resource: str(resource.get(field, "")), reverse=direction == "desc")
        page = found[offset : offset + limit]
        total = {} if request.query.get("withTotal") == ["false"] else {"total": len(found)}
        return Answer(200, {"limit": limit, "offset": offset, "count": len(page), **total, "results": page})
