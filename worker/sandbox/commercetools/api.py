"""The HTTP API of the commercetools emulator: tokens, queries over a Shop, and subscriptions."""

from __future__ import annotations

import base64
import re
import secrets
import time
from dataclasses import replace
from threading import Lock
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs

from worker.sandbox.commercetools.copies import Copies
from worker.sandbox.commercetools.predicate import PredicateError, parse_predicate
from worker.sandbox.commercetools.subscriptions import ApiError, Subscriptions
from worker.sandbox.http import ApiResponse

if TYPE_CHECKING:
    from worker.sandbox.commercetools.shop import Shop
    from worker.sandbox.http import ApiRequest

PROJECT = "sandbox-shop"
CLIENT_ID, CLIENT_SECRET = "sandbox-client", "sandbox-client-secret"
SCOPES = (
    "view_orders",
    "view_customers",
    "view_payments",
    "view_products",
    "view_standalone_prices",
    "manage_subscriptions",
)
MAX_URI = 8_192  # bytes
MAX_LIMIT, DEFAULT_LIMIT, MAX_OFFSET = 500, 20, 10_000
_SORT = re.compile(r"(id|createdAt|lastModifiedAt)( asc| desc)?")


def error_document(status: int, code: str = "", message: str = "", **details: Any) -> Any:
    """Return an error document in commercetools' format."""
    codes = {400: "InvalidInput", 401: "invalid_token", 403: "insufficient_scope", 404: "ResourceNotFound"}
    code = code or codes.get(status, "General")
    return {
        "statusCode": status,
        "message": message or code,
        "error": code,
        "errors": [{"code": code, "message": message or code, **details}],
    }


class CommercetoolsApi:
    """commercetools' HTTP API on top of a Shop and `copies` of its resources."""

    def __init__(self, shop: Shop, token_lifetime: int, copies: int = 0, project: str = PROJECT) -> None:
        self._shop = shop
        self._project = project
        self._copies = Copies(shop, copies)
        self._lifetime = token_lifetime
        self._lock = Lock()
        self._tokens: dict[str, tuple[float, list[str]]] = {}  # when each expires, and its scopes
        self.subscriptions = Subscriptions()
        self.tokens_issued = 0

    def revoke_tokens(self) -> None:
        """Refuse all tokens issued so far."""
        with self._lock:
            self._tokens.clear()

    def handle(self, request: ApiRequest) -> ApiResponse:
        """Return the response to a request."""
        response = self._respond(request)
        correlation = request.headers.get("X-Correlation-ID") or f"{self._project}/{secrets.token_hex(8)}"
        return replace(response, headers={**response.headers, "X-Correlation-ID": correlation})

    def _respond(self, request: ApiRequest) -> ApiResponse:
        if len(request.target) > MAX_URI:
            return ApiResponse(413, error_document(413))
        if request.path == "/oauth/token":
            return self._token(request)
        parts = request.path.strip("/").split("/")
        is_subscription = parts[:2] == [self._project, "subscriptions"]
        if is_subscription and parts[3:] == ["health"]:
            return self._subscription(request, parts)
        scopes = self._scopes(request.headers.get("Authorization", ""))
        if scopes is None:
            return ApiResponse(401, error_document(401))
        if is_subscription:
            allowed = f"manage_subscriptions:{self._project}" in scopes
            return self._subscription(request, parts) if allowed else ApiResponse(403, error_document(403))
        return self._read(request, parts)

    def _read(self, request: ApiRequest, parts: list[str]) -> ApiResponse:
        if request.method != "GET" or parts[0] != self._project or len(parts) not in {2, 3}:
            return ApiResponse(404, error_document(404))
        collection = self._shop.collection(parts[1])
        if collection is None:
            return ApiResponse(404, error_document(404))
        if len(parts) == 2:  # noqa: PLR2004 - /project/collection
            return self._query(parts[1], collection, request)
        resource = collection.get(parts[2]) or self._copies.get(parts[1], parts[2])
        return ApiResponse(200, resource) if resource else ApiResponse(404, error_document(404))

    def _subscription(self, request: ApiRequest, parts: list[str]) -> ApiResponse:
        try:
            if parts[3:]:
                return self.subscriptions.health(parts[2])
            return self.subscriptions.respond(request, "".join(parts[2:]))
        except ApiError as error:
            return ApiResponse(error.status, error_document(error.status, error.code, str(error), **error.details))

    def _token(self, request: ApiRequest) -> ApiResponse:
        credentials = base64.b64encode(f"{CLIENT_ID}:{CLIENT_SECRET}".encode()).decode()
        if request.headers.get("Authorization") != f"Basic {credentials}":
            return ApiResponse(401, error_document(401, "invalid_client", "Please provide valid client credentials."))
        form = parse_qs((request.body or request.target.partition("?")[2].encode()).decode())
        if form.get("grant_type") != ["client_credentials"]:
            return ApiResponse(400, error_document(400, "unsupported_grant_type"))
        available = [f"{scope}:{self._project}" for scope in SCOPES]
        requested = " ".join(form.get("scope", [])).split()
        granted = [scope for scope in requested if scope in available] if requested else available
        if not granted:
            return ApiResponse(400, error_document(400, "invalid_scope", f"None of {requested} can be granted."))
        token = secrets.token_urlsafe(24)
        with self._lock:
            self._tokens[token] = (time.monotonic() + self._lifetime, granted)
            self.tokens_issued += 1
        document = {"access_token": token, "token_type": "Bearer", "expires_in": self._lifetime}
        return ApiResponse(200, document | {"scope": " ".join(granted)})

    def _scopes(self, authorization: str) -> list[str] | None:
        """Return the scopes of a token, or None if it is invalid. Only subscriptions require a scope."""
        scheme, _, token = authorization.partition(" ")
        with self._lock:
            expires_at, scopes = self._tokens.get(token, (0.0, []))
        return scopes if scheme == "Bearer" and expires_at > time.monotonic() else None

    def _query(self, path: str, collection: dict[str, Any], request: ApiRequest) -> ApiResponse:
        try:
            limit = int(request.query.get("limit", [str(DEFAULT_LIMIT)])[0])
            offset = int(request.query.get("offset", ["0"])[0])
            tests = [parse_predicate(where) for where in request.query.get("where", [])]
        except (PredicateError, ValueError) as error:
            return ApiResponse(400, error_document(400, message=f"Malformed parameter: {error}"))
        sorts = request.query.get("sort", [])
        if not (0 <= limit <= MAX_LIMIT and 0 <= offset <= MAX_OFFSET and all(map(_SORT.fullmatch, sorts))):
            return ApiResponse(400, error_document(400, message="Malformed parameter: limit, offset or sort"))
        candidates = [*collection.values(), *self._copies.candidates(path, tests)]
        found = [resource for resource in candidates if all(test(resource) for test in tests)]
        for sort in reversed(sorts):
            field, _, direction = sort.partition(" ")
            found.sort(key=lambda resource: str(resource.get(field, "")), reverse=direction == "desc")
        page = found[offset : offset + limit]
        total = {} if request.query.get("withTotal") == ["false"] else {"total": len(found)}
        return ApiResponse(200, {"limit": limit, "offset": offset, "count": len(page), **total, "results": page})
