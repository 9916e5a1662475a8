"""The content of a Klaviyo account, and the writes that change it."""

from __future__ import annotations

import secrets
import time
from datetime import UTC, datetime
from typing import Any

from worker.sandbox.klaviyo.catalog import PREFIX, Catalog, Json
from worker.sandbox.klaviyo.rules import (
    BULK_ENTRY,
    IDENTIFIERS,
    ApiError,
    check_event,
    check_fields,
    check_profile,
    entries_of,
    invalid_input,
    require_resource,
)

__all__ = ["BULK_REPEATS", "PREFIX", "Account", "Json"]

MAX_BULK_EVENTS = 1_000
BULK_REPEATS = ("ignore", "refuse", "drop", "duplicate")
_MATCHING_FIELDS = ("email", "phone_number", "external_id", "anonymous_id")


class Account(Catalog):
    """Profiles, events and the custom catalog of one account. Safe for many threads.

    `bulk_repeats` selects the treatment of a bulk call that repeats a unique_id of an *earlier* call, which Klaviyo
    does not document. "ignore": accept the call and ignore the repeated event. "refuse": reject the call. "drop":
    answer 202 and drop the whole call. "duplicate": accept the call and record the event again.
    `job_seconds`: how long a bulk job takes, and after how long the events of a bulk call can be read.
    """

    def __init__(self, bulk_repeats: str = "drop", job_seconds: float = 0.0) -> None:
        super().__init__()
        self.bulk_repeats = bulk_repeats
        self.job_seconds = job_seconds
        self.profiles: list[Json] = []
        self.events: list[Json] = []
        self.deletion_requests: list[Json] = []
        self.accepted_events = 0  # in calls that were answered with 202, even if they were not recorded
        self.repeated_events = 0
        self._seen: set[tuple[str, str, str]] = set()
        self._visible_from: list[float] = []  # monotonic seconds, one per event
        self._by_id: dict[str, Json] = {}
        self._by_identifier: dict[tuple[str, str], Json] = {}

    def load(self, content: Json) -> None:
        """Add `profiles` by attributes, and the catalog, as other clients wrote them."""
        super().load(content)
        with self.lock:
            for attributes in content.get("profiles", []):
                self._write(self._new_profile(), attributes)

    def state(self) -> Json:
        """Return the content of the account, for a test in another process."""
        with self.lock:
            names = ("profiles", "events", "items", "variants", "categories", "deletion_requests", "repeated_events")
            return {name: getattr(self, name) for name in names}

    def counts(self) -> dict[str, int]:
        """Return the number of entries of each kind."""
        with self.lock:
            names = ("profiles", "events", "items", "variants", "categories")
            counts = {name: len(getattr(self, name)) for name in names}
            return counts | {"repeated_events": self.repeated_events, "accepted_events": self.accepted_events}

    # Profiles

    def import_profile(self, data: Json) -> tuple[int, Json]:
        """Create or update a profile; return status and profile. Raises ApiError."""
        attributes = data["attributes"]
        check_profile(attributes)
        with self.lock:
            found = self._find_matching(data.get("id"), attributes)
            if len(found) > 1:
                raise _duplicate(found[1])
            if not found:
                return 201, self.create_profile(data)
            self._write(found[0], attributes)
            return 200, found[0]

    def create_profile(self, data: Json) -> Json:
        """Create a profile. Raises ApiError if it is invalid or a profile has one of the identifiers."""
        attributes = data["attributes"]
        check_profile(attributes)
        if not any(attributes.get(name) for name in IDENTIFIERS):
            raise invalid_input("One or more identifiers is required.")
        with self.lock:
            found = self._find_matching(None, attributes)
            if found:
                raise _duplicate(found[0])
            profile = self._new_profile()
            self._write(profile, attributes)
            return profile

    def update_profile(self, profile_id: str, data: Json) -> Json:
        """Update a profile by Klaviyo's id. Raises ApiError."""
        attributes = data["attributes"]
        check_profile(attributes)
        if data.get("id") != profile_id:
            raise invalid_input("'id' must match the path.", "/data/id")
        with self.lock:
            profile = self.get_profile(profile_id)
            others = [other for other in self._find_matching(None, attributes) if other is not profile]
            if others:
                raise _duplicate(others[0])
            self._write(profile, attributes)
            return profile

    def get_profile(self, profile_id: str) -> Json:
        """Return a profile by Klaviyo's id. Raises ApiError if there is none."""
        found = self._by_id.get(profile_id)
        if found is None:
            raise ApiError(404, "not_found", "A profile with this id does not exist.")
        return found

    def find_profiles(self, name: str, value: str) -> list[Json]:
        """Return the profiles with this identifier."""
        with self.lock:
            found = self._by_id.get(value) if name == "id" else self._by_identifier.get((name, value))
            return [found] if found else []

    def request_deletion(self, profile: Json) -> None:
        """Delete a profile by exactly one of id, email and phone number. Raises ApiError."""
        named = {"id": profile.get("id"), **(profile.get("attributes") or {})}
        given = {name: value for name, value in named.items() if value is not None}
        if len(given) != 1 or not given.keys() <= {"id", "email", "phone_number"}:
            raise invalid_input("Exactly one of id, email, phone_number is required.", "/data/attributes/profile")
        ((name, value),) = given.items()
        if not isinstance(value, str):
            raise invalid_input(f"'{name}' must be of type str.", f"/data/attributes/profile/data/attributes/{name}")
        with self.lock:
            self.deletion_requests.append(given)
            found = self._by_id.get(value) if name == "id" else self._by_identifier.get((name, value))
            if found is not None:
                self.profiles.remove(found)
                del self._by_id[found["id"]]
                self._by_identifier = {k: v for k, v in self._by_identifier.items() if v is not found}

    def _find_matching(self, profile_id: str | None, attributes: Json) -> list[Json]:
        found = [self._by_id[profile_id]] if profile_id in self._by_id else []
        for name in _MATCHING_FIELDS:
            value = attributes.get(name)
            profile = self._by_identifier.get((name, value)) if value else None
            if profile is not None and all(profile is not other for other in found):
                found.append(profile)
        return found

    def _new_profile(self) -> Json:
        attributes: Json = {"properties": {}, "created": datetime.now(UTC).isoformat()}
        profile: Json = {"type": "profile", "id": secrets.token_hex(13).upper(), "attributes": attributes}
        self.profiles.append(profile)
        self._by_id[profile["id"]] = profile
        return profile

    def _write(self, profile: Json, attributes: Json) -> None:
        current = profile["attributes"]
        for name in _MATCHING_FIELDS:
            if name in attributes and current.get(name) != attributes[name]:
                self._by_identifier.pop((name, current.get(name) or ""), None)
        properties = current["properties"] | (attributes.get("properties") or {})
        current.update({name: value for name, value in attributes.items() if name != "properties"})
        current["properties"] = properties
        for name in _MATCHING_FIELDS:
            if attributes.get(name):
                self._by_identifier[name, attributes[name]] = profile

    # Events

    def create_event(self, attributes: Json) -> None:
        """Record an event, once per profile, metric and unique_id. Raises ApiError."""
        check_event(attributes)
        with self.lock:
            profile = self._event_profile(attributes.get("profile"), "/data/attributes/profile")
            self.accepted_events += 1
            self._record(attributes, profile)

    def create_events(self, entries: list[Json]) -> None:
        """Record a bulk call of event-bulk-create entries, all or none. Raises ApiError."""
        base = "/data/attributes/events-bulk-create/data"
        batches: list[tuple[Json, list[Json]]] = []  # a profile and its events
        for index, entry in enumerate(entries):
            pointer = f"{base}/{index}/attributes"
            attributes = require_resource({"data": entry}, "event-bulk-create", f"{base}/{index}")["attributes"]
            check_fields("event-bulk-create", attributes, BULK_ENTRY, pointer)
            profile = self._event_profile_attributes(attributes.get("profile"), f"{pointer}/profile")
            events, marked = [], {"backfill": attributes.get("backfill")}
            for number, event in enumerate(entries_of(attributes, "events", pointer=pointer)):
                at = f"{pointer}/events/data/{number}"
                events.append(marked | require_resource({"data": event}, "event", at)["attributes"])
                check_event(events[-1], f"{at}/attributes", bulk=True)
            batches.append((profile, events))
        if not 0 < sum(len(events) for _, events in batches) <= MAX_BULK_EVENTS:
            raise invalid_input(f"A bulk call takes 1 to {MAX_BULK_EVENTS} events.", base)
        with self.lock:
            self._record_bulk(batches, base)

    def _record_bulk(self, batches: list[tuple[Json, list[Json]]], base: str) -> None:
        keys: list[tuple[str, str, str]] = []
        for profile, events in batches:
            profile_id = self._identity(profile)
            keys += [_event_key(event, profile_id) for event in events if event.get("unique_id")]
        known = any(key in self._seen for key in keys)
        if len(set(keys)) < len(keys) or (known and self.bulk_repeats == "refuse"):
            raise invalid_input("'unique_id' is repeated for the same profile and metric.", base)
        self.accepted_events += sum(len(events) for _, events in batches)
        if known and self.bulk_repeats == "drop":
            return
        for attributes, events in batches:
            profile = self._upsert_event_profile(attributes)
            for event in events:
                self._record(event, profile, self.job_seconds, duplicate=self.bulk_repeats == "duplicate")

    def _identity(self, attributes: Json) -> str:
        """Return the id of the profile that matches the attributes; if there is none, the strongest identifier."""
        found = self._find_matching(attributes.get("id"), attributes)
        return found[0]["id"] if found else str(next(attributes[n] for n in ("id", *IDENTIFIERS) if attributes.get(n)))

    def visible_events(self) -> list[Json]:
        """Return the events that can be read now."""
        now = time.monotonic()
        with self.lock:
            return [event for event, at in zip(self.events, self._visible_from, strict=True) if at <= now]

    def _record(self, attributes: Json, profile: Json, delay: float = 0.0, *, duplicate: bool = False) -> None:
        key = _event_key(attributes, profile["id"])
        if key in self._seen:
            self.repeated_events += 1
            if not duplicate:
                return
        self._seen.add(key)
        names = ("unique_id", "time", "value", "value_currency", "properties", "backfill")
        identity = {name: profile["attributes"].get(name) for name in ("email", "external_id")}
        event = {name: attributes.get(name) for name in names}
        event |= {"id": secrets.token_urlsafe(8), "time": event["time"] or datetime.now(UTC).isoformat()}
        self.events.append({"metric": _metric(attributes), "profile_id": profile["id"], **identity, **event})
        self._visible_from.append(time.monotonic() + delay)

    def _event_profile(self, document: Any, pointer: str) -> Json:
        return self._upsert_event_profile(self._event_profile_attributes(document, pointer))

    def _event_profile_attributes(self, document: Any, pointer: str) -> Json:
        data = require_resource(document, "profile", pointer)
        attributes: Json = data["attributes"] | ({"id": data["id"]} if data.get("id") else {})
        check_profile(data["attributes"], f"{pointer}/data/attributes", of_event=True)
        if not any(attributes.get(name) for name in ("id", *IDENTIFIERS)):
            raise invalid_input("One or more identifiers is required.", pointer)
        return attributes

    def _upsert_event_profile(self, attributes: Json) -> Json:
        """Update the profile with the strongest identifier. An event that matches two profiles is not rejected."""
        found = self._find_matching(attributes.get("id"), attributes)
        profile = found[0] if found else self._new_profile()
        taken = [name for name in _MATCHING_FIELDS if self._is_taken(name, attributes.get(name), profile)]
        self._write(profile, {name: value for name, value in attributes.items() if name not in {"id", "meta", *taken}})
        return profile

    def _is_taken(self, name: str, value: str | None, profile: Json) -> bool:
        return self._by_identifier.get((name, value or ""), profile) is not profile


def _duplicate(profile: Json) -> ApiError:
    detail = "A profile already exists with one of these identifiers."
    return ApiError(409, "duplicate_profile", detail, "/data/attributes", {"duplicate_profile_id": profile["id"]})


def _metric(attributes: Json) -> str:
    return str(attributes["metric"]["data"]["attributes"]["name"])


def _event_key(attributes: Json, profile_id: str) -> tuple[str, str, str]:
    """Return the identity of an event: profile, metric, and unique_id or the time in seconds."""
    unique_id = attributes.get("unique_id")
    if not unique_id:
        moment = datetime.fromisoformat(attributes.get("time") or datetime.now(UTC).isoformat())
        unique_id = f"at {int(moment.timestamp())}"
    return profile_id, _metric(attributes), unique_id
