"""The identifiers of a profile, and the removal of an identifier that Klaviyo rejects."""

from __future__ import annotations

import re
from http import HTTPStatus
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from worker.errors import Rejected
    from worker.model import Json

IDENTIFIER_PRIORITY = ("email", "external_id", "phone_number")  # the strongest first
_INVALID = re.compile(r"/data/attributes/(?:profile/data/attributes/)?(email|phone_number)")


def invalid_identifier(rejection: Rejected) -> str:
    """Return the name of the identifier that made Klaviyo reject a profile or event, or ""."""
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
    if len(others) == len(attributes) or not any(others.get(name) for name in IDENTIFIER_PRIORITY):
        return None
    return resource | {"attributes": others}
