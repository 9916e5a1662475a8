"""The Klaviyo stand-in: routes, headers and rate limits in front of an Account."""

from __future__ import annotations

import re
import time
from collections import defaultdict
from threading import Lock
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote

import orjson

from worker.sandbox.rules import KB, MB, Refused, invalid, resource
from worker.sandbox.server import Answer, Request

if TYPE_CHECKING:
    from worker.sandbox.account import Account, Json

KEY = "pk_sandbox_key"
_REVISION = re.compile(r"\d{4}-\d\d-\d\d(\.pre)?")
_MEDIA_TYPES = {"application/vnd.api+json", "application/json"}
_KINDS = {
    "catalog-items": "catalog-item",
    "catalog-variants": "catalog-variant",
    "catalog-categories": "catalog-category",
}
_EQUALS = re.compile(r'equals\((email|phone_number|external_id),"((?:[^"\\]|\\.)*)"\)')
_TIERS = {"XS": (1, 15), "S": (3, 60), "M": (10, 150), "L": (75, 700), "XL": (350, 3500)}  # per 1 s, per 60 s
_LIMITS = {
    "POST /api/events": "XL",
    "POST /api/event-bulk-create-jobs": "M",
    "POST /api/data-privacy-deletion-jobs": "S",
    "GET /api/catalog-items": "XL",
}  # everything else: L
_PAGE = 100


def problem(status: int) -> Any:
    """Return an error document as Klaviyo forms it."""
    codes = {401: "not_authenticated", 403: "permission_denied", 429: "throttled", 400: "invalid"}
    return Refused(status, codes.get(status, "error"), "As asked for.").document()


class Klaviyo:
    """Answers like Klaviyo's HTTP API, writing to an Account."""

    def __init__(self, account: Account, *, rate_limits: bool) -> None:
        self._account = account
        self._limiter = _Limiter() if rate_limits else None

    def handle(self, request: Request) -> Answer:
        """Answer a request."""
        try:
            self._check_headers(request)
            headers = self._limiter.take(_endpoint(request)) if self._limiter else {}
            status, document = self._route(request)
        except _Throttled as throttled:
            return Answer(429, problem(429), {"Retry-After": str(throttled.seconds)})
        except Refused as refused:
            return Answer(refused.status, refused.document())
        return Answer(status, document, headers)

    def _check_headers(self, request: Request) -> None:
        if request.headers.get("Authorization") != f"Klaviyo-API-Key {KEY}":
            raise Refused(401, "not_authenticated", "Incorrect authentication credentials.")
        if not _REVISION.fullmatch(request.headers.get("revision", "")):
            raise invalid("A 'revision' header like 2026-07-15 is required.", "")
        media_type = request.headers.get("Content-Type", "").partition(";")[0]
        if request.body and media_type not in _MEDIA_TYPES:
            raise Refused(415, "unsupported_media_type", "Expected application/vnd.api+json.")
        limit = 100 * KB if request.path == "/api/profile-import" else 5 * MB
        if len(request.body) > limit:
            raise Refused(413, "payload_too_large", f"The body may have {limit} bytes.")

    def _route(self, request: Request) -> tuple[int, Any]:
        parts = [unquote(part) for part in request.path.strip("/").split("/")][1:]
        if parts and parts[0] in _KINDS:
            return self._catalog(request, _KINDS[parts[0]], parts[1:])
        match (request.method, *parts):
            case ("POST", "events"):
                self._account.create_event(resource(_body(request), "event")["attributes"])
                return 202, None
            case ("POST", "event-bulk-create-jobs"):
                self._account.create_events(_bulk_entries(request))
                return 202, None
            case ("POST", "profile-import"):
                status, profile = self._account.import_profile(resource(_body(request), "profile"))
                return status, {"data": profile}
            case ("PATCH", "profiles", profile_id):
                data = resource(_body(request), "profile")
                return 200, {"data": self._account.update_profile(profile_id, data)}
            case ("GET", "profiles"):
                return 200, {"data": self._find_profiles(request), "links": {"next": None}}
            case ("POST", "data-privacy-deletion-jobs"):
                data = resource(_body(request), "data-privacy-deletion-job")
                self._account.request_deletion((data["attributes"].get("profile") or {}).get("data") or {})
                return 202, None
        raise Refused(404, "not_found", "The requested path could not be found.")

    def _find_profiles(self, request: Request) -> list[Json]:
        match = _EQUALS.fullmatch(request.query.get("filter", [""])[0])
        if match is None:
            raise invalid("Unknown filter.", "")
        return self._account.find_profiles(match[1], orjson.loads(f'"{match[2]}"'))

    def _catalog(self, request: Request, kind: str, rest: list[str]) -> tuple[int, Any]:
        account = self._account
        match (request.method, *rest):
            case ("POST",):
                return 201, {"data": account.create_entry(kind, resource(_body(request), kind))}
            case ("GET", entry_id):
                return 200, {"data": account.entry(kind, entry_id)}
            case ("PATCH", entry_id):
                return 200, {"data": account.update_entry(kind, entry_id, resource(_body(request), kind))}
            case ("DELETE", entry_id):
                account.delete_entry(kind, entry_id)
                return 204, None
            case ("GET", item_id, "variants") if kind == "catalog-item":
                return 200, _page(account.variants_of(item_id), request)
        raise Refused(404, "not_found", "The requested path could not be found.")


def _body(request: Request) -> Any:
    try:
        return request.json()
    except ValueError:
        raise invalid("The body is not JSON.") from None


def _bulk_entries(request: Request) -> list[Json]:
    attributes = resource(_body(request), "event-bulk-create-job")["attributes"]
    entries = (attributes.get("events-bulk-create") or {}).get("data")
    if not isinstance(entries, list):
        raise invalid("'events-bulk-create' is required.", "/data/attributes/events-bulk-create")
    return entries


def _page(entries: list[Json], request: Request) -> Json:
    """Return a page of entries, with the link to the next one."""
    start = int(request.query.get("page[cursor]", ["0"])[0])
    size = min(int(request.query.get("page[size]", [str(_PAGE)])[0]), _PAGE)
    following = None
    if start + size < len(entries):
        host = request.headers.get("Host", "")
        cursor = f"page%5Bcursor%5D={start + size}&page%5Bsize%5D={size}"
        following = f"http://{host}{quote(request.path, safe='/$:')}?{cursor}"
    return {"data": entries[start : start + size], "links": {"next": following}}


def _endpoint(request: Request) -> str:
    """Return the endpoint without ids: rate limits are per endpoint."""
    return f"{request.method} /" + "/".join(request.path.strip("/").split("/")[:2])


class _Throttled(Exception):
    def __init__(self, seconds: int) -> None:
        super().__init__()
        self.seconds = seconds


class _Limiter:
    """Two fixed windows an endpoint: a second and a minute."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._used: dict[tuple[str, int], tuple[int, int]] = defaultdict(lambda: (-1, 0))

    def take(self, endpoint: str) -> dict[str, str]:
        """Count a request and return the headers of the long window. Raises _Throttled."""
        now = time.time()
        limits = dict(zip((1, 60), _TIERS[_LIMITS.get(endpoint, "L")], strict=True))
        with self._lock:
            counts = {}
            for seconds, limit in limits.items():
                window, used = self._used[endpoint, seconds]
                used = used if window == int(now // seconds) else 0
                if used >= limit:
                    raise _Throttled(max(1, round(seconds - now % seconds)))
                counts[seconds] = used + 1
            for seconds, used in counts.items():
                self._used[endpoint, seconds] = (int(now // seconds), used)
        return {
            "RateLimit-Limit": str(limits[60]),
            "RateLimit-Remaining": str(limits[60] - counts[60]),
            "RateLimit-Reset": str(round(60 - now % 60)),
        }
