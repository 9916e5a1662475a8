"""The HTTP API of the Klaviyo emulator: headers, rate limits and routes in front of an Account."""

from __future__ import annotations

import re
from datetime import datetime
from functools import partial
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from worker.sandbox.http import ApiResponse
from worker.sandbox.klaviyo import catalog_api
from worker.sandbox.klaviyo.jobs import BulkJob, BulkJobs
from worker.sandbox.klaviyo.rate_limits import FixedWindowLimiter, Throttled
from worker.sandbox.klaviyo.requests import (
    MAX_PAGE,
    check_parameters,
    not_found,
    paginate,
    parse_body,
    parse_filter,
    selected_fields,
)
from worker.sandbox.klaviyo.rules import (
    MAX_PROFILE,
    MB,
    ApiError,
    check_bulk_profile,
    check_catalog,
    entries_of,
    invalid_input,
    reference_ids,
    require_resource,
)
from worker.sandbox.klaviyo.subscriptions import MAX_SUBSCRIBED, MAX_UNSUBSCRIBED, check_entry
from worker.sandbox.server import path_template

if TYPE_CHECKING:
    from collections.abc import Callable

    from worker.sandbox.http import ApiRequest, Json
    from worker.sandbox.klaviyo.account import Account

KEY = "pk_sandbox_key"
MEDIA_TYPE = "application/vnd.api+json"
MAX_ENTRIES, MAX_PROFILES = 100, 10_000
DEFAULT_PAGE = 20
MAX_EVENTS_PAGE = 1_000
_REVISION = re.compile(r"\d{4}-\d\d-\d\d(\.pre)?")
_PLURAL = {kind: path.removeprefix("catalog-") for path, kind in catalog_api.KINDS.items()}
_CATALOG_JOBS = re.compile(r"(catalog-(?:item|variant|category))-bulk-(create|update|delete)-job")
_ANY_OR_EQUALS = ("any", "equals")
_TIERS = {"S": {1: 3, 60: 60}, "M": {1: 10, 60: 150}, "L": {1: 75, 60: 750}, "XL": {1: 350, 60: 3500}}


def error_document(status: int) -> Any:
    """Return an error document in Klaviyo's format."""
    codes = {401: "not_authenticated", 403: "permission_denied", 429: "throttled", 400: "invalid"}
    return ApiError(status, codes.get(status, "error"), "As asked for.").document()


def _rate_limit_tier(endpoint: str) -> str:
    """Return the rate limit tier that Klaviyo documents for an endpoint."""
    method, path = endpoint.split(" ")
    if path == "/api/data-privacy-deletion-jobs":
        return "S"
    if path in {"/api/event-bulk-create-jobs", "/api/profile-merge"} or path.startswith(
        "/api/profile-bulk-import-jobs"
    ):
        return "M"
    is_slow_job = re.match(r"/api/catalog-(item|variant)-bulk-(create|update)-jobs", path)
    reads_catalog = method == "GET" and path.startswith("/api/catalog-") and not is_slow_job
    return "XL" if path == "/api/events" or reads_catalog else "L"


class KlaviyoApi:
    """Klaviyo's HTTP API on top of an Account.

    `rate_limits`: a multiple of the documented rate limits; 0: no rate limits. `lists_windows`: the header
    RateLimit-Limit lists the limits of both windows, as Klaviyo sends it; otherwise it is one number, as documented.
    """

    def __init__(self, account: Account, *, rate_limits: float, lists_windows: bool = True) -> None:
        self._account = account
        self._catalog = catalog_api.CatalogApi(account)
        self._lists_windows = lists_windows
        self._jobs = BulkJobs(account.job_seconds)
        self._limiter = FixedWindowLimiter() if rate_limits else None
        self._limits = {
            tier: {seconds: max(1, round(limit * rate_limits)) for seconds, limit in limits.items()}
            for tier, limits in _TIERS.items()
        }

    def handle(self, request: ApiRequest) -> ApiResponse:
        """Return the response to a request."""
        headers: dict[str, str] = {}
        try:
            _authenticate(request)
            headers = self._throttle(request)
            _check_headers_and_size(request)
            status, document = self._route(request)
        except Throttled as throttled:
            headers = {"Retry-After": str(throttled.seconds)}
            status, document = 429, error_document(429)
        except ApiError as error:
            status, document = error.status, error.document()
        if document is not None:
            headers["Content-Type"] = MEDIA_TYPE
        return ApiResponse(status, document, headers)

    def _throttle(self, request: ApiRequest) -> dict[str, str]:
        if self._limiter is None:
            return {}
        endpoint = f"{request.method} {path_template(request.path)}"
        limits = self._limits[_rate_limit_tier(endpoint)]
        remaining, reset = self._limiter.acquire(endpoint, limits)
        return {
            "RateLimit-Limit": f"{limits[1]}, {limits[1]};w=1, {limits[60]};w=60"
            if self._lists_windows
            else str(limits[60]),
            "RateLimit-Remaining": str(remaining),
            "RateLimit-Reset": str(reset),
        }

    def _route(self, request: ApiRequest) -> tuple[int, Any]:
        parts = [unquote(part) for part in request.path.strip("/").split("/")][1:]
        name = parts[0] if parts else ""
        if name in catalog_api.KINDS:
            return self._catalog.handle(request, name, parts[1:])
        if name.endswith("-jobs") and (name == "profile-bulk-import-jobs" or _CATALOG_JOBS.fullmatch(name[:-1])):
            return self._bulk_jobs(request, name[:-1], parts[1:])
        if name in {"profiles", "profile-import", "profile-merge"}:
            return self._profiles(request, parts)
        match (request.method, *parts):
            case ("POST", "events"):
                self._account.create_event(require_resource(parse_body(request), "event")["attributes"])
                return 202, None
            case ("GET", "events"):
                return 200, paginate(_find_events(self._account, request), request, 200, largest=MAX_EVENTS_PAGE)
            case ("POST", "event-bulk-create-jobs"):
                data = require_resource(parse_body(request), "event-bulk-create-job")
                self._account.create_events(entries_of(data["attributes"], "events-bulk-create"))
                return 202, None
            case ("POST", "profile-subscription-bulk-create-jobs" | "profile-subscription-bulk-delete-jobs"):
                return self._subscriptions(request, name.split("-")[3])
            case ("POST", "data-privacy-deletion-jobs"):
                data = require_resource(parse_body(request), "data-privacy-deletion-job")
                self._account.request_deletion(
                    require_resource(data["attributes"].get("profile"), "profile", bare=True)
                )
                return 202, None
        raise not_found()

    def _profiles(self, request: ApiRequest, parts: list[str]) -> tuple[int, Any]:
        account, show = self._account, partial(_profile_to_api, request)
        match (request.method, *parts):
            case ("POST", "profile-import"):
                status, profile = account.import_profile(require_resource(parse_body(request), "profile"))
                return status, {"data": show(profile)}
            case ("POST", "profile-merge"):
                data = require_resource(parse_body(request), "profile-merge", bare=True)
                relation = (data.get("relationships") or {}).get("profiles")
                sources = reference_ids(relation, "profile", "/data/relationships/profiles")
                merged = account.merge_profiles(data.get("id") or "", sources)
                return 201, {"data": {"type": "profile", "id": merged["id"]}}
            case ("POST", "profiles"):
                return 201, {"data": show(account.create_profile(require_resource(parse_body(request), "profile")))}
            case ("GET", "profiles"):
                name, values = parse_filter(
                    request, dict.fromkeys(("id", "email", "phone_number", "external_id"), _ANY_OR_EQUALS)
                )
                found = [each for value in values or () for each in account.find_profiles(name, value)]
                return 200, paginate(found if name else list(account.profiles), request, DEFAULT_PAGE, show)
            case ("GET", "profiles", profile_id):
                return 200, {"data": show(account.get_profile(profile_id))}
            case ("PATCH", "profiles", profile_id):
                data = require_resource(parse_body(request), "profile")
                return 200, {"data": show(account.update_profile(profile_id, data))}
        raise not_found()

    def _subscriptions(self, request: ApiRequest, verb: str) -> tuple[int, Any]:
        """Subscribe or unsubscribe profiles. Klaviyo does it later and does not report the result."""
        data = require_resource(parse_body(request), f"profile-subscription-bulk-{verb}-job")["attributes"]
        subscribes = verb == "create"
        limit, consent = (MAX_SUBSCRIBED, "SUBSCRIBED") if subscribes else (MAX_UNSUBSCRIBED, "UNSUBSCRIBED")
        entries = entries_of(data, "profiles", limit)
        is_import = bool(data.get("historical_import"))
        for index, entry in enumerate(entries):
            check_entry(entry, consent, f"/data/attributes/profiles/data/{index}", is_import=is_import)
        for entry in entries:
            (self._account.subscribe if subscribes else self._account.unsubscribe)(entry)
        return 202, None

    def _bulk_jobs(self, request: ApiRequest, kind: str, rest: list[str]) -> tuple[int, Any]:
        match (request.method, *rest):
            case ("POST",) if kind == "profile-bulk-import-job":
                profiles = entries_of(
                    require_resource(parse_body(request), kind)["attributes"], "profiles", MAX_PROFILES
                )
                for index, entry in enumerate(profiles):
                    check_bulk_profile(entry, f"/data/attributes/profiles/data/{index}")
                return 202, {"data": self._jobs.start(kind, profiles, self._account.import_entry)}
            case ("POST",):
                return 202, {"data": self._start_catalog_job(request, kind)}
            case ("GET",):
                return 200, self._list_jobs(request, kind)
            case ("GET", job_id):
                return 200, {"data": self._jobs.get(kind, job_id).document()}
            case ("GET", job_id, "import-errors") if kind == "profile-bulk-import-job":
                return 200, paginate(self._jobs.get(kind, job_id).errors or [], request, DEFAULT_PAGE)
        raise not_found()

    def _list_jobs(self, request: ApiRequest, kind: str) -> Json:
        of_catalog = kind.startswith("catalog-")
        check_parameters(
            request, {"filter", "page[cursor]", *(() if of_catalog else ("page[size]", "sort", "include"))}
        )
        _, statuses = parse_filter(request, {"status": ("equals",) if of_catalog else _ANY_OR_EQUALS})
        jobs = [job for job in self._jobs.of_kind(kind) if statuses is None or job.status in statuses]
        order = request.query.get("sort", ["created_at"])[0]
        if order not in {"created_at", "-created_at"}:
            raise invalid_input("Unknown sort; expected created_at or -created_at.", "")
        jobs = jobs[::-1] if order.startswith("-") else jobs
        return paginate(jobs, request, MAX_PAGE if of_catalog else DEFAULT_PAGE, BulkJob.document)

    def _start_catalog_job(self, request: ApiRequest, job_kind: str) -> Json:
        match = _CATALOG_JOBS.fullmatch(job_kind)
        assert match is not None
        kind, verb, account = match[1], match[2], self._account
        entries = entries_of(require_resource(parse_body(request), job_kind)["attributes"], _PLURAL[kind], MAX_ENTRIES)
        for index, entry in enumerate(entries):
            pointer = f"/data/attributes/{_PLURAL[kind]}/data/{index}"
            require_resource({"data": entry}, kind, pointer, bare=verb == "delete")
            if verb != "delete":
                check_catalog(kind, entry["attributes"], f"{pointer}/attributes", create=verb == "create")
            if verb != "create" and not isinstance(entry.get("id"), str):
                raise invalid_input("'id' is required.", f"{pointer}/id")
        work: dict[str, Callable[[Json], object]] = {
            "create": lambda entry: account.create_entry(kind, entry),
            "update": lambda entry: account.update_entry(kind, entry["id"], entry),
            "delete": lambda entry: account.delete_entry(kind, entry["id"]),
        }
        return self._jobs.start(job_kind, entries, work[verb])


def _authenticate(request: ApiRequest) -> None:
    if request.headers.get("Authorization") != f"Klaviyo-API-Key {KEY}":
        raise ApiError(401, "not_authenticated", "Incorrect authentication credentials.")


def _check_headers_and_size(request: ApiRequest) -> None:
    if not _REVISION.fullmatch(request.headers.get("revision", "")):
        raise invalid_input("A 'revision' header like 2026-07-15 is required.", "")
    if request.body and request.headers.get("Content-Type", "").partition(";")[0] not in {
        MEDIA_TYPE,
        "application/json",
    }:
        raise ApiError(415, "unsupported_media_type", f"Expected {MEDIA_TYPE}.")
    limit = MAX_PROFILE if path_template(request.path).startswith(("/api/profiles", "/api/profile-import")) else 5 * MB
    if len(request.body) > limit:
        raise ApiError(413, "payload_too_large", f"The body can have at most {limit} bytes.")


def _profile_to_api(request: ApiRequest, profile: Json) -> Json:
    """Return a profile in the format of the API, with the fields that the request selects."""
    attributes = profile["attributes"]
    if "subscriptions" in request.query.get("additional-fields[profile]", [""])[0].split(","):
        attributes = attributes | {"subscriptions": profile["subscriptions"]}
    return selected_fields(request, "profile", {"type": "profile", "id": profile["id"], "attributes": attributes})


def _find_events(account: Account, request: ApiRequest) -> list[Json]:
    """Return the requested events in the format of the API. Raises ApiError.

    The filter `metric_id` is not supported: Klaviyo does not accept custom metrics, and the emulator has no others.
    """
    _, profiles = parse_filter(request, {"profile_id": ("equals",)})
    sort = request.query.get("sort", [""])[0]
    if sort.removeprefix("-") not in {"", "datetime", "timestamp"}:
        raise invalid_input("Unknown sort; expected datetime or timestamp.", "")
    found = [each for each in account.visible_events() if profiles is None or each["profile_id"] in profiles]
    if sort:
        found.sort(key=lambda event: datetime.fromisoformat(event["time"]), reverse=sort.startswith("-"))
    return list(map(_event_to_api, found))


def _event_to_api(event: Json) -> Json:
    moment = datetime.fromisoformat(event["time"])
    return {
        "type": "event",
        "id": event["id"],
        "attributes": {
            "timestamp": int(moment.timestamp()),
            "datetime": moment.isoformat(timespec="seconds"),
            "event_properties": event["properties"],
        },
        "relationships": {"profile": {"data": {"type": "profile", "id": event["profile_id"]}}},
    }
