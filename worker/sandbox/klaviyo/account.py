"""The content of a Klaviyo account, and the writes that change it."""

from __future__ import annotations

import secrets
import time
from datetime import UTC, datetime

from worker.sandbox.http import Json
from worker.sandbox.klaviyo.catalog import PREFIX, Catalog
from worker.sandbox.klaviyo.profiles import PHONE_MATCHES, Profiles
from worker.sandbox.klaviyo.rules import (
    BULK_ENTRY,
    IDENTIFIERS,
    check_event,
    check_fields,
    check_profile,
    entries_of,
    invalid_input,
    require_resource,
)

__all__ = ["BULK_REPEATS", "PHONE_MATCHES", "PREFIX", "Account", "Json"]

MAX_BULK_EVENTS = 1_000
BULK_REPEATS = ("ignore", "refuse", "drop", "duplicate")


class Account(Profiles, Catalog):
    """Profiles, events and the custom catalog of one account. Safe for many threads.

    `bulk_repeats` selects the treatment of a bulk call that repeats a unique_id of an *earlier* call, which Klaviyo
    does not document. "ignore": accept the call and ignore the repeated event. "refuse": reject the call. "drop":
    answer 202 and drop the whole call. "duplicate": accept the call and record the event again.
    `job_seconds`: how long a bulk job takes, and after how long the events of a bulk call can be read.
    `phone_match` and `merge_seconds`: see Profiles.
    """

    def __init__(
        self,
        bulk_repeats: str = "drop",
        job_seconds: float = 0.0,
        *,
        phone_match: str = "select",
        merge_seconds: float = 0.0,
    ) -> None:
        super().__init__(phone_match, merge_seconds)
        self.bulk_repeats = bulk_repeats
        self.job_seconds = job_seconds
        self.events: list[Json] = []
        self.accepted_events = 0  # in calls that were answered with 202, even if they were not recorded
        self.repeated_events = 0
        self._seen: set[tuple[str, str, str]] = set()
        self._visible_from: list[float] = []  # monotonic seconds, one per event

    def load(self, content: Json) -> None:
        """Add `profiles` by attributes, and the catalog, as other clients wrote them."""
        super().load(content)
        with self.lock:
            for attributes in content.get("profiles", []):
                profile = self._new_profile()
                profile["subscriptions"] = attributes.get("subscriptions", {})
                self._write(profile, {name: value for name, value in attributes.items() if name != "subscriptions"})

    def state(self) -> Json:
        """Return the content of the account, for a test in another process."""
        names = ("profiles", "events", "items", "variants", "categories", "deletion_requests", "merges")
        with self.lock:
            self._end_merges()
            return {name: getattr(self, name) for name in (*names, "repeated_events")}

    def counts(self) -> dict[str, int]:
        """Return the number of entries of each kind."""
        with self.lock:
            names = ("profiles", "events", "items", "variants", "categories")
            counts = {name: len(getattr(self, name)) for name in names}
            return counts | {"repeated_events": self.repeated_events, "accepted_events": self.accepted_events}

    # Events

    def create_event(self, attributes: Json) -> None:
        """Record an event, once per profile, metric and unique_id. Raises ApiError."""
        check_event(attributes)
        with self.lock:
            profile = self.upsert_event_profile(_profile_of(attributes, "/data/attributes"))
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
            profile = _profile_of(attributes, pointer)
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
            profile = self.upsert_event_profile(attributes)
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

    def _move_events(self, source_id: str, destination_id: str) -> None:
        for event in self.events:
            if event["profile_id"] == source_id:
                event["profile_id"] = destination_id


def _profile_of(attributes: Json, pointer: str) -> Json:
    """Return the identifiers and attributes of an event's profile. Raises ApiError."""
    data = require_resource(attributes.get("profile"), "profile", f"{pointer}/profile")
    profile: Json = data["attributes"] | ({"id": data["id"]} if data.get("id") else {})
    check_profile(data["attributes"], f"{pointer}/profile/data/attributes", of_event=True)
    if not any(profile.get(name) for name in ("id", *IDENTIFIERS)):
        raise invalid_input("One or more identifiers is required.", f"{pointer}/profile")
    return profile


def _metric(attributes: Json) -> str:
    return str(attributes["metric"]["data"]["attributes"]["name"])


def _event_key(attributes: Json, profile_id: str) -> tuple[str, str, str]:
    """Return the identity of an event: profile, metric, and unique_id or the time in seconds."""
    unique_id = attributes.get("unique_id")
    if not unique_id:
        moment = datetime.fromisoformat(attributes.get("time") or datetime.now(UTC).isoformat())
        unique_id = f"at {int(moment.timestamp())}"
    return profile_id, _metric(attributes), unique_id
