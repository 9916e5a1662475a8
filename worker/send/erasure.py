"""The erasure of a person: deletion jobs for the profiles that certainly belong to this person.

A deletion cannot be undone. Every profile that Klaviyo returns is therefore compared with the request, and an erasure
that concerns more profiles than a person can have is refused.
"""

from __future__ import annotations

from http import HTTPStatus
from typing import TYPE_CHECKING
from urllib.parse import quote

import orjson

from worker.errors import Rejected, Transient, WorkerError
from worker.json_access import as_dict, as_text, parse_time
from worker.klaviyo.client import iter_resources
from worker.model import Json, SendResult
from worker.send.requests import deletion_request

if TYPE_CHECKING:
    from collections.abc import Iterator

    from worker.klaviyo.client import KlaviyoClient
    from worker.model import Operation

_LAG_PAUSE = 1.0  # seconds until a profile that was just deleted or merged is looked up again
MAX_PROFILES = 3  # of a person: Klaviyo keeps one profile per external_id and one per email address
_FOREIGN = (
    "Klaviyo returned a profile with another external_id than that of the erasure, so nothing was deleted: check the "
    "customer's profile in Klaviyo, then replay the message"
)
_TOO_MANY = (
    f"the erasure of a customer concerns more than {MAX_PROFILES} profiles, so nothing was deleted: delete the "
    "profiles with this external_id in Klaviyo"
)
_OLDER = (
    "commercetools deleted the customer while the profile was written: if the customer must be erased, delete the "
    "profile with this external_id in Klaviyo"
)


class Eraser:
    """The sender of DELETE_PROFILE operations. Safe for many threads."""

    def __init__(self, client: KlaviyoClient) -> None:
        self._client = client

    def erase(self, operation: Operation) -> SendResult:
        """Request the deletion of the person's profiles. The result has the number of accepted requests."""
        before = self._client.requests_sent()
        erased = 0
        error: WorkerError | None = None
        try:
            for profile_id in self._find(operation):
                self._delete(profile_id)
                erased += 1
        except WorkerError as failure:
            error = failure
        return SendResult(error, self._client.requests_sent() - before, erased)

    def _delete(self, profile_id: str) -> None:
        """Request the deletion of a profile. Raises WorkerError; Transient if it is gone since it was found."""
        request = deletion_request(profile_id)
        try:
            self._client.call(request.method, request.path, request.body)
        except Rejected as error:
            if error.status != HTTPStatus.NOT_FOUND:
                raise
            raise Transient("Klaviyo no longer has the profile: it must be looked up again", _LAG_PAUSE) from None

    def _find(self, operation: Operation) -> list[str]:
        """Return Klaviyo's ids of the profiles to delete: those with the external_id, and those with their email alone.

        If the operation has `created_since`, these are only the profiles with the external_id, and it is rejected if
        one of them is older. Raises WorkerError.
        """
        own: list[Json] = []
        for profile in self._read("external_id", operation.key):
            if as_dict(profile.get("attributes")).get("external_id") != operation.key or not as_text(profile.get("id")):
                raise Rejected(_FOREIGN)
            own.append(profile)
            _check_number(own)
        if operation.created_since is not None:
            created = [parse_time(as_dict(profile.get("attributes")).get("created")) for profile in own]
            if any(moment is None or moment < operation.created_since for moment in created):
                raise Rejected(_OLDER)
            return _ids(own)
        return _ids([*own, *self._namesakes(own)])

    def _namesakes(self, own: list[Json]) -> list[Json]:
        """Return the profiles without an external_id that have the email address of one of the person's profiles.

        Klaviyo also finds a profile by an earlier address, so a profile that shows another address is left out.
        """
        found: list[Json] = []
        emails = {as_text(as_dict(profile.get("attributes")).get("email")) for profile in own} - {""}
        for email in sorted(emails):
            for profile in self._read("email", email):
                attributes = as_dict(profile.get("attributes"))
                is_same = as_text(attributes.get("email")).lower() == email.lower()
                if is_same and not attributes.get("external_id") and as_text(profile.get("id")):
                    found.append(profile)
                    _check_number([*own, *found])
        return found

    def _read(self, name: str, value: str) -> Iterator[Json]:
        """Yield the profiles with an identifier, as Klaviyo's filter finds them. Raises WorkerError."""
        condition = quote(f"equals({name},{orjson.dumps(value).decode()})")
        fields = "fields%5Bprofile%5D=external_id,email,created"
        return iter_resources(self._client, f"/api/profiles?filter={condition}&{fields}")


def _ids(profiles: list[Json]) -> list[str]:
    return list(dict.fromkeys(as_text(profile.get("id")) for profile in profiles))


def _check_number(profiles: list[Json]) -> None:
    if len(_ids(profiles)) > MAX_PROFILES:
        raise Rejected(_TOO_MANY)
