"""Klaviyo's profiles, as read for a batch: who has which identifier."""

from __future__ import annotations

from dataclasses import dataclass, field
from threading import Lock
from typing import TYPE_CHECKING
from urllib.parse import quote

import cachetools
import orjson

from adapters.shared.chunks import chunked
from worker.errors import Rejected, RequestBlocked, Transient, WorkerError
from worker.json_access import as_dict, as_text
from worker.klaviyo.client import iter_resources
from worker.send.bulk import isolate_rejected

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from worker.klaviyo.client import KlaviyoClient
    from worker.model import Json

Identifier = tuple[str, str]  # name of the attribute, and its value

MAX_VALUES = 100  # of a filter, and profiles on a page: https://developers.klaviyo.com/en/reference/get_profiles
MAX_FILTER_BYTES = 6_000  # percent-encoded; proxies accept URIs of up to 8 KB
_MAX_ADOPTIONS, _ADOPTION_SECONDS = 100_000, 600.0
FIELDS = (
    *("email", "phone_number", "external_id", "first_name", "last_name"),
    *("organization", "locale", "location", "properties"),
)


def identifier(name: str, value: str) -> Identifier:
    """Return an identifier in the form that Klaviyo compares: email addresses without regard to case."""
    return name, value.lower() if name == "email" else value


@dataclass(frozen=True, slots=True)
class Profile:
    """A profile in Klaviyo. `id` is Klaviyo's."""

    id: str
    attributes: Json = field(repr=False)

    def get(self, name: str) -> str:
        """Return a text attribute, or ""."""
        return as_text(self.attributes.get(name))


class Directory:
    """Profiles by identifier. Not thread-safe."""

    def __init__(self) -> None:
        self._profiles: dict[Identifier, dict[str, Profile]] = {}
        self._by_id: dict[str, Profile] = {}

    def add(self, profile: Profile) -> None:
        """Add a profile under each of its identifiers. It replaces an earlier reading of the same profile."""
        if earlier := self._by_id.get(profile.id):
            for key in _identifiers_of(earlier):
                del self._profiles[key][profile.id]
        self._by_id[profile.id] = profile
        for key in _identifiers_of(profile):
            self._profiles.setdefault(key, {})[profile.id] = profile

    def find(self, name: str, value: str) -> list[Profile]:
        """Return the profiles with this identifier. Klaviyo does not document that there is only one."""
        return list(self._profiles.get(identifier(name, value), {}).values()) if value else []


class Adoptions:
    """The profiles without an external_id that this process has recently given to customers. Safe for many threads.

    Klaviyo's search can still show such a profile without the external_id. Without this memory, a second customer with
    the same email address would take it over.
    """

    def __init__(self) -> None:
        self._customers: cachetools.TTLCache[str, str] = cachetools.TTLCache(_MAX_ADOPTIONS, _ADOPTION_SECONDS)
        self._lock = Lock()

    def add(self, profile_id: str, customer: str) -> None:
        """Remember the customer of a profile."""
        with self._lock:
            self._customers[profile_id] = customer

    def remove(self, profile_id: str) -> None:
        """Forget a profile: it was not given to the customer."""
        with self._lock:
            self._customers.pop(profile_id, None)

    def complete(self, profile: Profile) -> Profile:
        """Return a profile that was read with the external_id that it has got."""
        with self._lock:
            customer = self._customers.get(profile.id)
        if customer is None or profile.get("external_id"):
            return profile
        return Profile(profile.id, profile.attributes | {"external_id": customer})


def _identifiers_of(profile: Profile) -> list[Identifier]:
    names = ("external_id", "email", "phone_number")
    return [identifier(name, profile.get(name)) for name in names if profile.get(name)]


def read_profile(client: KlaviyoClient, profile_id: str, *, fields: Sequence[str] = FIELDS) -> Profile | None:
    """Read a profile by Klaviyo's id; None if Klaviyo does not show it. `fields` are the attributes to read.

    Raises WorkerError.

    A search can show a new or changed profile late, but a reading by id does not search.
    """
    path = f"/api/profiles/{quote(profile_id, safe='')}?{_attributes(fields)}"
    try:
        resource = as_dict(client.call("GET", path).get("data"))
    except Rejected:  # it was merged or deleted
        return None
    return Profile(as_text(resource.get("id")), as_dict(resource.get("attributes")))


def read_profiles(
    client: KlaviyoClient, name: str, values: Iterable[str], *, fields: Sequence[str] = FIELDS
) -> tuple[list[Profile], dict[Identifier, WorkerError]]:
    """Read the profiles that have one of the values as `name` ("external_id", "email" or "phone_number").

    Return them with the error of each value for which Klaviyo rejects a filter. `fields` are the attributes to read.
    Raises WorkerError.
    """
    profiles: list[Profile] = []
    failures: dict[Identifier, WorkerError] = {}

    def read(part: list[str]) -> None:
        profiles.extend(_read(client, name, part, fields))

    for chunk in _chunks(sorted(set(values))):
        for value in isolate_rejected(chunk, read, _no_culprits):
            try:
                read([value])
            except (Rejected, RequestBlocked) as error:
                failures[identifier(name, value)] = error
    return profiles, failures


def _read(client: KlaviyoClient, name: str, values: Sequence[str], fields: Sequence[str]) -> list[Profile]:
    """Return the profiles of one filter. Raises WorkerError; Transient if Klaviyo does not obey the filter.

    A profile without the value is left out: Klaviyo also finds profiles by their secondary email addresses.
    """
    literals = ",".join(map(_literal, values))
    path = f"/api/profiles?filter=any({name},%5B{literals}%5D)&{_attributes(fields)}&page%5Bsize%5D={MAX_VALUES}"
    wanted = {identifier(name, value) for value in values}
    found: list[Profile] = []
    others = 0
    for resource in iter_resources(client, path):
        profile = Profile(as_text(resource.get("id")), as_dict(resource.get("attributes")))
        if identifier(name, profile.get(name)) in wanted:
            found.append(profile)
            continue
        others += 1
        if others > MAX_VALUES:
            raise Transient(f"Klaviyo returned profiles whose {name} was not asked for")
    return found


def _attributes(fields: Sequence[str]) -> str:
    """Return the parameters that name the attributes. Klaviyo returns subscriptions only with one of their own."""
    names = f"fields%5Bprofile%5D={','.join(fields)}"
    return f"{names}&additional-fields%5Bprofile%5D=subscriptions" if "subscriptions" in fields else names


def _literal(value: str) -> str:
    """Return a text as the percent-encoded literal of a filter."""
    return f"%22{quote(orjson.dumps(value)[1:-1], safe='@')}%22"  # quote is fast if it has nothing to encode


def _chunks(values: Iterable[str]) -> Iterator[list[str]]:
    return chunked(values, lambda value: len(_literal(value)) + 1, MAX_FILTER_BYTES, MAX_VALUES)


def _no_culprits(_part: list[str], _pointer: str) -> list[str]:
    """Return no value: the error of a filter does not name one."""
    return []
