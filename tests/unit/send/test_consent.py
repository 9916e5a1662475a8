"""Consents: Klaviyo gets only changes, and no suppression is lifted by accident."""

from __future__ import annotations

import copy
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.klaviyo_account import AccountClient
from tests.support.sender import Sender
from worker.errors import EndpointRefused, ReadingOutdated, Rejected, StaleRead, Transient
from worker.model import Consent, Json, Operation, OperationKind
from worker.send.consent import MAX_AGE
from worker.send.requests import request_for

if TYPE_CHECKING:
    from worker.errors import WorkerError

CREATE, DELETE = "POST /api/profile-subscription-bulk-create-jobs", "POST /api/profile-subscription-bulk-delete-jobs"
PHONE = "+442079460958"
EMAIL = "ada@example.com"


@pytest.fixture
def klaviyo() -> AccountClient:
    return AccountClient()


def consent(
    value: Any, channel: str = "email", name: str = "", since: str = "", age: float = 0.0, version: int = 1
) -> Consent:
    read_at = datetime.now(UTC) - timedelta(seconds=age)
    return Consent(channel, name or {"email": "newsletter", "sms": "texts"}[channel], value, since, version, read_at)


def customer(*consents: Consent, key: str = "ada", **attributes: Any) -> Operation:
    attributes = {"external_id": key, "email": f"{key}@example.com"} | attributes
    resource = {"type": "profile", "attributes": attributes}
    return Operation(OperationKind.UPSERT_PROFILE, key, resource, consents=consents)


def send(klaviyo: AccountClient, *operations: Operation, **options: Any) -> list[WorkerError | None]:
    return Sender(klaviyo, 4, **options).send(operations)


def known(klaviyo: AccountClient, key: str = "ada", held: Json | None = None, **attributes: Any) -> Json:
    """Add a profile with subscriptions to the account, and return it."""
    klaviyo.profile(external_id=key, **({"email": f"{key}@example.com"} | attributes))
    profile: Json = klaviyo.account.profiles[-1]
    profile["subscriptions"] = held or {}
    return profile


def jobs(klaviyo: AccountClient) -> list[str]:
    return [name for name in klaviyo.names if "subscription" in name]


def held(status: str, *reasons: str) -> Json:
    suppression = [{"reason": reason, "timestamp": "2026-01-01T00:00:00Z"} for reason in reasons]
    return {"email": {"marketing": {"consent": status, "suppression": suppression}}}


def status(profile: Json, channel: str = "email") -> str | None:
    found: str | None = profile["subscriptions"].get(channel, {}).get("marketing", {}).get("consent")
    return found


@pytest.mark.parametrize("last", [None, False, "true", 1])
def test_new_consent_subscribes_once(last: object, klaviyo: AccountClient) -> None:
    """The property is written, so a repeated message has no effect."""
    profile = known(klaviyo, properties={} if last is None else {"newsletter": last})
    for _ in range(2):
        assert send(klaviyo, customer(consent(True))) == [None]
    assert jobs(klaviyo) == [CREATE]
    assert (status(profile), profile["attributes"]["properties"]["newsletter"]) == ("SUBSCRIBED", True)


def test_new_customer_is_subscribed(klaviyo: AccountClient) -> None:
    """The profile is created first, so that the subscription has its id."""
    assert send(klaviyo, customer(consent(True), consent(True, "sms"), phone_number=PHONE)) == [None]
    (profile,) = klaviyo.account.profiles
    assert [status(profile, channel) for channel in ("email", "sms")] == ["SUBSCRIBED"] * 2
    expected = {"newsletter": True, "texts": True, "commercetoolsConsentVersion": 1}
    assert profile["attributes"]["properties"] == expected
    (body,) = [body for name, body in klaviyo.calls if name == CREATE]
    marketing = {"marketing": {"consent": "SUBSCRIBED"}}
    assert body["data"]["attributes"] == {
        "custom_source": "commercetools",
        "profiles": {
            "data": [
                {
                    "type": "profile",
                    "id": profile["id"],
                    "attributes": {
                        "email": EMAIL,
                        "phone_number": PHONE,
                        "subscriptions": {"email": marketing, "sms": marketing},
                    },
                }
            ]
        },
    }


@pytest.mark.parametrize("value", [False, None, "no"])
def test_consent_that_was_taken_back_unsubscribes(value: object, klaviyo: AccountClient) -> None:
    """The property follows, also if the field is gone."""
    profile = known(klaviyo, held=held("SUBSCRIBED"), properties={"newsletter": True})
    for _ in range(2):
        assert send(klaviyo, customer(consent(value))) == [None]
    assert jobs(klaviyo) == [DELETE]
    assert status(profile) == "UNSUBSCRIBED"
    assert profile["attributes"]["properties"].get("newsletter") == value


@pytest.mark.parametrize(("last", "value"), [(None, None), (None, False), (False, False), (False, None), (True, True)])
@pytest.mark.parametrize("subscription", ["SUBSCRIBED", "UNSUBSCRIBED"])
def test_no_change_of_the_consent_has_no_effect(
    last: object, value: object, subscription: str, klaviyo: AccountClient
) -> None:
    """A person can have subscribed or unsubscribed in Klaviyo."""
    profile = known(klaviyo, held=held(subscription), properties={} if last is None else {"newsletter": last})
    assert send(klaviyo, customer(consent(value), first_name="Ada")) == [None]
    assert jobs(klaviyo) == []
    assert status(profile) == subscription


def test_unchanged_consent_costs_no_request(klaviyo: AccountClient) -> None:
    """The reading of the profile is enough."""
    known(klaviyo, properties={"newsletter": True})
    assert send(klaviyo, customer(consent(True))) == [None]
    assert klaviyo.names == ["GET /api/profiles"]


@pytest.mark.parametrize(
    "subscriptions",
    [
        held("UNSUBSCRIBED", "UNSUBSCRIBE"),
        held("UNSUBSCRIBED"),
        held("SUBSCRIBED", "SPAM_COMPLAINT"),
        held("NEVER_SUBSCRIBED", "USER_SUPPRESSED"),
    ],
)
@pytest.mark.parametrize("resubscribes", [True, False])
def test_suppression_is_lifted_only_by_the_setting(
    subscriptions: Json, resubscribes: bool, klaviyo: AccountClient
) -> None:
    """The endpoint would lift it."""
    profile = known(klaviyo, held=subscriptions, properties={"newsletter": False})
    assert send(klaviyo, customer(consent(True)), resubscribes=resubscribes) == [None]
    assert jobs(klaviyo) == ([CREATE] if resubscribes else [])
    assert profile["subscriptions"] == subscriptions or resubscribes
    assert profile["attributes"]["properties"]["newsletter"] is True


def test_person_who_is_subscribed_is_not_subscribed_again(klaviyo: AccountClient) -> None:
    """The person joined with a form."""
    known(klaviyo, held=held("SUBSCRIBED"))
    assert send(klaviyo, customer(consent(True))) == [None]
    assert jobs(klaviyo) == []


def test_consent_with_a_date_is_an_import(klaviyo: AccountClient) -> None:
    """Klaviyo skips double opt-in. Consents without a date are in another job."""
    since = "2025-01-01T00:00:00+00:00"
    operations = customer(consent(True, since=since)), customer(consent(True), key="bob")
    assert send(klaviyo, *operations) == [None, None]
    bodies = [body["data"]["attributes"] for name, body in klaviyo.calls if name == CREATE]
    assert [body.get("historical_import", False) for body in bodies] == [False, True]
    marketing = bodies[1]["profiles"]["data"][0]["attributes"]["subscriptions"]["email"]["marketing"]
    assert marketing == {"consent": "SUBSCRIBED", "consented_at": since}


@pytest.mark.parametrize("attributes", [{}, {"phone_number": PHONE}])
def test_only_the_own_address_is_subscribed(attributes: Json, klaviyo: AccountClient) -> None:
    """The number belongs to another profile, or the customer has none. The property stays as it is."""
    known(klaviyo, "bob", phone_number=PHONE)
    profile = known(klaviyo)
    assert send(klaviyo, customer(consent(True, "sms"), **attributes)) == [None]
    assert jobs(klaviyo) == []
    assert "texts" not in profile["attributes"]["properties"]


def test_shared_field_is_done_when_one_channel_is(klaviyo: AccountClient) -> None:
    """Otherwise every message would subscribe the person again."""
    profile = known(klaviyo)
    both = consent(True, name="marketing"), consent(True, "sms", name="marketing")
    assert send(klaviyo, customer(*both)) == [None]
    assert (status(profile), status(profile, "sms")) == ("SUBSCRIBED", None)
    assert profile["attributes"]["properties"]["marketing"] is True


def test_consent_without_an_address_to_unsubscribe_is_taken_back(klaviyo: AccountClient) -> None:
    """Klaviyo has no number that receives messages."""
    profile = known(klaviyo, properties={"texts": True})
    assert send(klaviyo, customer(consent(False, "sms"))) == [None]
    assert jobs(klaviyo) == []
    assert profile["attributes"]["properties"]["texts"] is False


def test_old_reading_is_read_again(klaviyo: AccountClient) -> None:
    """A bulk job can take minutes. The person possibly took the consent back since."""
    profile = known(klaviyo)
    old = customer(consent(True, age=MAX_AGE + 1), first_name="Ada")
    (error,) = send(klaviyo, old)
    assert isinstance(error, ReadingOutdated)
    assert jobs(klaviyo) == []
    assert profile["attributes"]["first_name"] == "Ada"


@pytest.mark.parametrize("latest", [True, False])
def test_stale_reading_is_read_again(latest: bool, klaviyo: AccountClient) -> None:
    """The message of an old version accepts it. It must neither subscribe nor unsubscribe the person."""
    profile = known(klaviyo, properties={"newsletter": not latest}, held=None if latest else held("SUBSCRIBED"))
    sender = Sender(klaviyo, 4, resubscribes=True)
    assert sender.send([customer(consent(latest, version=7))]) == [None]
    before = jobs(klaviyo), profile["subscriptions"]
    (error,) = sender.send([customer(consent(not latest, version=5))])
    assert isinstance(error, StaleRead)
    assert (jobs(klaviyo), profile["subscriptions"]) == before
    assert sender.send([customer(consent(latest, version=7))]) == [None]
    assert len(jobs(klaviyo)) == 1


@pytest.mark.parametrize("latest", [True, False])
def test_stale_reading_of_another_worker_has_no_effect(latest: bool, klaviyo: AccountClient) -> None:
    """The profile has the version that the first worker wrote. A later version has an effect in any worker."""
    profile = known(klaviyo, properties={"newsletter": not latest}, held=None if latest else held("SUBSCRIBED"))
    assert send(klaviyo, customer(consent(latest, version=7)), resubscribes=True) == [None]
    before = jobs(klaviyo), profile["subscriptions"], profile["attributes"]["properties"]
    (error,) = send(klaviyo, customer(consent(not latest, version=5)), resubscribes=True)
    assert isinstance(error, StaleRead)
    assert (jobs(klaviyo), profile["subscriptions"], profile["attributes"]["properties"]) == before
    assert send(klaviyo, customer(consent(not latest, version=8)), resubscribes=True) == [None]
    assert len(jobs(klaviyo)) == 2


@pytest.mark.parametrize("value", [False, None])
def test_consent_that_is_taken_back_before_the_search_shows_it(value: object, klaviyo: AccountClient) -> None:
    """A search possibly shows a profile as it was before. The person must not stay subscribed."""
    profile = known(klaviyo)
    before = copy.deepcopy(profile)
    klaviyo.account.find_profiles = lambda *_: [before]  # type: ignore[method-assign]
    sender = Sender(klaviyo, 4)
    assert sender.send([customer(consent(True, version=5))]) == [None]
    assert status(profile) == "SUBSCRIBED"
    assert sender.send([customer(consent(value, version=6))]) == [None]
    assert (jobs(klaviyo), status(profile)) == ([CREATE, DELETE], "UNSUBSCRIBED")
    assert profile["attributes"]["properties"].get("newsletter") == value


@pytest.mark.parametrize("error", [Rejected("404", 404), Transient("503")])
def test_profile_that_disappears_after_its_consent_was_written(error: WorkerError, klaviyo: AccountClient) -> None:
    """It is looked up again."""
    known(klaviyo)
    sender = Sender(klaviyo, 4)
    assert sender.send([customer(consent(True))]) == [None]

    def disappear(name: str, _body: Json) -> None:
        if name.startswith("GET /api/profiles/"):
            raise error

    klaviyo.before = disappear
    (found,) = sender.send([customer(consent(False, version=2))])
    assert isinstance(found, Transient)
    assert jobs(klaviyo) == [CREATE]


def test_profile_that_is_merged_before_its_subscription(klaviyo: AccountClient) -> None:
    """Klaviyo merges profiles by itself. The person's consent must not be a dead letter."""
    profile = known(klaviyo)
    merged = [Rejected("404", 404)] * 2  # as one of several, and alone

    def refuse(name: str, _body: Json) -> None:
        if name == CREATE and merged:
            raise merged.pop()

    klaviyo.before = refuse
    (error,) = send(klaviyo, customer(consent(True)))
    assert isinstance(error, Transient)
    assert send(klaviyo, customer(consent(True))) == [None]
    assert status(profile) == "SUBSCRIBED"


def test_later_consent_for_one_channel_is_the_version_of_both(klaviyo: AccountClient) -> None:
    """Any consent proves that the customer has had its version."""
    profile = known(klaviyo, held=held("SUBSCRIBED"), properties={"newsletter": True}, phone_number=PHONE)
    later = customer(consent(True, version=3), consent(True, "sms", version=3), phone_number=PHONE)
    assert send(klaviyo, later) == [None]
    (error,) = send(klaviyo, customer(consent(False, version=2), consent(True, "sms", version=2), phone_number=PHONE))
    assert isinstance(error, StaleRead)
    assert status(profile) == "SUBSCRIBED"


def test_crash_before_the_property_is_written_repeats_the_subscription(klaviyo: AccountClient) -> None:
    """But not for a person who has unsubscribed in the meantime."""
    profile = known(klaviyo)

    def crash(name: str, _body: Json) -> None:
        if name.startswith("PATCH"):
            raise Transient("503")

    klaviyo.before = crash
    (error,) = send(klaviyo, customer(consent(True)))
    assert isinstance(error, Transient)
    assert status(profile) == "SUBSCRIBED"
    klaviyo.before = lambda *_: None
    profile["subscriptions"] = held("UNSUBSCRIBED", "UNSUBSCRIBE")
    assert send(klaviyo, customer(consent(True))) == [None]
    assert status(profile) == "UNSUBSCRIBED"
    assert jobs(klaviyo) == [CREATE]


@pytest.mark.parametrize("error", [Transient("503"), EndpointRefused("403", None)])
def test_property_waits_for_the_subscription(error: WorkerError, klaviyo: AccountClient) -> None:
    """The next attempt subscribes the person."""
    profile = known(klaviyo)

    def fail(name: str, _body: Json) -> None:
        if name == CREATE:
            raise error

    klaviyo.before = fail
    assert send(klaviyo, customer(consent(True))) == [error]
    assert "newsletter" not in profile["attributes"]["properties"]


def test_rejected_consent_does_not_affect_others(klaviyo: AccountClient) -> None:
    """Klaviyo can reject the number of a country."""
    for key in ("ada", "bob", "cid"):
        known(klaviyo, key)
    bob = klaviyo.account.profiles[1]["id"]

    def reject(name: str, body: Json) -> None:
        if name == CREATE:
            for index, entry in enumerate(body["data"]["attributes"]["profiles"]["data"]):
                if entry["id"] == bob:
                    raise Rejected("invalid", 400, pointer=f"/data/attributes/profiles/data/{index}/attributes")

    klaviyo.before = reject
    results = send(klaviyo, *(customer(consent(True), key=key) for key in ("ada", "bob", "cid")))
    assert [type(error) for error in results] == [type(None), Rejected, type(None)]
    assert [status(profile) for profile in klaviyo.account.profiles] == ["SUBSCRIBED", None, "SUBSCRIBED"]


def test_many_consents_need_few_requests(klaviyo: AccountClient) -> None:
    """A job that unsubscribes takes 100 profiles."""
    keys = [f"c{number}" for number in range(150)]
    for key in keys:
        known(klaviyo, key, held=held("SUBSCRIBED"), properties={"newsletter": True})
    assert send(klaviyo, *(customer(consent(False), key=key) for key in keys)) == [None] * 150
    assert jobs(klaviyo) == [DELETE] * 2
    assert not any(name.startswith("GET /api/profiles/") for name in klaviyo.names)
    assert {status(profile) for profile in klaviyo.account.profiles} == {"UNSUBSCRIBED"}


def test_profile_that_klaviyo_does_not_show_yet_is_waited_for(klaviyo: AccountClient) -> None:
    """It was just created."""
    account = klaviyo.account
    find = account.find_profiles
    account.find_profiles = lambda name, value: find(name, value) if name == "email" else []  # type: ignore[method-assign]
    (error,) = send(klaviyo, customer(consent(True)))
    assert isinstance(error, Transient)
    assert jobs(klaviyo) == []


def test_consents_wait_for_the_scope_to_read_profiles(klaviyo: AccountClient) -> None:
    """Without the last consent, no change is known."""

    def refuse(name: str, _body: Json) -> None:
        if name == "GET /api/profiles":
            raise EndpointRefused("403", None)

    klaviyo.before = refuse
    (error,) = send(klaviyo, customer(consent(True)))
    assert isinstance(error, EndpointRefused)
    assert jobs(klaviyo) == []


def test_request_to_show_has_the_consents() -> None:
    """The property is written last, but it is a part of the profile."""
    body = request_for(customer(consent(True), consent(None, "sms"))).body
    assert body is not None
    assert body["data"]["attributes"]["properties"] == {"newsletter": True}
