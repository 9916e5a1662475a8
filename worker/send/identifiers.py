"""The identifiers of a profile, and the removal of an identifier, or of the locale, that Klaviyo rejects."""

from __future__ import annotations

import re
from http import HTTPStatus
from typing import TYPE_CHECKING

from worker.errors import Rejected
from worker.telemetry.log import log

if TYPE_CHECKING:
    from worker.klaviyo.client import KlaviyoClient
    from worker.model import Json

_IDENTIFIERS = ("email", "external_id", "phone_number")
_INVALID = re.compile(r"/data/attributes/(?:profile/data/attributes/)?(email|phone_number|locale)")


def write_record(client: KlaviyoClient, method: str, path: str, resource: Json) -> None:
    """Write a profile or an event. Leave out its email, phone number or locale if it is invalid. Raises WorkerError.

    Klaviyo describes the form of a locale only by an example, and a language alone is none of its form.
    """
    try:
        client.call(method, path, {"data": resource})
    except Rejected as error:
        name = invalid_identifier(error)
        remaining = drop_identifier(resource, name) if name else None
        if remaining is None:
            raise
        report_dropped(name, resource["type"])
        write_record(client, method, path, remaining)


def report_dropped(name: str, record: str) -> None:
    """Log that an identifier was left out of a record ("profile" or "event"), without its value."""
    log.warning("identifier_dropped", extra={"identifier": name, "resource": record})


def invalid_identifier(rejection: Rejected) -> str:
    """Return the name of the identifier, or "locale", that made Klaviyo reject a profile or event, or ""."""
    match = _INVALID.fullmatch(rejection.pointer) if rejection.status == HTTPStatus.BAD_REQUEST else None
    return match[1] if match else ""


def drop_identifier(resource: Json, identifier: str) -> Json | None:
    """Return a profile or event without an identifier; None if it does not have it or has no other identifier."""
    attributes = resource["attributes"]
    if resource["type"] == "event":
        profile = drop_identifier(attributes["profile"]["data"], identifier)
        if profile is None:
            return None
        return resource | {"attributes": attributes | {"profile": {"data": profile}}}
    others = {name: value for name, value in attributes.items() if name != identifier}
    has_other = resource.get("id") or any(others.get(name) for name in _IDENTIFIERS)
    return resource | {"attributes": others} if has_other and len(others) < len(attributes) else None
