"""The subscriptions of profiles to marketing, and the jobs that change them."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from worker.sandbox.klaviyo.rules import check_profile, invalid_input, require_resource

if TYPE_CHECKING:
    from worker.sandbox.http import Json

ADDRESS = {"email": "email", "sms": "phone_number"}  # channel -> identifier
MAX_SUBSCRIBED, MAX_UNSUBSCRIBED = 1_000, 100  # profiles of a job
_LIFTED = ("UNSUBSCRIBE", "SPAM_COMPLAINT", "USER_SUPPRESSED")


def check_entry(entry: Any, consent: str, pointer: str, *, is_import: bool) -> None:
    """Check a profile of a job that sets this consent. Raises ApiError. `is_import`: the job's historical_import."""
    attributes = require_resource({"data": entry}, "profile", pointer)["attributes"]
    channels = attributes.get("subscriptions")
    if not isinstance(channels, dict) or not channels or channels.keys() - ADDRESS.keys():
        raise invalid_input("'subscriptions' is required, with the channels email and sms.", pointer)
    if unknown := attributes.keys() - {"email", "phone_number", "subscriptions", "age_gated_date_of_birth"}:
        raise invalid_input(f"{sorted(unknown)} are not valid fields here.", f"{pointer}/attributes")
    check_profile({name: attributes[name] for name in ADDRESS.values() if name in attributes}, f"{pointer}/attributes")
    for channel, given in channels.items():
        marketing = given.get("marketing") if isinstance(given, dict) else None
        at = f"{pointer}/attributes/subscriptions/{channel}/marketing"
        if not isinstance(marketing, dict) or marketing.get("consent") != consent:
            raise invalid_input(f"'consent' must be {consent}.", at)
        if not attributes.get(ADDRESS[channel]):
            raise invalid_input(f"'{ADDRESS[channel]}' is required for the channel {channel}.", f"{pointer}/attributes")
        _check_time(marketing.get("consented_at"), at, is_import=is_import)


def _check_time(consented_at: Any, pointer: str, *, is_import: bool) -> None:
    """Check that a time is given if and only if the job is a historical import, and that it is past."""
    if (consented_at is not None) is not is_import:
        raise invalid_input("'consented_at' is for a historical import, which requires it.", pointer)
    if consented_at is not None and datetime.fromisoformat(consented_at) >= datetime.now(UTC):
        raise invalid_input("'consented_at' must be in the past.", pointer)


def subscribe(subscriptions: Json, entry: Json) -> Json:
    """Return a profile's subscriptions with those of the entry. Suppressions that a person can lift are lifted."""
    changed = dict(subscriptions)
    for channel, given in entry["attributes"]["subscriptions"].items():
        held = _marketing(subscriptions, channel)
        kept = [each for each in held.get("suppression") or () if each["reason"] not in _LIFTED]
        moment = given["marketing"].get("consented_at") or datetime.now(UTC).isoformat()
        marketing = {"consent": "SUBSCRIBED", "consent_timestamp": moment, "suppression": kept}
        changed[channel] = {"marketing": held | marketing}
    return changed


def unsubscribe(subscriptions: Json, entry: Json) -> Json:
    """Return a profile's subscriptions without those of the entry, and with a suppression for each."""
    changed = dict(subscriptions)
    moment = datetime.now(UTC).isoformat()
    for channel in entry["attributes"]["subscriptions"]:
        held = _marketing(subscriptions, channel)
        suppression = [*(held.get("suppression") or ()), {"reason": "UNSUBSCRIBE", "timestamp": moment}]
        marketing = {"consent": "UNSUBSCRIBED", "consent_timestamp": moment, "suppression": suppression}
        changed[channel] = {"marketing": held | marketing}
    return changed


def _marketing(subscriptions: Json, channel: str) -> Json:
    marketing: Json = (subscriptions.get(channel) or {}).get("marketing") or {}
    return marketing
