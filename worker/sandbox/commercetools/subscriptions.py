"""The Subscriptions API of the commercetools emulator, with its documented rules. It delivers no notifications.

https://docs.commercetools.com/api/projects/subscriptions
"""

from __future__ import annotations

import re
import uuid
from dataclasses import dataclass, field
from datetime import UTC, datetime
from threading import Lock
from typing import TYPE_CHECKING, Any

from worker.sandbox.http import ApiResponse, Json

if TYPE_CHECKING:
    from worker.sandbox.http import ApiRequest


MAX_SUBSCRIPTIONS = 50
REQUIRED = {
    "GoogleCloudPubSub": {"projectId", "topic"},
    "SQS": {"queueUrl", "region"},
    "SNS": {"topicArn"},
    "EventBridge": {"region", "accountId"},
    "AzureServiceBus": {"connectionString"},
    "EventGrid": {"uri", "accessKey"},
}
_KEY = re.compile(r"[A-Za-z0-9_-]{2,256}")
_HIDDEN = re.compile(r"(?<=SharedAccessKey=)[^;]+")
_HEALTH = {"Healthy": 200, "TemporaryError": 503}
_ACTIONS = {"setMessages": "messages", "setChanges": "changes", "changeDestination": "destination", "setKey": "key"}
_BY_KEY = "key="


class ApiError(Exception):
    """An error response of commercetools."""

    def __init__(self, status: int, code: str, message: str, **details: Any) -> None:
        super().__init__(message)
        self.status, self.code, self.details = status, code, details


@dataclass
class Subscriptions:
    """The subscriptions of a project. Test messages fail for a destination that contains a text of `unreachable`."""

    unreachable: set[str] = field(default_factory=set)
    has_health: bool = True
    _by_id: dict[str, Json] = field(default_factory=dict)  # with secrets
    _lock: Lock = field(default_factory=Lock)

    def all(self) -> list[Json]:
        """Return all subscriptions with redacted secrets."""
        with self._lock:
            return [_redact(subscription) for subscription in self._by_id.values()]

    def destinations(self) -> list[Json]:
        """Return all destinations with their secrets."""
        with self._lock:
            return [subscription["destination"] for subscription in self._by_id.values()]

    def set_status(self, key: str, status: str) -> None:
        """Set the status of a subscription."""
        with self._lock:
            self._find(_BY_KEY + key)["status"] = status

    def health(self, name: str) -> ApiResponse:
        """Return the response to /health, which requires no token."""
        subscription = self._by_id.get(name)
        if subscription is None or not self.has_health:
            raise ApiError(404, "ResourceNotFound", f"The Resource with ID '{name}' was not found.")
        return ApiResponse(_HEALTH.get(subscription["status"], 400), {})

    def respond(self, request: ApiRequest, name: str) -> ApiResponse:
        """Return the response to a request. `name` is an id, key=KEY, or "" for all. Raises ApiError."""
        with self._lock:
            match request.method, bool(name):
                case "GET", False:
                    redacted = [_redact(subscription) for subscription in self._by_id.values()]
                    return ApiResponse(200, {"limit": 20, "offset": 0, "count": len(redacted), "results": redacted})
                case "POST", False:
                    return ApiResponse(201, _redact(self.create(request.json())))
                case "GET", True:
                    return ApiResponse(200, _redact(self._find(name)))
                case "POST", True:
                    return ApiResponse(200, _redact(self.update(name, request.json())))
                case "DELETE", True:
                    subscription = self._find(name)
                    _check_version(subscription, int(request.query.get("version", ["0"])[0]))
                    return ApiResponse(200, _redact(self._by_id.pop(subscription["id"])))
        raise ApiError(404, "ResourceNotFound", "not found")

    def create(self, draft: Json) -> Json:
        """Create a subscription from a draft, if the test message can be delivered."""
        if len(self._by_id) >= MAX_SUBSCRIPTIONS:
            raise ApiError(400, "MaxResourceLimitExceeded", f"at most {MAX_SUBSCRIPTIONS} subscriptions")
        now = datetime.now(UTC).isoformat()
        subscription = {
            "id": str(uuid.uuid4()),
            "version": 1,
            "createdAt": now,
            "lastModifiedAt": now,
            "messages": [],
            "changes": [],
            "format": {"type": "Platform"},
            **draft,
            "status": "Healthy",
        }
        self._check(subscription)
        self._deliver_test(subscription["destination"])
        self._by_id[subscription["id"]] = subscription
        return subscription

    def update(self, name: str, body: Json) -> Json:
        """Apply all update actions, or none."""
        subscription = self._find(name)
        _check_version(subscription, body.get("version"))
        changed = dict(subscription)
        for action in body.get("actions", []):
            changes = _ACTIONS.get(action.get("action"))
            if changes is None:
                raise ApiError(400, "InvalidJsonInput", f"unknown action {action.get('action')}")
            changed[changes] = action.get(changes)
            if changes == "destination":
                self._deliver_test(changed[changes])
                changed["status"] = "Healthy"
            self._check(changed)
        if changed != subscription:
            changed |= {"version": subscription["version"] + 1, "lastModifiedAt": datetime.now(UTC).isoformat()}
        self._by_id[subscription["id"]] = changed
        return changed

    def _find(self, name: str) -> Json:
        for subscription in self._by_id.values():
            if name in {subscription["id"], f"{_BY_KEY}{subscription.get('key')}"}:
                return subscription
        raise ApiError(404, "ResourceNotFound", f"The Resource with ID '{name}' was not found.")

    def _check(self, subscription: Json) -> None:
        key, destination = subscription.get("key"), subscription.get("destination") or {}
        required = REQUIRED.get(str(destination.get("type")))
        if key is not None and not _KEY.fullmatch(key):
            raise ApiError(400, "InvalidField", "key")
        duplicates = [
            other for other in self._by_id.values() if other["id"] != subscription["id"] and other.get("key") == key
        ]
        if key is not None and duplicates:
            raise ApiError(400, "DuplicateField", f"A duplicate value '{key}' exists for field 'key'.", field="key")
        if required is None or not required <= {name for name, value in destination.items() if value}:
            raise ApiError(400, "InvalidJsonInput", f"destination: expected one of {', '.join(REQUIRED)}, complete")
        if destination["type"] == "EventGrid" and subscription["format"].get("type") != "CloudEvents":
            raise ApiError(400, "InvalidInput", "Event Grid takes the format CloudEvents only")
        if not subscription["messages"] and not subscription["changes"]:
            raise ApiError(400, "InvalidInput", "must contain at least one of 'messages', 'changes', 'events'")

    def _deliver_test(self, destination: Json) -> None:
        if any(text in str(destination) for text in self.unreachable):
            message = f"A test message could not be delivered to this destination: {destination}."
            raise ApiError(400, "InvalidInput", f"{message} Please make sure your destination is correctly configured.")


def _check_version(subscription: Json, version: Any) -> None:
    if version != subscription["version"]:
        current = subscription["version"]
        message = f"Expected version {version} of {subscription['id']}, which has {current}"
        raise ApiError(409, "ConcurrentModification", message, currentVersion=current)


def _redact(subscription: Json) -> Json:
    """Return the subscription with its secrets partly hidden, like commercetools."""
    destination = dict(subscription["destination"])
    for name in ("accessKey", "accessSecret"):
        if name in destination:
            destination[name] = f"{destination[name][:2]}*****"
    if "connectionString" in destination:
        destination["connectionString"] = _HIDDEN.sub(
            lambda found: f"{found[0][:2]}*****", destination["connectionString"]
        )
    return subscription | {"destination": destination}
