"""The profiles of a Klaviyo account: identifiers, imports, merges and deletions."""

from __future__ import annotations

import secrets
import time
from abc import ABC, abstractmethod
from datetime import UTC, datetime
from threading import RLock
from typing import TYPE_CHECKING, Any, NamedTuple

from worker.sandbox.klaviyo import subscriptions
from worker.sandbox.klaviyo.rules import IDENTIFIERS, ApiError, check_profile, invalid_input
from worker.sandbox.klaviyo.subscriptions import ADDRESS

if TYPE_CHECKING:
    from worker.sandbox.http import Json

PHONE_MATCHES = ("select", "conflict")
_MATCHING_FIELDS = ("email", "phone_number", "external_id", "anonymous_id")
_OBJECTS = ("location", "properties")  # their entries are written one by one


class _Merge(NamedTuple):
    due_at: float  # monotonic seconds
    destination_id: str
    source_id: str


class Profiles(ABC):
    """The profiles of one account. Safe for many threads.

    `phone_match` selects the treatment of a write whose identifiers match a profile by its phone number alone, which
    Klaviyo does not document. "select": update that profile. "conflict": answer 409; an event loses the phone number.
    `merge_seconds`: how long a merge takes.
    """

    def __init__(self, phone_match: str = "select", merge_seconds: float = 0.0) -> None:
        super().__init__()
        self.lock = RLock()
        self.phone_match = phone_match
        self.merge_seconds = merge_seconds
        self.profiles: list[Json] = []
        self.deletion_requests: list[Json] = []
        self.merges: list[tuple[str, str]] = []  # ids of destination and source
        self._by_id: dict[str, Json] = {}
        self._by_identifier: dict[tuple[str, str], Json] = {}
        self._merges_in_progress: list[_Merge] = []

    def import_profile(self, data: Json) -> tuple[int, Json]:
        """Create or update a profile; return status and profile. Raises ApiError."""
        attributes = data["attributes"]
        check_profile(attributes)
        with self.lock:
            found = self._find_matching(data.get("id"), attributes)
            if len(found) > 1 or (found and self._is_conflict(found[0], data.get("id"), attributes)):
                raise _duplicate(found[-1])
            if not found:
                return 201, self.create_profile(data)
            self._write(found[0], attributes)
            return 200, found[0]

    def import_entry(self, entry: Json) -> None:
        """Create or update a profile as part of a bulk job, which ignores nulls. Raises ApiError."""
        attributes = {name: value for name, value in entry["attributes"].items() if value is not None}
        for name in set(_OBJECTS) & attributes.keys():
            attributes[name] = {key: value for key, value in attributes[name].items() if value is not None}
        self.import_profile(entry | {"attributes": attributes})

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

    def merge_profiles(self, destination_id: str, source_ids: list[str]) -> Json:
        """Merge a profile into another one, `merge_seconds` from now. Return the destination. Raises ApiError."""
        if len(source_ids) != 1 or source_ids[0] == destination_id:
            raise invalid_input("Exactly one other profile is required.", "/data/relationships/profiles")
        with self.lock:
            destination, source = self.get_profile(destination_id), self.get_profile(source_ids[0])
            self.merges.append((destination["id"], source["id"]))
            merge = _Merge(time.monotonic() + self.merge_seconds, destination["id"], source["id"])
            self._merges_in_progress.append(merge)
            self._end_merges()
            return destination

    def get_profile(self, profile_id: str) -> Json:
        """Return a profile by Klaviyo's id. Raises ApiError if there is none."""
        with self.lock:
            self._end_merges()
            found = self._by_id.get(profile_id)
        if found is None:
            raise ApiError(404, "not_found", "A profile with this id does not exist.")
        return found

    def find_profiles(self, name: str, value: str) -> list[Json]:
        """Return the profiles with this identifier."""
        with self.lock:
            self._end_merges()
            found = self._by_id.get(value) if name == "id" else self._by_identifier.get(_key(name, value))
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
            for found in self.find_profiles(name, value):
                self._remove(found)

    def subscribe(self, entry: Json) -> None:
        """Subscribe the profile of an entry of a subscription job. Create it if there is none."""
        with self.lock:
            profile = self._subscribed_profile(entry)
            profile["subscriptions"] = subscriptions.subscribe(profile["subscriptions"], entry)

    def unsubscribe(self, entry: Json) -> None:
        """Unsubscribe the profile of an entry of a job that unsubscribes. Create it if there is none."""
        with self.lock:
            profile = self._subscribed_profile(entry)
            profile["subscriptions"] = subscriptions.unsubscribe(profile["subscriptions"], entry)

    def _subscribed_profile(self, entry: Json) -> Json:
        """Return the profile with the id of the entry, else with its addresses, which are written to it."""
        addresses = {name: entry["attributes"][name] for name in ADDRESS.values() if name in entry["attributes"]}
        found = self._find_matching(entry.get("id"), addresses)
        profile = found[0] if found else self._new_profile()
        self._write(profile, {n: v for n, v in addresses.items() if not self._is_taken(n, v, profile)})
        return profile

    def _end_merges(self) -> None:
        """End the merges whose time has come: the destination gets what it does not have, and the source goes."""
        now = time.monotonic()
        for merge in [merge for merge in self._merges_in_progress if merge.due_at <= now]:
            self._merges_in_progress.remove(merge)
            destination, source = self._by_id.get(merge.destination_id), self._by_id.get(merge.source_id)
            if destination is not None and source is not None:
                self._remove(source)
                self._write(destination, _fill(destination["attributes"], source["attributes"]))
                self._move_events(source["id"], destination["id"])

    @abstractmethod
    def _move_events(self, source_id: str, destination_id: str) -> None:
        """Move the events of a profile to another one."""

    def _remove(self, profile: Json) -> None:
        self.profiles.remove(profile)
        del self._by_id[profile["id"]]
        self._by_identifier = {k: v for k, v in self._by_identifier.items() if v is not profile}

    def _is_conflict(self, profile: Json, profile_id: str | None, attributes: Json) -> bool:
        """Return whether the phone number alone is no reason to update the profile."""
        others = [name for name in _MATCHING_FIELDS if name != "phone_number" and attributes.get(name)]
        is_match = profile["id"] == profile_id or any(
            self._by_identifier.get(_key(name, attributes[name])) is profile for name in others
        )
        return self.phone_match == "conflict" and bool(others) and not is_match

    def _find_matching(self, profile_id: str | None, attributes: Json) -> list[Json]:
        self._end_merges()
        found = [self._by_id[profile_id]] if profile_id in self._by_id else []
        for name in _MATCHING_FIELDS:
            value = attributes.get(name)
            profile = self._by_identifier.get(_key(name, value)) if value else None
            if profile is not None and all(profile is not other for other in found):
                found.append(profile)
        return found

    def _new_profile(self) -> Json:
        attributes: Json = {"properties": {}, "created": datetime.now(UTC).isoformat()}
        profile: Json = {"type": "profile", "id": secrets.token_hex(13).upper(), "attributes": attributes}
        profile["subscriptions"] = {}
        self.profiles.append(profile)
        self._by_id[profile["id"]] = profile
        return profile

    def _write(self, profile: Json, attributes: Json) -> None:
        """Write attributes. Null clears an attribute, or an entry of the location or the properties."""
        current, before = profile["attributes"], dict(profile["attributes"])
        for name in _MATCHING_FIELDS:
            if name in attributes and current.get(name) != attributes[name]:
                self._by_identifier.pop(_key(name, current.get(name) or ""), None)
        for name, value in attributes.items():
            current[name] = value
            if name in _OBJECTS:
                merged = (before.get(name) or {}) | value if value is not None else {}
                current[name] = {key: each for key, each in merged.items() if each is not None}
        for name in _MATCHING_FIELDS:
            if attributes.get(name):
                self._by_identifier[_key(name, attributes[name])] = profile

    def upsert_event_profile(self, attributes: Json) -> Json:
        """Update the profile with the strongest identifier. An event that matches two profiles is not rejected."""
        found = self._find_matching(attributes.get("id"), attributes)
        if found and self._is_conflict(found[0], attributes.get("id"), attributes):
            found = found[1:]
        profile = found[0] if found else self._new_profile()
        taken = [name for name in _MATCHING_FIELDS if self._is_taken(name, attributes.get(name), profile)]
        self._write(profile, {name: value for name, value in attributes.items() if name not in {"id", "meta", *taken}})
        return profile

    def _is_taken(self, name: str, value: str | None, profile: Json) -> bool:
        return self._by_identifier.get(_key(name, value or ""), profile) is not profile


def _key(name: str, value: str) -> tuple[str, str]:
    """Return the key of an identifier. Email addresses are compared without regard to case."""
    return name, value.lower() if name == "email" else value


def _fill(destination: Json, source: Json) -> Json:
    """Return the attributes that the destination of a merge gets from its source."""
    filled: Json = {}
    for name, value in source.items():
        if name in _OBJECTS:
            filled[name] = {
                key: each for key, each in (value or {}).items() if key not in (destination.get(name) or {})
            }
        elif destination.get(name) is None:
            filled[name] = value
    return filled


def _duplicate(profile: Json) -> ApiError:
    detail = "A profile already exists with one of these identifiers."
    meta: dict[str, Any] = {"duplicate_profile_id": profile["id"]}
    return ApiError(409, "duplicate_profile", detail, "/data/attributes", meta)
