"""Subscription jobs of the emulator follow Klaviyo's OpenAPI document."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from tests.support.klaviyo_account import AccountClient
from worker.errors import Rejected

if TYPE_CHECKING:
    from worker.model import Json

EMAIL, PHONE = "ada@example.com", "+442079460958"
SINCE = "2025-01-01T00:00:00+00:00"


def job(verb: str, *entries: Json, **attributes: Any) -> tuple[str, str, Json]:
    kind = f"profile-subscription-bulk-{verb}-job"
    data = {"type": kind, "attributes": attributes | {"profiles": {"data": list(entries)}}}
    return "POST", f"/api/{kind}s", {"data": data}


def entry(consent: str = "SUBSCRIBED", channel: str = "email", since: str | None = None, **attributes: Any) -> Json:
    marketing = {"consent": consent} | ({} if since is None else {"consented_at": since})
    given = {"email": EMAIL} | attributes | {"subscriptions": {channel: {"marketing": marketing}}}
    return {"type": "profile", "attributes": given}


def subscriptions(klaviyo: AccountClient) -> Json:
    path = f'/api/profiles?filter=equals(email,"{EMAIL}")&additional-fields[profile]=subscriptions'
    (profile,) = klaviyo.call("GET", path)["data"]
    found: Json = profile["attributes"]["subscriptions"]
    return found


def test_subscription_lifts_what_a_person_can_lift() -> None:
    """A bounce stays. The profile is created if there is none."""
    klaviyo = AccountClient()
    klaviyo.call(*job("create", entry(since=SINCE), historical_import=True))
    marketing = subscriptions(klaviyo)["email"]["marketing"]
    assert (marketing["consent"], marketing["consent_timestamp"]) == ("SUBSCRIBED", SINCE)
    klaviyo.call(*job("delete", entry("UNSUBSCRIBED")))
    marketing = subscriptions(klaviyo)["email"]["marketing"]
    assert marketing["consent"] == "UNSUBSCRIBED"
    assert [each["reason"] for each in marketing["suppression"]] == ["UNSUBSCRIBE"]
    marketing["suppression"].append({"reason": "HARD_BOUNCE", "timestamp": SINCE})
    klaviyo.call(*job("create", entry()))
    marketing = subscriptions(klaviyo)["email"]["marketing"]
    assert marketing["consent"] == "SUBSCRIBED"
    assert [each["reason"] for each in marketing["suppression"]] == ["HARD_BOUNCE"]


def test_subscriptions_are_shown_only_on_request() -> None:
    """They are an additional field."""
    klaviyo = AccountClient()
    klaviyo.call(*job("create", entry()))
    (profile,) = klaviyo.call("GET", "/api/profiles")["data"]
    assert "subscriptions" not in profile["attributes"]
    assert profile["attributes"]["created"]


def test_id_selects_the_profile() -> None:
    """The address is written to it, unless it belongs to another profile."""
    klaviyo = AccountClient()
    profile = klaviyo.profile(external_id="ada")
    found = klaviyo.account.profiles[0]
    klaviyo.call(*job("create", entry(channel="sms", phone_number=PHONE) | {"id": found["id"]}))
    assert (profile["email"], profile["phone_number"]) == (EMAIL, PHONE)
    assert found["subscriptions"].keys() == {"sms"}
    klaviyo.profile(email="bob@example.com")
    klaviyo.call(*job("create", entry(email="bob@example.com") | {"id": found["id"]}))
    assert profile["email"] == EMAIL


@pytest.mark.parametrize(
    ("verb", "bad", "attributes"),
    [
        ("create", entry("UNSUBSCRIBED"), {}),
        ("delete", entry("SUBSCRIBED"), {}),
        ("create", entry(since=SINCE), {}),
        ("create", entry(), {"historical_import": True}),
        ("create", entry(since="2999-01-01T00:00:00+00:00"), {"historical_import": True}),
        ("create", entry(channel="sms"), {}),
        ("create", entry(channel="fax"), {}),
        ("create", entry(external_id="ada"), {}),
        ("create", entry(email="ada"), {}),
        ("create", entry(phone_number="12"), {}),
        ("create", {"type": "profile", "attributes": {"email": EMAIL}}, {}),
        ("create", {"type": "profile", "attributes": {"email": EMAIL, "subscriptions": {"email": None}}}, {}),
    ],
)
def test_invalid_entry_rejects_the_job(verb: str, bad: Json, attributes: Json) -> None:
    """No profile is changed."""
    klaviyo = AccountClient()
    with pytest.raises(Rejected) as error:
        klaviyo.call(*job(verb, entry("SUBSCRIBED" if verb == "create" else "UNSUBSCRIBED"), bad, **attributes))
    assert error.value.status == 400
    assert klaviyo.account.profiles == []


@pytest.mark.parametrize(("verb", "limit"), [("create", 1_000), ("delete", 100)])
def test_number_of_profiles_is_limited(verb: str, limit: int) -> None:
    """The limits are documented at the endpoints."""
    klaviyo = AccountClient()
    entries = [entry("SUBSCRIBED" if verb == "create" else "UNSUBSCRIBED")] * (limit + 1)
    with pytest.raises(Rejected):
        klaviyo.call(*job(verb, *entries))
    klaviyo.call(*job(verb, *entries[:limit]))
