"""Subscriptions: the worker subscribes or unsubscribes a person whose consent has changed.

The consent that the worker wrote last is a property of the profile, and so is the version of the customer that it is
from. Both are written after Klaviyo has accepted the subscription. A crash in between repeats the subscription, which
has no further effect: a person who has unsubscribed in the meantime is not subscribed again.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http import HTTPStatus
from threading import Lock
from typing import TYPE_CHECKING, Any

import cachetools
import orjson

from adapters.shared.chunks import chunked
from worker.errors import ReadingOutdated, Rejected, RequestBlocked, StaleRead, Transient, WorkerError
from worker.json_access import as_dict, as_dicts, as_int, as_text
from worker.send.bulk import isolate_rejected
from worker.send.profile_directory import FIELDS, Directory, identifier, read_profile, read_profiles
from worker.telemetry.log import log
from worker.transform.profiles import CONSENT_VERSION

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from worker.klaviyo.client import KlaviyoClient
    from worker.model import Consent, Json, Operation
    from worker.send.profile_directory import Profile
    from worker.send.profile_plan import Upsert

MAX_AGE = 60.0  # seconds since the consent was read; in the meantime, the person can have taken it back
SOURCE = "commercetools"  # stored with the consent in Klaviyo
_FIELDS = (*FIELDS, "subscriptions")
_ADDRESS = {"email": "email", "sms": "phone_number"}  # channel -> identifier
_MAX_BYTES = 4_500_000  # Klaviyo accepts 5 MB
_MAX_VERSIONS, _VERSION_SECONDS = 50_000, 600.0  # of customers, to notice that a reading lags
_SEARCH_LAG = 60.0  # seconds after a write during which a search possibly does not show it
_LAG_PAUSE = 1.0  # seconds until a profile that Klaviyo does not show yet is read again
_CULPRIT = re.compile(r"/data/attributes/profiles/data/(\d+)(?:/|$)")


@dataclass(slots=True, eq=False)
class _Entry:
    """A person in a subscription job: the JSON:API object of the profile."""

    upsert: Upsert
    resource: Json = field(repr=False)


class _Job:
    """A kind of subscription job, with its entries."""

    def __init__(self, verb: str, max_entries: int, **attributes: Any) -> None:
        self.type = f"profile-subscription-bulk-{verb}-job"
        self.max_entries = max_entries
        self.attributes = attributes
        self.entries: list[_Entry] = []

    @property
    def path(self) -> str:
        """Return the path of the endpoint."""
        return f"/api/{self.type}s"

    def body(self, entries: Sequence[_Entry]) -> Json:
        """Return the request for some of the entries."""
        profiles = {"data": [entry.resource for entry in entries]}
        return {"data": {"type": self.type, "attributes": {**self.attributes, "profiles": profiles}}}


class Consents:
    """The sender of consents. Safe for many threads.

    `resubscribes`: also subscribe a person who has unsubscribed or is suppressed in Klaviyo.
    """

    def __init__(self, client: KlaviyoClient, *, resubscribes: bool) -> None:
        self._client = client
        self._resubscribes = resubscribes
        self._versions: cachetools.TTLCache[str, int] = cachetools.TTLCache(_MAX_VERSIONS, _VERSION_SECONDS)
        self._written: cachetools.TTLCache[str, bool] = cachetools.TTLCache(_MAX_VERSIONS, _SEARCH_LAG)
        self._lock = Lock()

    def remember(self, upserts: Sequence[Upsert]) -> None:
        """Remember the customers whose consents were written."""
        with self._lock:
            self._written.update((upsert.operation.key, True) for upsert in upserts if upsert.agreed)

    def has_just_written(self, key: str) -> bool:
        """Return whether this process has just changed the consents of a customer.

        A search possibly does not show that yet, so that a consent that is taken back at once would look unchanged.
        """
        with self._lock:
            return key in self._written

    def finish_if_stale(self, upsert: Upsert) -> bool:
        """Set the result, and return True, if a later version of the customer was sent before: it is read again.

        A reading can lag behind an earlier one. The message of an old version accepts it, but a consent must not.
        """
        key = upsert.operation.key
        version = _version(upsert)
        with self._lock:
            latest = self._versions[key] = max(version, self._versions.get(key, 0))
        return _finish_if_below(latest, upsert)

    def update(self, upserts: Sequence[Upsert]) -> None:
        """Subscribe and unsubscribe the people whose profiles were written.

        Set `agreed` of an upsert to the properties to write, and clear its result. After an error, set its result.
        """
        subscribe, import_ = _subscription_job(), _subscription_job(historical_import=True)
        unsubscribe = _Job("delete", 100)  # https://developers.klaviyo.com/en/reference/bulk_unsubscribe_profiles
        recent = [upsert for upsert in upserts if not _finish_if_outdated(upsert)]
        for upsert, profile in self._read(recent):
            written = as_int(_property(profile, CONSENT_VERSION)) or 0  # possibly by another worker
            if _finish_if_below(written, upsert):
                continue
            changes = _Changes(upsert, profile, resubscribes=self._resubscribes)
            if changes.subscribed:
                (import_ if changes.consented_at else subscribe).entries.append(changes.subscription())
            if changes.unsubscribed:
                unsubscribe.entries.append(changes.unsubscription())
            upsert.agreed, upsert.result = changes.properties | {CONSENT_VERSION: _version(upsert)}, None
        for job in (unsubscribe, subscribe, import_):
            self._send(job)

    def _read(self, upserts: Sequence[Upsert]) -> Iterable[tuple[Upsert, Profile]]:
        """Return the profiles of the upserts with their subscriptions. Set the result of the others."""
        directory = Directory()
        keys = [upsert.operation.key for upsert in upserts]
        try:
            profiles, failures = read_profiles(self._client, "external_id", keys, fields=_FIELDS)
        except WorkerError as error:
            for upsert in upserts:
                upsert.finish(error)
            return []
        for profile in profiles:
            directory.add(profile)
        found: list[tuple[Upsert, Profile]] = []
        for upsert in upserts:
            upsert.requests += 1
            held = directory.find("external_id", upsert.operation.key)
            if held and self.has_just_written(upsert.operation.key):
                found += self._read_by_id(upsert, held[0].id)
            elif held:
                found.append((upsert, held[0]))
            else:
                failure = failures.get(identifier("external_id", upsert.operation.key))
                upsert.finish(failure or Transient("Klaviyo does not show the profile yet", _LAG_PAUSE))
        return found

    def _read_by_id(self, upsert: Upsert, profile_id: str) -> list[tuple[Upsert, Profile]]:
        """Read a profile by its id, which does not search. If that fails, set the result and return []."""
        upsert.requests += 1
        try:
            profile = read_profile(self._client, profile_id, fields=_FIELDS)
        except WorkerError as error:
            upsert.finish(error)
            return []
        if profile is None:
            upsert.finish(_disappeared())
        return [(upsert, profile)] if profile else []

    def _send(self, job: _Job) -> None:
        """Send the job in as few requests as possible. Set the result of the upserts that fail."""

        def post(part: list[_Entry]) -> None:
            for entry in part:
                entry.upsert.requests += 1
            self._client.call("POST", job.path, job.body(part))

        for chunk in chunked(job.entries, _size, _MAX_BYTES, job.max_entries):
            try:
                for entry in isolate_rejected(chunk, post, _culprits):
                    self._send_individually(entry, post)
            except WorkerError as error:
                for entry in chunk:
                    entry.upsert.finish(error)

    def _send_individually(self, entry: _Entry, post: Callable[[list[_Entry]], None]) -> None:
        try:
            post([entry])
        except (Rejected, RequestBlocked) as error:
            is_gone = isinstance(error, Rejected) and error.status == HTTPStatus.NOT_FOUND
            entry.upsert.finish(_disappeared() if is_gone else error)


class _Changes:
    """The changes for a person: the channels to subscribe and to unsubscribe, and the properties to write."""

    def __init__(self, upsert: Upsert, profile: Profile, *, resubscribes: bool) -> None:
        self._upsert = upsert
        self._profile = profile
        self.subscribed: list[str] = []
        self.unsubscribed: list[str] = []
        self.properties: Json = {}
        self.consented_at = ""
        for consent in upsert.operation.consents:
            if not _is_current(consent, profile):
                self._add(consent, resubscribes=resubscribes)

    def _add(self, consent: Consent, *, resubscribes: bool) -> None:
        """Add a consent that has changed. Without an address of their own, a person is not subscribed."""
        name = _ADDRESS[consent.channel]
        if consent.value is True and not self._has(name):
            log.warning("consent_without_address", extra={"channel": consent.channel})
            return
        self.properties[consent.property] = consent.value
        if consent.value is True:
            if _needs_subscription(consent.channel, self._profile, resubscribes=resubscribes):
                self.subscribed.append(consent.channel)
                self.consented_at = consent.consented_at
        elif _last(consent, self._profile) is True and self._profile.get(name):
            self.unsubscribed.append(consent.channel)

    def _has(self, name: str) -> bool:
        """Return whether the profile has the customer's address, and not that of another person."""
        wanted = as_text(self._upsert.attributes.get(name))
        return bool(wanted) and identifier(name, wanted) == identifier(name, self._profile.get(name))

    def subscription(self) -> _Entry:
        """Return the entry of the subscription job."""
        parameters = {"consent": "SUBSCRIBED"} | ({"consented_at": self.consented_at} if self.consented_at else {})
        resource = {"type": "profile", "id": self._profile.id, "attributes": self._for(self.subscribed, parameters)}
        return _Entry(self._upsert, resource)

    def unsubscription(self) -> _Entry:
        """Return the entry of the job that unsubscribes. Klaviyo accepts no id there."""
        attributes = self._for(self.unsubscribed, {"consent": "UNSUBSCRIBED"})
        return _Entry(self._upsert, {"type": "profile", "attributes": attributes})

    def _for(self, channels: Iterable[str], parameters: Json) -> Json:
        addresses = {_ADDRESS[channel]: self._profile.get(_ADDRESS[channel]) for channel in channels}
        return addresses | {"subscriptions": {channel: {"marketing": parameters} for channel in channels}}


def has_new_consent(operation: Operation, profiles: Sequence[Profile]) -> bool:
    """Return whether the operation has a consent that the worker has not written to the first of the profiles."""
    return not profiles or not all(_is_current(consent, profiles[0]) for consent in operation.consents)


def _is_current(consent: Consent, profile: Profile) -> bool:
    last = _last(consent, profile)
    return bool(last == consent.value) and isinstance(last, bool) is isinstance(consent.value, bool)


def _last(consent: Consent, profile: Profile) -> Any:
    return _property(profile, consent.property)


def _property(profile: Profile, name: str) -> Any:
    return as_dict(profile.attributes.get("properties")).get(name)


def _version(upsert: Upsert) -> int:
    return max(consent.version for consent in upsert.operation.consents)


def _finish_if_below(latest: int, upsert: Upsert) -> bool:
    """Set the result, and return True, if the upsert is from an earlier version of the customer: it is read again."""
    version = _version(upsert)
    if version < latest:
        upsert.finish(StaleRead(f"commercetools shows version {version} of the customer, but it has had a later one"))
    return version < latest


def _needs_subscription(channel: str, profile: Profile, *, resubscribes: bool) -> bool:
    """Return whether the person must be subscribed. The endpoint would lift what Klaviyo holds against it."""
    subscriptions = as_dict(profile.attributes.get("subscriptions"))
    marketing = as_dict(as_dict(subscriptions.get(channel)).get("marketing"))
    is_suppressed = marketing.get("consent") == "UNSUBSCRIBED" or bool(as_dicts(marketing.get("suppression")))
    if is_suppressed and not resubscribes:
        log.info("consent_suppressed", extra={"channel": channel})
        return False
    return is_suppressed or marketing.get("consent") != "SUBSCRIBED"


def _disappeared() -> Transient:
    return Transient("the profile has just been merged or deleted", _LAG_PAUSE)


def _subscription_job(**attributes: Any) -> _Job:
    # https://developers.klaviyo.com/en/reference/bulk_subscribe_profiles
    return _Job("create", 1_000, custom_source=SOURCE, **attributes)


def _size(entry: _Entry) -> int:
    return len(orjson.dumps(entry.resource)) + 1


def _finish_if_outdated(upsert: Upsert) -> bool:
    """Set the result, and return True, if the consent was read too long ago: it is read again."""
    age = max((datetime.now(UTC) - consent.read_at).total_seconds() for consent in upsert.operation.consents)
    if age > MAX_AGE:
        upsert.finish(ReadingOutdated(f"a consent that was read more than {MAX_AGE:.0f} s ago must be read again"))
    return age > MAX_AGE


def _culprits(entries: list[_Entry], pointer: str) -> list[_Entry]:
    match = _CULPRIT.match(pointer)
    return entries[int(match[1]) :][:1] if match else []
