"""The consent of a customer to marketing, as custom fields hold it.

The send stage compares it with the property of the profile that the worker wrote last, and subscribes or unsubscribes
the person only if the field has changed since.
"""

from __future__ import annotations

from datetime import UTC
from typing import TYPE_CHECKING

from worker.json_access import as_dict, parse_time
from worker.model import Consent
from worker.transform import fields
from worker.versions import version_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from datetime import datetime

    from worker.mapping import MappingConfig
    from worker.model import Json


def consent_properties(mapping: MappingConfig) -> dict[str, str]:
    """Return the properties that hold consents, by channel ("email", "sms")."""
    rename = mapping.customer.custom_fields.rename
    named = {"email": mapping.consent.email, "sms": mapping.consent.sms}
    return {channel: rename.get(name, name) for channel, name in named.items() if name}


def consents(customer: Json, mapping: MappingConfig, read_at: datetime) -> Iterator[Consent]:
    """Yield the customer's consents. `read_at` is the time of the reading, in UTC.

    Klaviyo accepts only a past time of a consent: https://developers.klaviyo.com/en/reference/bulk_subscribe_profiles.
    """
    values = as_dict(as_dict(customer.get("custom")).get("fields"))
    moment = parse_time(values.get(mapping.consent.date)) if mapping.consent.date else None
    consented_at = moment.astimezone(UTC).isoformat() if moment and moment < read_at else ""
    named = {"email": mapping.consent.email, "sms": mapping.consent.sms}
    for channel, name in consent_properties(mapping).items():
        value = fields.custom_value(values.get(named[channel]), mapping.locale)
        known = None if value in ("", []) else value
        yield Consent(channel, name, known, consented_at, version_of(customer), read_at)
