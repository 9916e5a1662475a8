"""[Operation] -> what became of each. The only stage that writes to Klaviyo; every write may be repeated."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from threading import Lock
from typing import TYPE_CHECKING
from urllib.parse import quote

import cachetools
import orjson

from worker.bulk import BulkEvents
from worker.errors import Rejected, Transient, WorkerError
from worker.identifiers import BY_STRENGTH, invalid_identifier, without
from worker.model import Json, Kind, Operation, Sent
from worker.telemetry import log
from worker.transform.catalog import catalog_id

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from worker.bulk import Client, Mode

# What later phases need must be there first; within a phase operations go side by side.
PHASES: tuple[frozenset[Kind], ...] = (
    frozenset({Kind.CREATE_EVENT, Kind.UPSERT_PROFILE, Kind.UPSERT_CATEGORY, Kind.ENSURE_CATEGORY}),
    frozenset({Kind.UPSERT_ITEM, Kind.DELETE_PROFILE}),
    frozenset({Kind.DELETE_STALE_VARIANTS}),  # first: a sku may have moved to another product
    frozenset({Kind.UPSERT_VARIANT, Kind.UPDATE_INVENTORY}),
    frozenset({Kind.DELETE_ITEM, Kind.DELETE_CATEGORY}),
)
_COLLECTION = {
    Kind.UPSERT_CATEGORY: "/api/catalog-categories",
    Kind.ENSURE_CATEGORY: "/api/catalog-categories",
    Kind.DELETE_CATEGORY: "/api/catalog-categories",
    Kind.UPSERT_ITEM: "/api/catalog-items",
    Kind.DELETE_ITEM: "/api/catalog-items",
    Kind.DELETE_STALE_VARIANTS: "/api/catalog-items",
    Kind.UPSERT_VARIANT: "/api/catalog-variants",
    Kind.UPDATE_INVENTORY: "/api/catalog-variants",
}
_CREATE_ONLY = frozenset({"external_id", "integration_type", "catalog_type"})
_REMEMBERED, _REMEMBERED_SECONDS = 50_000, 600.0  # catalog entries known to exist; forgetting one costs a call
_NOT_FOUND, _CONFLICT = 404, 409

Name = tuple[Kind, str]


@dataclass(frozen=True, slots=True)
class Request:
    """An HTTP request to Klaviyo."""

    method: str
    path: str
    body: Json | None = None


def request_for(operation: Operation) -> Request:
    """Return the request that carries out an operation, or the first of them: its whole meaning for a reader."""
    match operation.kind:
        case Kind.CREATE_EVENT:
            return Request("POST", "/api/events", {"data": operation.resource})
        case Kind.UPSERT_PROFILE:
            return Request("POST", "/api/profile-import", {"data": operation.resource})
        case Kind.DELETE_PROFILE:
            return _deletion(f"the profile with external_id {operation.key}")
        case Kind.DELETE_STALE_VARIANTS:
            return Request("GET", _entry(operation) + "/variants", {"keep": sorted(operation.keep)})
        case Kind.DELETE_ITEM | Kind.DELETE_CATEGORY:
            return Request("DELETE", _entry(operation))
        case Kind.UPDATE_INVENTORY:
            return Request("PATCH", _entry(operation), {"data": operation.resource})
        case _:
            return Request("POST", _COLLECTION[operation.kind], {"data": operation.resource})


class Sender:
    """Carries out operations, side by side where they do not depend on each other, many events in one call."""

    def __init__(
        self, client: Client, concurrency: int, *, bulk_events: Mode = "auto", bulk_threshold: int = 10
    ) -> None:
        self._client = client
        self._bulk = BulkEvents(client, self._one_by_one, bulk_events, bulk_threshold)
        self._executor = ThreadPoolExecutor(concurrency, thread_name_prefix="klaviyo")
        self._exists: cachetools.TTLCache[str, bool]
        self._exists = cachetools.TTLCache(_REMEMBERED, _REMEMBERED_SECONDS)
        self._lock = Lock()
        self._special: dict[Kind, Callable[[Operation], None]] = {
            Kind.CREATE_EVENT: self._create_event,
            Kind.UPSERT_PROFILE: self._upsert_profile,
            Kind.DELETE_PROFILE: self._delete_profile,
            Kind.UPSERT_CATEGORY: self._upsert,
            Kind.ENSURE_CATEGORY: self._ensure,
            Kind.UPSERT_ITEM: self._upsert,
            Kind.UPSERT_VARIANT: self._upsert,
            Kind.UPDATE_INVENTORY: self._update_inventory,
            Kind.DELETE_STALE_VARIANTS: self._delete_stale_variants,
            Kind.DELETE_ITEM: self._delete,
            Kind.DELETE_CATEGORY: self._delete,
        }

    def send(self, operations: Sequence[Operation]) -> list[Sent]:
        """Carry out the operations; return what became of each, in their order.

        Operations of one kind and key are done once: the last counts for all of them.
        """
        in_bulk = {(Kind.CREATE_EVENT, key) for key in self._bulk.choose(operations)}
        distinct = {(operation.kind, operation.key): operation for operation in operations}
        results: dict[Name, Sent] = {}
        for phase in PHASES:
            group = {name: operation for name, operation in distinct.items() if name[0] in phase}
            bulk = {name: group.pop(name) for name in [*group] if name in in_bulk}
            under_way = self._one_by_one(list(group.values()))
            results |= zip(bulk, self._bulk.send(list(bulk.values())), strict=True)
            results |= zip(group, under_way, strict=True)
        return [results[operation.kind, operation.key] for operation in operations]

    def close(self) -> None:
        """Drop what has not begun."""
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _one_by_one(self, operations: Sequence[Operation]) -> Iterable[Sent]:
        """Begin to carry out the operations side by side, and yield their results."""
        if len(operations) <= 1:  # an idle worker pays for no thread hop
            return map(self._attempt, operations)
        return self._executor.map(self._attempt, operations)

    def _attempt(self, operation: Operation) -> Sent:
        before, error = self._client.made(), None
        try:
            self._special.get(operation.kind, self._simple)(operation)
        except WorkerError as failure:
            error = failure
        return Sent(error, self._client.made() - before)

    def _simple(self, operation: Operation) -> None:
        request = request_for(operation)
        self._client.call(request.method, request.path, request.body)

    def _create_event(self, operation: Operation) -> None:
        self._write_profile("POST", "/api/events", operation.resource or {})

    def _upsert_profile(self, operation: Operation) -> None:
        """Import the profile. A 409 names another profile with one of its identifiers: write to that one.

        When that conflicts too, the identifiers belong to several profiles, and Klaviyo merges none of them
        by itself: give up the weaker ones rather than the update.
        """
        resource = operation.resource or {}
        try:
            return self._import(resource)
        except Rejected as error:
            if error.status != _CONFLICT:
                raise
            duplicate = error.duplicate_id
        try:
            if duplicate:
                path = f"/api/profiles/{quote(duplicate, safe='')}"
                return self._write_profile("PATCH", path, resource | {"id": duplicate})
        except Rejected as error:
            if error.status != _CONFLICT:
                raise
        return self._import_strongest(resource)

    def _import_strongest(self, resource: Json) -> None:
        """Import with the phone number left out, then with nothing but the strongest identifier."""
        attributes = dict(resource["attributes"])
        strongest = next(name for name in BY_STRENGTH if name in attributes)
        without_phone = {n: v for n, v in attributes.items() if n != "phone_number" or n == strongest}
        alone = {n: v for n, v in without_phone.items() if n != "external_id" or n == strongest}
        try:
            self._import(resource | {"attributes": without_phone})
        except Rejected as error:
            if error.status != _CONFLICT:
                raise
            self._import(resource | {"attributes": alone})

    def _import(self, resource: Json) -> None:
        self._write_profile("POST", "/api/profile-import", resource)

    def _write_profile(self, method: str, path: str, resource: Json) -> None:
        """Write a profile or an event, without an invalid email or phone where something else identifies it."""
        try:
            self._client.call(method, path, {"data": resource})
        except Rejected as error:
            identifier = invalid_identifier(error)
            rest = without(resource, identifier) if identifier else None
            if rest is None:
                raise
            log.warning("identifier_left_out", extra={"identifier": identifier, "resource": resource["type"]})
            self._write_profile(method, path, rest)

    def _delete_profile(self, operation: Operation) -> None:
        """Request the deletion of every profile with this external_id: the endpoint itself takes none."""
        literal = orjson.dumps(operation.key).decode()
        path = f"/api/profiles?filter={quote(f'equals(external_id,{literal})')}&fields%5Bprofile%5D=id"
        for profile in self._client.call("GET", path).get("data", []):
            request = _deletion(profile["id"])
            self._client.call(request.method, request.path, request.body)

    def _upsert(self, operation: Operation) -> None:
        """Create, or update what exists; what this process has seen exist is updated at once."""
        entry = _entry(operation)
        if self._knows(entry):
            try:
                self._update(operation)
            except Rejected as error:
                if error.status != _NOT_FOUND:
                    raise
            else:
                return
        if not self._created(operation):
            try:
                self._update(operation)
            except Rejected as error:
                if error.status != _NOT_FOUND:
                    raise
                raise Transient(f"another process deleted {operation.kind.value} meanwhile") from None
        self._remember(entry)

    def _ensure(self, operation: Operation) -> None:
        """Create what is missing and leave alone what is there."""
        entry = _entry(operation)
        if not self._knows(entry):
            self._created(operation)
            self._remember(entry)

    def _created(self, operation: Operation) -> bool:
        """Create the entry; False when it exists."""
        try:
            self._client.call("POST", _COLLECTION[operation.kind], {"data": operation.resource})
        except Rejected as error:
            if error.status != _CONFLICT:
                raise
            return False
        return True

    def _update(self, operation: Operation) -> None:
        resource = operation.resource or {}
        attributes = {n: v for n, v in resource["attributes"].items() if n not in _CREATE_ONLY}
        update = {"type": resource["type"], "id": catalog_id(operation.key), "attributes": attributes}
        if operation.kind is not Kind.UPSERT_VARIANT and "relationships" in resource:
            update["relationships"] = resource["relationships"]  # a variant never changes its item
        self._client.call("PATCH", _entry(operation), {"data": update})

    def _update_inventory(self, operation: Operation) -> None:
        """Update the stock. Klaviyo lacks the variant: write the product, or nothing when it has none."""
        try:
            self._simple(operation)
        except Rejected as error:
            if error.status != _NOT_FOUND:
                raise
            for other in operation.otherwise() if operation.otherwise else ():
                self._special[other.kind](other)

    def _delete_stale_variants(self, operation: Operation) -> None:
        """Delete the item's variants in Klaviyo that commercetools no longer has."""
        keep = {catalog_id(sku) for sku in operation.keep}
        for variant in list(self._variants(operation)):
            if variant not in keep:
                self._delete_path(f"/api/catalog-variants/{quote(variant, safe='$:')}")

    def _variants(self, operation: Operation) -> Iterator[str]:
        path = f"{_entry(operation)}/variants?fields%5Bcatalog-variant%5D=id"
        while path:
            try:
                page = self._client.call("GET", path)
            except Rejected as error:
                if error.status != _NOT_FOUND:
                    raise
                return
            yield from (variant["id"] for variant in page.get("data", []))
            following = (page.get("links") or {}).get("next") or ""
            path = following[following.find("/api/") :] if "/api/" in following else ""

    def _delete(self, operation: Operation) -> None:
        self._delete_path(_entry(operation))

    def _delete_path(self, path: str) -> None:
        self._forget(path)
        try:
            self._client.call("DELETE", path)
        except Rejected as error:
            if error.status != _NOT_FOUND:  # gone already: that is what was wanted
                raise

    def _knows(self, entry: str) -> bool:
        with self._lock:
            return entry in self._exists

    def _remember(self, entry: str) -> None:
        with self._lock:
            self._exists[entry] = True

    def _forget(self, entry: str) -> None:
        with self._lock:
            self._exists.pop(entry, None)


def _entry(operation: Operation) -> str:
    return f"{_COLLECTION[operation.kind]}/{quote(catalog_id(operation.key), safe='$:')}"


def _deletion(profile_id: str) -> Request:
    profile = {"data": {"type": "profile", "id": profile_id, "attributes": {}}}
    data = {"type": "data-privacy-deletion-job", "attributes": {"profile": profile}}
    return Request("POST", "/api/data-privacy-deletion-jobs", {"data": data})
