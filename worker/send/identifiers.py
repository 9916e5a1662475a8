"""What identifies a profile, and how to do without an identifier that Klaviyo finds invalid."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from worker.errors import Rejected
    from worker.model import Json

IDENTIFIER_PRIORITY = ("email", "external_id", "phone_number")
_INVALID = re.compile(r"/data/attributes/(?:profile/data/attributes/)?(email|phone_number)")
_BAD_REQUEST = 400


def invalid_identifier(refusal: Rejected) -> str:
    """Return the identifier of a profile, or of an event's profile, that is refused as invalid; or ""."""
    match = _INVALID.fullmatch(refusal.pointer) if refusal.status == _BAD_REQUEST else None
    return match[1] if match else ""


def drop_identifier(resource: Json, identifier: str) -> Json | None:
    """Return a profile or event without an identifier; None when it has none of that name, or no other."""
    attributes = resource["attributes"]
    if resource["type"] == "event":
        profile = drop_identifier(attributes["profile"]["data"], identifier)
        return profile and resource | {"attributes": attributes | {"profile": {"data": profile}}}
    rest = {name: value for name, value in attributes.items() if name != identifier}
    if len(rest) == len(attributes) or not any(rest.get(name) for name in IDENTIFIER_PRIORITY):
        return None
    return resource | {"attributes": rest}
