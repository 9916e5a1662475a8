"""What a Klaviyo account holds, and how writes change it."""

from __future__ import annotations

import secrets
from datetime import UTC, datetime
from threading import RLock
from typing import Any

from worker.sandbox.rules import IDENTIFIERS, Refused, check_catalog, check_event, check_profile, invalid, resource

PREFIX = "$custom:::$default:::"
_MATCHED_BY = ("email", "phone_number", "external_id", "anonymous_id")

Json = dict[str, Any]


class Account:
    """Profiles, events and the custom catalog of one account. Safe for many threads.

    `bulk_repeats` chooses what nobody documents: whether a bulk call that repeats a unique_id of an
    *earlier* call is taken ("within": only repeats inside one call count), refused ("ever"), or answered
    with 202 and dropped whole ("drop").
    """

    def __init__(self, bulk_repeats: str = "within") -> None:
        self.bulk_repeats = bulk_repeats
        self.profiles: list[Json] = []
        self.events: list[Json] = []
        self.items: dict[str, Json] = {}
        self.variants: dict[str, Json] = {}
        self.categories: dict[str, Json] = {}
        self.deletion_requests: list[Json] = []
        self.repeated_events = 0
        self.lock = RLock()
        self._seen: set[tuple[str, str, str]] = set()
        self._by_id: dict[str, Json] = {}
        self._by_identifier: dict[tuple[str, str], Json] = {}

    def state(self) -> Json:
        """Return everything, for a test in another process."""
        with self.lock:
            names = ("profiles", "events", "items", "variants", "categories", "deletion_requests", "repeated_events")
            return {name: getattr(self, name) for name in names}

    # Profiles

    def import_profile(self, data: Json) -> tuple[int, Json]:
        """Create or update a profile; return status and profile. Raises Refused."""
        attributes = data["attributes"]
        check_profile(attributes)
        with self.lock:
            found = self._matching(data.get("id"), attributes)
            if not found and not any(attributes.get(name) for name in IDENTIFIERS):
                raise invalid("One or more identifiers is required.")
            if len(found) > 1:
                raise _duplicate(found[1])
            profile = found[0] if found else self._new_profile()
            self._write(profile, attributes)
            return (200 if found else 201), profile

    def update_profile(self, profile_id: str, data: Json) -> Json:
        """Update a profile by Klaviyo's id. Raises Refused."""
        attributes = data["attributes"]
        check_profile(attributes)
        if data.get("id") != profile_id:
            raise invalid("'id' must match the path.", "/data/id")
        with self.lock:
            profile = self._by_id.get(profile_id)
            if profile is None:
                raise Refused(404, "not_found", "A profile with this id does not exist.")
            others = [other for other in self._matching(None, attributes) if other is not profile]
            if others:
                raise _duplicate(others[0])
            self._write(profile, attributes)
            return profile

    def find_profiles(self, name: str, value: str) -> list[Json]:
        """Return the profiles with this identifier."""
        with self.lock:
            found = self._by_identifier.get((name, value))
            return [found] if found else []

    def request_deletion(self, profile: Json) -> None:
        """Delete a profile by exactly one of id, email, phone number. Raises Refused."""
        named = {"id": profile.get("id"), **(profile.get("attributes") or {})}
        given = {name: value for name, value in named.items() if value is not None}
        if len(given) != 1 or not given.keys() <= {"id", "email", "phone_number"}:
            raise invalid("Exactly one of id, email, phone_number is required.", "/data/attributes/profile")
        ((name, value),) = given.items()
        with self.lock:
            self.deletion_requests.append(given)
            found = self._by_id.get(value) if name == "id" else self._by_identifier.get((name, value))
            if found is not None:
                self.profiles.remove(found)
                del self._by_id[found["id"]]
                self._by_identifier = {k: v for k, v in self._by_identifier.items() if v is not found}

    def _matching(self, profile_id: str | None, attributes: Json) -> list[Json]:
        found = [self._by_id[profile_id]] if profile_id in self._by_id else []
        keys = ((name, attributes.get(name)) for name in _MATCHED_BY)
        for profile in (self._by_identifier.get(key) for key in keys if key[1]):  # type: ignore[arg-type]
            if profile is not None and all(profile is not other for other in found):
                found.append(profile)
        return found

    def _new_profile(self) -> Json:
        profile: Json = {"type": "profile", "id": secrets.token_hex(13).upper(), "attributes": {"properties": {}}}
        self.profiles.append(profile)
        self._by_id[profile["id"]] = profile
        return profile

    def _write(self, profile: Json, attributes: Json) -> None:
        current = profile["attributes"]
        properties = current["properties"] | (attributes.get("properties") or {})
        current.update({name: value for name, value in attributes.items() if name != "properties"})
        current["properties"] = properties
        for name in _MATCHED_BY:
            if attributes.get(name):
                self._by_identifier[name, attributes[name]] = profile

    # Events

    def create_event(self, attributes: Json) -> None:
        """Record an event, once per profile, metric and unique_id. Raises Refused."""
        check_event(attributes)
        with self.lock:
            profile = self._event_profile(attributes.get("profile"), "/data/attributes/profile")
            self._record(attributes, profile)

    def create_events(self, entries: list[Json]) -> None:
        """Record a bulk call of event-bulk-create entries, all or none. Raises Refused."""
        base = "/data/attributes/events-bulk-create/data"
        planned: list[tuple[Json, Json]] = []
        for index, entry in enumerate(entries):
            pointer = f"{base}/{index}/attributes"
            attributes = resource({"data": entry}, "event-bulk-create", f"{base}/{index}")["attributes"]
            profile = self._event_profile_attributes(attributes.get("profile"), f"{pointer}/profile")
            for number, event in enumerate((attributes.get("events") or {}).get("data") or []):
                at = f"{pointer}/events/data/{number}"
                planned.append((resource({"data": event}, "event", at)["attributes"], profile))
                check_event(planned[-1][0], f"{at}/attributes")
        if not 0 < len(planned) <= 1_000:  # noqa: PLR2004 - Klaviyo's limit
            raise invalid("A bulk call takes 1 to 1000 events.", base)
        self._record_bulk(planned)

    def _record_bulk(self, planned: list[tuple[Json, Json]]) -> None:
        with self.lock:
            keys = [(str(profile), _metric(event), str(event.get("unique_id"))) for event, profile in planned]
            if len(set(keys)) < len(keys):
                raise invalid("unique_id is repeated.", "/data/attributes/events-bulk-create")
            written = [(event, self._import_for_event(profile)) for event, profile in planned]
            known = any(_key(event, profile["id"]) in self._seen for event, profile in written)
            if known and self.bulk_repeats == "ever":
                raise invalid("unique_id is repeated.", "/data/attributes/events-bulk-create")
            if not (known and self.bulk_repeats == "drop"):
                for event, profile in written:
                    self._record(event, profile)

    def _record(self, attributes: Json, profile: Json) -> None:
        key = _key(attributes, profile["id"])
        if key in self._seen:
            self.repeated_events += 1
            return
        self._seen.add(key)
        names = ("unique_id", "time", "value", "value_currency", "properties")
        identity = {name: profile["attributes"].get(name) for name in ("email", "external_id")}
        event = {name: attributes.get(name) for name in names}
        self.events.append({"metric": _metric(attributes), "profile_id": profile["id"], **identity, **event})

    def _event_profile(self, document: Any, pointer: str) -> Json:
        return self._import_for_event(self._event_profile_attributes(document, pointer))

    def _event_profile_attributes(self, document: Any, pointer: str) -> Json:
        data = resource(document, "profile", pointer)
        attributes: Json = data["attributes"] | ({"id": data["id"]} if data.get("id") else {})
        checked = {name: value for name, value in attributes.items() if name != "id"}
        check_profile(checked, f"{pointer}/data/attributes")
        if not any(attributes.get(name) for name in ("id", *IDENTIFIERS)):
            raise invalid("One or more identifiers is required.", pointer)
        return attributes

    def _import_for_event(self, attributes: Json) -> Json:
        """Find by the strongest identifier: an event never fails for belonging to two profiles."""
        found = self._matching(attributes.get("id"), attributes)
        profile = found[0] if found else self._new_profile()
        foreign = [name for name in _MATCHED_BY if self._is_foreign(name, attributes.get(name), profile)]
        self._write(profile, {name: value for name, value in attributes.items() if name not in {"id", *foreign}})
        return profile

    def _is_foreign(self, name: str, value: str | None, profile: Json) -> bool:
        return self._by_identifier.get((name, value or ""), profile) is not profile

    # Catalog

    def create_entry(self, kind: str, data: Json) -> Json:
        """Create a catalog entry. Raises Refused: invalid, exists, or refers to what does not exist."""
        attributes = data["attributes"]
        check_catalog(kind, attributes, create=True)
        external_id = attributes["external_id"]
        with self.lock:
            entries = self.collection(kind)
            if external_id in entries:
                raise Refused(409, "duplicate", f"A {kind} with this external id already exists.")
            entry = {"type": kind, "id": PREFIX + external_id, "attributes": dict(attributes)}
            entry |= self._relationships(kind, data, create=True)
            entries[external_id] = entry
            return entry

    def update_entry(self, kind: str, entry_id: str, data: Json) -> Json:
        """Update a catalog entry in part. Raises Refused."""
        check_catalog(kind, data["attributes"], create=False)
        if data.get("id") != entry_id:
            raise invalid("'id' must match the path.", "/data/id")
        with self.lock:
            entry = self.entry(kind, entry_id)
            entry |= self._relationships(kind, data, create=False)
            entry["attributes"] |= data["attributes"]
            return entry

    def delete_entry(self, kind: str, entry_id: str) -> None:
        """Delete a catalog entry. Raises Refused when there is none."""
        with self.lock:
            self.entry(kind, entry_id)
            del self.collection(kind)[entry_id.removeprefix(PREFIX)]

    def entry(self, kind: str, entry_id: str) -> Json:
        """Return a catalog entry. Raises Refused when there is none."""
        found = self.collection(kind).get(entry_id.removeprefix(PREFIX)) if entry_id.startswith(PREFIX) else None
        if found is None:
            raise Refused(404, "not_found", f"A {kind} with this id does not exist.")
        return found

    def variants_of(self, item_id: str) -> list[Json]:
        """Return an item's variants. Raises Refused when there is no such item."""
        with self.lock:
            self.entry("catalog-item", item_id)
            return [variant for variant in self.variants.values() if variant["item"] == item_id]

    def collection(self, kind: str) -> dict[str, Json]:
        """Return the entries of a kind by external id."""
        return {"catalog-item": self.items, "catalog-variant": self.variants, "catalog-category": self.categories}[kind]

    def _relationships(self, kind: str, data: Json, *, create: bool) -> Json:
        relationships = data.get("relationships") or {}
        if kind == "catalog-variant":
            if not create:
                if relationships:
                    raise invalid("'relationships' is not a valid field.", "/data/relationships")
                return {}
            item = ((relationships.get("item") or {}).get("data") or {}).get("id", "")
            self.entry("catalog-item", item)
            return {"item": item}
        if kind == "catalog-item" and "categories" in relationships:
            categories = [category["id"] for category in relationships["categories"]["data"]]
            for category in categories:
                self.entry("catalog-category", category)
            return {"categories": categories}
        return {}


def _duplicate(profile: Json) -> Refused:
    detail = "A profile already exists with one of these identifiers."
    return Refused(409, "duplicate_profile", detail, "/data/attributes", {"duplicate_profile_id": profile["id"]})


def _metric(attributes: Json) -> str:
    return str(attributes["metric"]["data"]["attributes"]["name"])


def _key(attributes: Json, profile_id: str) -> tuple[str, str, str]:
    """Return what makes an event the same: its unique_id, else its time to the second."""
    time = attributes.get("time") or datetime.now(UTC).isoformat()
    return profile_id, _metric(attributes), attributes.get("unique_id") or time[:19]
