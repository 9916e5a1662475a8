"""Individual writes of profiles. Klaviyo's 409 decides what two workers want at the same time."""

from __future__ import annotations

from http import HTTPStatus
from threading import Lock
from typing import TYPE_CHECKING
from urllib.parse import quote

import cachetools

from worker.errors import Rejected, Transient, WorkerError
from worker.json_access import as_text
from worker.send.identifiers import report_dropped, write_record
from worker.send.profile_directory import identifier, read_profile
from worker.send.profile_plan import wanted_attributes
from worker.transform.profiles import without_clears

if TYPE_CHECKING:
    from worker.klaviyo.client import KlaviyoClient
    from worker.model import Json
    from worker.send.profile_directory import Adoptions
    from worker.send.profile_plan import Plan, Upsert

MERGE_WAIT = 1.0  # seconds until a message whose profiles Klaviyo merges is processed again
_MERGE_SECONDS = 600.0  # after this time, a merge that has had no effect is requested again
_MAX_MERGES = 10_000  # that are remembered


class ProfileWriter:
    """The individual requests that write and merge profiles. Safe for many threads."""

    def __init__(self, client: KlaviyoClient, adoptions: Adoptions) -> None:
        self._client = client
        self._adoptions = adoptions
        self._lock = Lock()
        self._merged: cachetools.TTLCache[str, bool] = cachetools.TTLCache(_MAX_MERGES, _MERGE_SECONDS)  # source ids

    def write(self, upsert: Upsert, plan: Plan) -> None:
        """Carry a plan out. Set the result of the upsert, unless its profile must be read again."""
        before = self._client.requests_sent()
        error: WorkerError | None = None
        is_finished = True
        try:
            if upsert.is_blind:
                self._import(upsert)
            elif plan.merge_from:
                is_finished = False
                self._merge(upsert, plan)
            elif plan.adopts:
                is_finished = self._adopt(upsert, plan)
            elif plan.attributes:
                self._write(plan)
        except Rejected as rejection:
            if self._is_merged(rejection.duplicate_id):
                error = _merging()
            else:
                is_finished = not _is_resolvable(upsert, plan, rejection)
                error = rejection
        except WorkerError as failure:
            is_finished, error = True, failure
        upsert.requests += self._client.requests_sent() - before
        if is_finished:
            upsert.finish(error)

    def _write(self, plan: Plan) -> None:
        """Create a profile, which fails if it exists, or update it by Klaviyo's id. Raises WorkerError."""
        resource: Json = {"type": "profile", "attributes": plan.attributes}
        if plan.profile_id:
            path = f"/api/profiles/{quote(plan.profile_id, safe='')}"
            write_record(self._client, "PATCH", path, resource | {"id": plan.profile_id})
        else:
            write_record(self._client, "POST", "/api/profiles", resource)

    def _adopt(self, upsert: Upsert, plan: Plan) -> bool:
        """Give a profile without an external_id to the customer. Raises WorkerError.

        It cannot be undone, so the profile is read again immediately before: a search can show it late. If it is
        another customer's now, or has another email address, return False, and the next round reads it by its id.
        """
        profile = read_profile(self._client, plan.profile_id)
        email = identifier("email", upsert.get("email"))
        if profile is None or profile.get("external_id") or identifier("email", profile.get("email")) != email:
            upsert.named.add(plan.profile_id)
            return False
        self._write(plan)
        self._adoptions.add(plan.profile_id, upsert.get("external_id"))
        return True

    def _is_merged(self, profile_id: str) -> bool:
        """Return whether Klaviyo has accepted the merge of a profile into another one, and possibly has not ended."""
        with self._lock:
            return profile_id in self._merged

    def _merge(self, upsert: Upsert, plan: Plan) -> None:
        """Merge the profile of a guest into the customer's. Raises WorkerError; Transient until the merge has ended.

        A merge cannot be undone, so both profiles are read again immediately before. If they are no longer those of a
        guest with the customer's email address and of the customer, nothing is merged.
        """
        if self._is_merged(plan.merge_from):
            raise _merging()
        guest, customer = (read_profile(self._client, each) for each in (plan.merge_from, plan.profile_id))
        if guest is None or customer is None or guest.get("external_id"):
            return
        email = identifier("email", upsert.get("email"))
        if identifier("email", guest.get("email")) != email or customer.get("external_id") != upsert.operation.key:
            return
        source = {"type": "profile", "id": guest.id}
        data = {"type": "profile-merge", "id": customer.id, "relationships": {"profiles": {"data": [source]}}}
        self._client.call("POST", "/api/profile-merge", {"data": data})
        with self._lock:
            self._merged[guest.id] = True

    def _import(self, upsert: Upsert) -> None:
        """Import a profile that cannot be read, without its phone number: it can be another person's.

        If its email address is another profile's, the rest is written by external_id. Raises WorkerError.
        """
        attributes: Json = without_clears({"attributes": wanted_attributes(upsert, ["phone_number"])})["attributes"]
        try:
            self._post_import(attributes)
        except Rejected as error:
            if error.status != HTTPStatus.CONFLICT or not as_text(attributes.get("external_id")):
                raise
            report_dropped("email", "profile")
            self._post_import({name: value for name, value in attributes.items() if name != "email"})

    def _post_import(self, attributes: Json) -> None:
        write_record(self._client, "POST", "/api/profile-import", {"type": "profile", "attributes": attributes})


def _is_resolvable(upsert: Upsert, plan: Plan, rejection: Rejected) -> bool:
    """Return whether another reading can resolve the rejection. Prepare the upsert for it.

    The first conflict means that another process has just written, or that the search did not show a profile yet.
    If the profile that Klaviyo names does not show whose the identifiers are, the weaker one is dropped.
    """
    if rejection.status == HTTPStatus.NOT_FOUND and plan.profile_id:  # deleted or merged since the reading
        return True
    if rejection.status != HTTPStatus.CONFLICT or upsert.is_blind:
        return False
    upsert.conflicts += 1
    upsert.named |= {rejection.duplicate_id} - {""}
    if upsert.conflicts > 1:
        written = [name for name in ("phone_number", "email") if name in plan.attributes]
        upsert.dropped |= set(written[:1])
    return True


def _merging() -> Transient:
    return Transient("Klaviyo has not yet merged the profile of a guest into the customer's", MERGE_WAIT)
