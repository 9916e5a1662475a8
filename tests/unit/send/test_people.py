"""The sender for profiles: whose profile it is, what is written, and what is not."""

from __future__ import annotations

import logging
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import replace
from threading import Event
from typing import TYPE_CHECKING, Any

import orjson
import pytest

from tests.support.klaviyo_account import AccountClient
from tests.support.sender import Sender
from worker.errors import EndpointRefused, JobUnfinished, Rejected, RequestBlocked, Throttled, Transient
from worker.model import Json, Operation, OperationKind
from worker.sandbox.klaviyo.account import PHONE_MATCHES, Account

if TYPE_CHECKING:
    from collections.abc import Iterator

    from worker.errors import WorkerError

pytestmark = pytest.mark.usefixtures("fast_jobs")

READ, CREATE, MERGE, IMPORT = (
    "GET /api/profiles",
    "POST /api/profiles",
    "POST /api/profile-merge",
    "POST /api/profile-import",
)
JOBS = "POST /api/profile-bulk-import-jobs"
PHONE = "+442079460958"
MANY = 20  # more than the threshold


@pytest.fixture(params=PHONE_MATCHES)
def klaviyo(request: pytest.FixtureRequest) -> AccountClient:
    return AccountClient(Account(phone_match=request.param))


def customer(key: str, email: str | None = None, **attributes: Any) -> Operation:
    who = {"external_id": key, "email": email or f"{key}@example.com"} | attributes
    return Operation(OperationKind.UPSERT_PROFILE, key, {"type": "profile", "attributes": who})


def guest(email: str, *, any_profile: bool = False, **attributes: Any) -> Operation:
    resource = {"type": "profile", "attributes": {"email": email} | attributes}
    return Operation(OperationKind.UPSERT_GUEST, email.lower(), resource, any_profile=any_profile)


def send(klaviyo: AccountClient, *operations: Operation, **options: Any) -> list[WorkerError | None]:
    return Sender(klaviyo, 4, **options).send(operations)


def attributes_of(klaviyo: AccountClient, **wanted: str) -> Json:
    """Return the attributes of the only profile with these attributes."""
    found: Json
    (found,) = [p["attributes"] for p in klaviyo.account.profiles if wanted.items() <= p["attributes"].items()]
    return found


def written(attributes: Json) -> Json:
    """Return the attributes of a profile that were written to it."""
    return {name: value for name, value in attributes.items() if name not in {"created", "properties"}}


def sent_values(klaviyo: AccountClient, name: str) -> set[object]:
    """Return all values of an attribute in the requests."""

    def find(document: object) -> Iterator[object]:
        if isinstance(document, dict):
            yield from (value for key, value in document.items() if key == name)
        if isinstance(document, dict | list):
            for each in document.values() if isinstance(document, dict) else document:
                yield from find(each)

    return {value for _, body in klaviyo.calls for value in find(body)}


def writes(klaviyo: AccountClient) -> list[str]:
    return [name.split("profiles/")[0] for name in klaviyo.names if not name.startswith("GET")]


# The changes that are written


def test_customer_whom_klaviyo_knows_costs_one_read_and_one_write(klaviyo: AccountClient) -> None:
    """Only what differs is written."""
    nora = klaviyo.profile(email="nora@example.com", external_id="nora", first_name="Nora", last_name="Old")
    assert send(klaviyo, customer("nora", first_name="Nora", last_name="Berg")) == [None]
    (read, _), (write, body) = klaviyo.calls
    assert (read, write.startswith("PATCH")) == (READ, True)
    assert body["data"]["attributes"] == {"last_name": "Berg"}
    assert nora["last_name"] == "Berg"


def test_nothing_is_written_if_nothing_differs(klaviyo: AccountClient) -> None:
    """Klaviyo compares email addresses without regard to case, and an empty value is as good as none."""
    klaviyo.profile(
        email="Nora@Example.com",
        external_id="nora",
        location={"city": "Leeds", "timezone": "Europe/London"},
        properties={"Title": "", "shoeSize": 38.0, "Points": 12},
    )
    state: Json = {
        "location": {"city": "Leeds", "zip": None},
        "properties": {"Title": None, "shoeSize": 38},
        "locale": None,
    }
    assert send(klaviyo, customer("nora", "nora@example.com", **state)) == [None]
    assert klaviyo.names == [READ]


def test_new_customer_is_created_without_nulls(klaviyo: AccountClient) -> None:
    """The identifiers are looked up first, because another person can have them."""
    state: Json = {
        "first_name": "Nora",
        "last_name": None,
        "location": {"city": None},
        "properties": {"a": None, "b": 1},
    }
    assert send(klaviyo, customer("nora", phone_number=PHONE, **state)) == [None]
    assert klaviyo.names == [READ, READ, READ, CREATE]
    assert klaviyo.calls[-1][1]["data"]["attributes"] == {
        "external_id": "nora",
        "email": "nora@example.com",
        "phone_number": PHONE,
        "first_name": "Nora",
        "properties": {"b": 1},
    }


def test_what_commercetools_no_longer_has_is_cleared(klaviyo: AccountClient) -> None:
    """That includes custom fields that the worker wrote before. The properties of others stay."""
    nora = klaviyo.profile(
        email="nora@example.com",
        external_id="nora",
        phone_number=PHONE,
        organization="Berg Ltd",
        title="Head of Tea",
        location={"city": "Leeds", "country": "GB", "timezone": "Europe/London"},
        properties={"customerGroup": "vip", "newsletter": True, "commercetoolsFields": ["newsletter"], "Points": 12},
    )
    state: Json = {
        "organization": None,
        "location": {"city": None, "country": "GB"},
        "properties": {"customerGroup": None, "commercetoolsFields": []},
    }
    assert send(klaviyo, customer("nora", **state)) == [None]
    assert (nora["organization"], nora["title"], nora["phone_number"]) == (None, "Head of Tea", PHONE)
    assert nora["location"] == {"country": "GB", "timezone": "Europe/London"}
    assert nora["properties"] == {"Points": 12, "commercetoolsFields": []}
    assert send(klaviyo, customer("nora", phone_number=None)) == [None]
    assert nora["phone_number"] is None


def test_many_profiles_are_read_and_written_in_bulk(klaviyo: AccountClient) -> None:
    """Each of 500 customers has changed: 5 reads, a job, and a lookup of the job."""
    for number in range(500):
        klaviyo.profile(email=f"{number}@example.com", external_id=str(number))
    batch = [customer(str(number), f"{number}@example.com", first_name="Ada") for number in range(500)]
    assert send(klaviyo, *batch) == [None] * 500
    assert Counter(klaviyo.names) == {READ: 5, JOBS: 1, "GET /api/profile-bulk-import-jobs": 1}
    assert {profile["attributes"]["first_name"] for profile in klaviyo.account.profiles} == {"Ada"}
    klaviyo.calls.clear()
    assert send(klaviyo, *batch) == [None] * 500
    assert Counter(klaviyo.names) == {READ: 5}


def test_new_profiles_get_their_identifiers_after_the_job_that_creates_them(klaviyo: AccountClient) -> None:
    """A job would update the profile that has the email address or phone number by then."""
    batch = [customer(f"c{n}", phone_number=f"+4420794609{n}", first_name="Ada") for n in range(10, 10 + MANY)]
    assert send(klaviyo, *batch) == [None] * MANY
    created, completed = (body for name, body in klaviyo.calls if name == JOBS)
    entry, update = (job["data"]["attributes"]["profiles"]["data"][0] for job in (created, completed))
    assert entry == {"type": "profile", "attributes": {"external_id": "c10", "first_name": "Ada"}}
    assert update["id"] in {profile["id"] for profile in klaviyo.account.profiles}
    assert update["attributes"].keys() == {"external_id", "email", "phone_number"}
    assert [written(profile["attributes"]) for profile in klaviyo.account.profiles] == [
        operation.resource["attributes"] for operation in batch if operation.resource
    ]


def test_profiles_with_something_to_clear_are_written_individually(klaviyo: AccountClient) -> None:
    """A job ignores null."""
    for number in range(MANY):
        klaviyo.profile(email=f"{number}@example.com", external_id=str(number), last_name="Old")
    batch = [customer(str(n), f"{n}@example.com", last_name="New" if n else None) for n in range(MANY)]
    assert send(klaviyo, *batch) == [None] * MANY
    assert sorted(writes(klaviyo)) == ["PATCH /api/", JOBS]
    assert attributes_of(klaviyo, external_id="0")["last_name"] is None


# Whose profile


@pytest.mark.parametrize("others", [0, MANY])
def test_shared_phone_stays_with_the_profile_that_has_it(others: int, klaviyo: AccountClient) -> None:
    """It is never sent, and kept as a property. If it is free later, the property goes."""
    nora = klaviyo.profile(email="nora@example.com", external_id="nora", phone_number=PHONE)
    batch = [
        customer("olaf", phone_number=PHONE, properties={"commercetoolsFields": None}),
        *(customer(f"c{number}") for number in range(others)),
    ]
    assert send(klaviyo, *batch) == [None] * len(batch)
    olaf = attributes_of(klaviyo, email="olaf@example.com")
    assert (nora["external_id"], nora["phone_number"]) == ("nora", PHONE)
    assert (olaf["external_id"], olaf.get("phone_number"), olaf["properties"]["Phone"]) == ("olaf", None, PHONE)
    assert PHONE not in sent_values(klaviyo, "phone_number")
    klaviyo.account.update_profile(
        klaviyo.account.profiles[0]["id"],
        {"id": klaviyo.account.profiles[0]["id"], "attributes": {"phone_number": None}},
    )
    assert send(klaviyo, *batch) == [None] * len(batch)
    assert olaf["phone_number"] == PHONE
    assert "Phone" not in olaf["properties"]


@pytest.mark.parametrize("others", [0, MANY])
def test_identifier_that_two_customers_of_a_batch_want_belongs_to_the_first(
    others: int, klaviyo: AccountClient
) -> None:
    """Two customers never share a profile."""
    batch = [customer(f"c{number}") for number in range(others)]
    pair = [customer("nora", "berg@example.com", phone_number=PHONE), customer("olaf", "berg@example.com")]
    assert send(klaviyo, *batch, *pair, customer("pia", phone_number=PHONE)) == [None] * (others + 3)
    assert attributes_of(klaviyo, external_id="nora")["email"] == "berg@example.com"
    assert attributes_of(klaviyo, external_id="olaf").get("email") is None
    assert attributes_of(klaviyo, external_id="pia")["properties"]["Phone"] == PHONE


@pytest.mark.parametrize("others", [0, MANY])
def test_profile_of_the_email_address_alone_becomes_the_customers(others: int, klaviyo: AccountClient) -> None:
    """A guest who registers has one profile."""
    nora = klaviyo.profile(email="Nora@example.com", properties={"Guest since": "2024"})
    batch = [customer("nora", first_name="Nora"), *(customer(f"c{number}") for number in range(others))]
    assert send(klaviyo, *batch) == [None] * len(batch)
    assert (nora["external_id"], nora["first_name"]) == ("nora", "Nora")
    assert nora["properties"] == {"Guest since": "2024"}
    assert len(klaviyo.account.profiles) == len(batch)


@pytest.mark.parametrize("others", [0, MANY])
def test_email_of_another_customer_stays_there(
    others: int, klaviyo: AccountClient, caplog: pytest.LogCaptureFixture
) -> None:
    """The rest is written by external_id."""
    nora = klaviyo.profile(email="nora@example.com", external_id="nora", first_name="Nora")
    batch = [customer("olaf", "nora@example.com", first_name="Olaf"), *(customer(f"c{n}") for n in range(others))]
    for _ in range(2):
        with caplog.at_level(logging.INFO, "klaviyo_worker"):
            assert send(klaviyo, *batch) == [None] * len(batch)
    assert (nora["external_id"], nora["first_name"]) == ("nora", "Nora")
    olaf = attributes_of(klaviyo, external_id="olaf")
    assert (olaf.get("email"), olaf["first_name"]) == (None, "Olaf")
    assert "nora@example.com" not in sent_values(klaviyo, "email")
    dropped = [record for record in caplog.records if record.message == "identifier_dropped"]
    assert {record.__dict__["identifier"] for record in dropped} == {"email"}
    assert "nora@" not in str([vars(record) for record in caplog.records])


def test_customer_who_takes_over_the_address_of_a_guest_gets_the_guests_profile(klaviyo: AccountClient) -> None:
    """Both are one person."""
    nora = klaviyo.profile(email="nora.old@example.com", external_id="nora", first_name="Nora")
    klaviyo.profile(email="nora.new@example.com", first_name="N.", properties={"Guest since": "2024"})
    assert send(klaviyo, customer("nora", "nora.new@example.com")) == [None]
    (profile,) = klaviyo.account.profiles
    assert profile["attributes"] is nora
    assert (nora["email"], nora["first_name"], nora["properties"]["Guest since"]) == (
        "nora.new@example.com",
        "Nora",
        "2024",
    )
    assert len(klaviyo.account.merges) == 1


def test_profiles_are_not_merged_if_the_mapping_says_so(klaviyo: AccountClient) -> None:
    """The email address stays with the guest."""
    nora = klaviyo.profile(email="nora.old@example.com", external_id="nora")
    klaviyo.profile(email="nora.new@example.com")
    operation = customer("nora", "nora.new@example.com", organization="Berg Ltd")
    assert send(klaviyo, operation, merges_guests=False) == [None]
    assert (nora["email"], nora["organization"], klaviyo.account.merges) == ("nora.old@example.com", "Berg Ltd", [])


def test_merge_is_waited_for_and_requested_once() -> None:
    """Klaviyo merges profiles some time after it has accepted the request."""
    klaviyo = AccountClient(Account(merge_seconds=1_000_000.0))
    sender = Sender(klaviyo, 4)
    nora = klaviyo.profile(email="nora.old@example.com", external_id="nora")
    klaviyo.profile(email="nora.new@example.com")
    operation = customer("nora", "nora.new@example.com")
    for _ in range(2):
        (error,) = sender.send([operation])
        assert isinstance(error, Transient)
    assert klaviyo.names.count(MERGE) == 1
    klaviyo.account.merge_seconds = 0.0
    customer_id, guest_id = (profile["id"] for profile in klaviyo.account.profiles)
    klaviyo.account.merge_profiles(customer_id, [guest_id])
    assert sender.send([operation]) == [None]
    assert nora["email"] == "nora.new@example.com"


@pytest.mark.parametrize(
    "change", [{"external_id": "mallory"}, {"email": "other@example.com"}, None], ids=["customer", "moved", "gone"]
)
def test_profiles_are_read_again_immediately_before_a_merge(change: Json | None, klaviyo: AccountClient) -> None:
    """A merge cannot be undone. Another worker can write between the reading and the merge."""
    klaviyo.profile(email="nora.old@example.com", external_id="nora")
    klaviyo.profile(email="nora.new@example.com", first_name="N.")
    other = klaviyo.account.profiles[1]

    def interfere(_name: str, _body: Json) -> None:
        if klaviyo.names == [READ, READ]:
            if change is None:
                klaviyo.account.request_deletion({"id": other["id"]})
            else:
                klaviyo.account.update_profile(other["id"], {"id": other["id"], "attributes": change})

    klaviyo.before = interfere
    assert send(klaviyo, customer("nora", "nora.new@example.com")) == [None]
    assert klaviyo.account.merges == []
    assert attributes_of(klaviyo, external_id="nora")["email"] == (
        "nora.old@example.com" if change and "external_id" in change else "nora.new@example.com"
    )


@pytest.mark.parametrize("phone", [None, "+442079460959"])
def test_phone_number_that_moves_within_a_batch_follows_its_customer(phone: str | None, klaviyo: AccountClient) -> None:
    """The customer who has another number, or none, is written first."""
    nora = klaviyo.profile(email="nora@example.com", external_id="nora", phone_number=PHONE)
    assert send(klaviyo, customer("olaf", phone_number=PHONE), customer("nora", phone_number=phone)) == [None, None]
    assert nora["phone_number"] == phone
    assert attributes_of(klaviyo, external_id="olaf")["phone_number"] == PHONE


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_identifiers_that_move_within_a_batch_follow_their_customers(
    order: tuple[int, int], klaviyo: AccountClient
) -> None:
    """The customer who gives an identifier up is written first."""
    nora = klaviyo.profile(email="berg@example.com", external_id="nora", phone_number=PHONE)
    olaf = klaviyo.profile(email="olaf@example.com", external_id="olaf")
    batch = [
        customer("nora", "nora@example.com", phone_number=None),
        customer("olaf", "berg@example.com", phone_number=PHONE),
    ]
    assert send(klaviyo, *(batch[index] for index in order)) == [None, None]
    assert (nora["email"], nora["phone_number"]) == ("nora@example.com", None)
    assert (olaf["email"], olaf["phone_number"]) == ("berg@example.com", PHONE)


def test_customers_who_swap_their_addresses_keep_those_that_klaviyo_has(klaviyo: AccountClient) -> None:
    """Neither can be written first."""
    nora = klaviyo.profile(email="a@example.com", external_id="nora")
    olaf = klaviyo.profile(email="b@example.com", external_id="olaf")
    batch = [customer("nora", "b@example.com", first_name="Nora"), customer("olaf", "a@example.com")]
    assert send(klaviyo, *batch) == [None, None]
    assert (nora["email"], olaf["email"], nora["first_name"]) == ("a@example.com", "b@example.com", "Nora")


# Conflicts with other writers


def test_profile_that_another_worker_has_just_created_is_not_overwritten(klaviyo: AccountClient) -> None:
    """Klaviyo's 409 decides. The next reading shows whose profile it is."""
    created: list[Json] = []

    def interfere(name: str, _body: Json) -> None:
        if name == CREATE and not created:
            created.append(klaviyo.profile(email="berg@example.com", external_id="nora", phone_number=PHONE))

    klaviyo.before = interfere
    assert send(klaviyo, customer("olaf", "berg@example.com", phone_number=PHONE, first_name="Olaf")) == [None]
    assert created[0].get("first_name") is None
    olaf = attributes_of(klaviyo, external_id="olaf")
    assert (olaf.get("email"), olaf["properties"]["Phone"]) == (None, PHONE)


def test_profile_that_has_just_disappeared_is_created(klaviyo: AccountClient) -> None:
    """Klaviyo merges profiles by itself, and operators delete them."""
    klaviyo.profile(email="nora@example.com", external_id="nora")

    def interfere(name: str, _body: Json) -> None:
        if name.startswith("PATCH"):
            klaviyo.account.request_deletion({"id": klaviyo.account.profiles[0]["id"]})

    klaviyo.before = interfere
    assert send(klaviyo, customer("nora", first_name="Nora")) == [None]
    assert attributes_of(klaviyo, external_id="nora")["first_name"] == "Nora"


@pytest.mark.parametrize(("taken", "left"), [({"phone_number"}, "nora@example.com"), ({"email"}, None)])
def test_identifier_of_a_profile_that_cannot_be_found_is_dropped(
    taken: set[str], left: str | None, klaviyo: AccountClient
) -> None:
    """For example a secondary email address: no reading shows who has it. The weaker identifier goes first."""

    def refuse(name: str, body: Json) -> None:
        if name == CREATE and taken & body["data"]["attributes"].keys():
            raise Rejected("duplicate", 409, "01SOMEBODY")

    klaviyo.before = refuse
    assert send(klaviyo, customer("nora", phone_number=PHONE, first_name="Nora")) == [None]
    nora = attributes_of(klaviyo, external_id="nora")
    assert (nora.get("email"), nora["properties"]["Phone"], nora["first_name"]) == (left, PHONE, "Nora")


def hide_new_profiles(klaviyo: AccountClient) -> None:
    """Let Klaviyo's search not show the profiles that are created from now on."""
    find, shown = klaviyo.account.find_profiles, {profile["id"] for profile in klaviyo.account.profiles}

    def find_profiles(name: str, value: str) -> list[Json]:
        return [profile for profile in find(name, value) if profile["id"] in shown]

    klaviyo.account.find_profiles = find_profiles  # type: ignore[method-assign]


def test_profile_that_the_search_does_not_show_yet_is_updated(klaviyo: AccountClient) -> None:
    """Two messages about a new customer often arrive together. Klaviyo's 409 names the profile."""
    hide_new_profiles(klaviyo)
    assert send(klaviyo, customer("nora", phone_number=PHONE, first_name="N.")) == [None]
    assert send(klaviyo, customer("nora", phone_number=PHONE, first_name="Nora")) == [None]
    (profile,) = klaviyo.account.profiles
    assert (profile["attributes"]["first_name"], profile["attributes"]["phone_number"]) == ("Nora", PHONE)
    assert send(klaviyo, customer("olaf", "nora@example.com", phone_number=PHONE)) == [None]
    olaf = attributes_of(klaviyo, external_id="olaf")
    assert (olaf.get("email"), olaf["properties"]["Phone"]) == (None, PHONE)


def test_profiles_of_a_job_that_the_search_does_not_show_yet_are_waited_for(klaviyo: AccountClient) -> None:
    """Their identifiers are added by Klaviyo's id, which is not known yet. They are not created again."""
    find = klaviyo.account.find_profiles
    hide_new_profiles(klaviyo)
    batch = [customer(f"c{number}") for number in range(MANY)]
    sender = Sender(klaviyo, 4)
    assert [type(error) for error in sender.send(batch)] == [Transient] * MANY
    assert klaviyo.names.count(JOBS) == 1
    klaviyo.account.find_profiles = find  # type: ignore[method-assign]
    assert sender.send(batch) == [None] * MANY
    assert {profile["attributes"]["email"] for profile in klaviyo.account.profiles} == {
        f"c{number}@example.com" for number in range(MANY)
    }


def test_guest_whom_the_search_does_not_show_yet_becomes_the_customer(klaviyo: AccountClient) -> None:
    """A guest orders and registers at once. The profile that Klaviyo's 409 names keeps its email address."""
    hide_new_profiles(klaviyo)
    assert send(klaviyo, guest("nora@example.com", first_name="N.")) == [None]
    assert send(klaviyo, customer("nora", first_name="Nora")) == [None]
    nora = attributes_of(klaviyo, external_id="nora")
    assert (nora.get("email"), nora["first_name"], len(klaviyo.account.profiles)) == ("nora@example.com", "Nora", 1)


def freeze_search(klaviyo: AccountClient) -> None:
    """Let Klaviyo's search show the profiles as they are now."""
    find, shown = klaviyo.account.find_profiles, {each["id"]: deepcopy(each) for each in klaviyo.account.profiles}

    def find_profiles(name: str, value: str) -> list[Json]:
        return [shown[profile["id"]] for profile in find(name, value) if profile["id"] in shown]

    klaviyo.account.find_profiles = find_profiles  # type: ignore[method-assign]


def test_guest_whom_the_search_still_shows_stays_with_the_first_customer(klaviyo: AccountClient) -> None:
    """Two stores have a customer with the guest's email address. A profile is never taken from a customer."""
    klaviyo.profile(email="berg@example.com")
    freeze_search(klaviyo)
    assert send(klaviyo, customer("nora", "berg@example.com", first_name="Nora")) == [None]
    assert send(klaviyo, customer("olaf", "berg@example.com", first_name="Olaf")) == [None]
    nora, olaf = (attributes_of(klaviyo, external_id=key) for key in ("nora", "olaf"))
    assert [(each.get("email"), each["first_name"]) for each in (nora, olaf)] == [
        ("berg@example.com", "Nora"),
        (None, "Olaf"),
    ]


def test_guests_whom_the_search_still_shows_stay_with_the_customers_of_a_job(klaviyo: AccountClient) -> None:
    """A backfill writes the customers of one store after those of another. A job has no 409."""
    for number in range(MANY):
        klaviyo.profile(email=f"{number}@example.com")
    freeze_search(klaviyo)
    sender = Sender(klaviyo, 4)
    for store in ("de", "fr"):
        batch = [customer(f"{store}-{number}", f"{number}@example.com", first_name=store) for number in range(MANY)]
        sender.send(batch)
    klaviyo.account.find_profiles = Account.find_profiles.__get__(klaviyo.account)  # type: ignore[method-assign]
    for number in range(MANY):
        assert attributes_of(klaviyo, email=f"{number}@example.com")["external_id"] == f"de-{number}"
        assert "email" not in written(attributes_of(klaviyo, external_id=f"fr-{number}"))


def test_customer_whose_job_has_not_started_has_not_got_the_profile(klaviyo: AccountClient) -> None:
    """The profile stays free for another customer with its address."""
    for number in range(MANY):
        klaviyo.profile(email=f"{number}@example.com")

    def throttle(name: str, _body: Json) -> None:
        if name == JOBS:
            raise Throttled("429")

    klaviyo.before = throttle
    sender = Sender(klaviyo, 4)
    first, second = ([customer(f"{s}-{n}", f"{n}@example.com") for n in range(MANY)] for s in ("de", "fr"))
    assert {type(error) for error in sender.send(first)} == {Throttled}
    klaviyo.before = lambda *_: None
    assert sender.send(second) == [None] * MANY
    assert {each["attributes"]["external_id"] for each in klaviyo.account.profiles} == {each.key for each in second}


@pytest.mark.parametrize("error", [Transient("503"), EndpointRefused("403")])
def test_named_profile_that_cannot_be_read(error: WorkerError, klaviyo: AccountClient) -> None:
    """An outage is waited for. Without the scope, the profile is imported."""
    klaviyo.profile(email="berg@example.com", external_id="nora")
    hide_new_profiles(klaviyo)
    klaviyo.account.find_profiles = lambda *_: []  # type: ignore[method-assign]

    def fail(name: str, _body: Json) -> None:
        if name.startswith("GET /api/profiles/"):
            raise error

    klaviyo.before = fail
    expected = error if not isinstance(error, EndpointRefused) else None
    assert send(klaviyo, customer("nora", "berg@example.com", first_name="Nora")) == [expected]


def test_conflict_that_names_no_identifier_is_a_transient_error(klaviyo: AccountClient) -> None:
    """Nothing is left to drop. The customer must not become a dead letter."""

    def refuse(name: str, _body: Json) -> None:
        if name == CREATE:
            raise Rejected("duplicate", 409)

    klaviyo.before = refuse
    (error,) = send(klaviyo, customer("nora"))
    assert isinstance(error, Transient)


def test_conflict_that_does_not_end_is_a_transient_error(klaviyo: AccountClient) -> None:
    """Another process deletes the profile each time."""
    klaviyo.profile(email="nora@example.com", external_id="nora")

    def refuse(name: str, _body: Json) -> None:
        if name.startswith("PATCH"):
            raise Rejected("gone", 404)

    klaviyo.before = refuse
    (error,) = send(klaviyo, customer("nora", first_name="Nora"))
    assert isinstance(error, Transient)


def test_conflict_with_a_profile_that_klaviyo_merges_is_waited_out(klaviyo: AccountClient) -> None:
    """The search shows the end of a merge before the identifiers are free."""
    nora = klaviyo.profile(email="nora.old@example.com", external_id="nora")
    klaviyo.profile(email="nora.new@example.com")
    source = klaviyo.account.profiles[1]["id"]
    conflicts = iter([True])

    def refuse(name: str, _body: Json) -> None:
        if name.startswith("PATCH") and next(conflicts, False):
            raise Rejected("duplicate", 409, source)

    klaviyo.before = refuse
    sender = Sender(klaviyo, 4)
    (error,) = sender.send([customer("nora", "nora.new@example.com")])
    assert isinstance(error, Transient)
    assert sender.send([customer("nora", "nora.new@example.com")]) == [None]
    assert nora["email"] == "nora.new@example.com"


def test_lanes_never_write_the_same_identifier_at_the_same_time() -> None:
    """Both would read that it is free."""
    klaviyo = AccountClient()
    reading, may_go_on = Event(), Event()

    def wait(name: str, _body: Json) -> None:
        if name == CREATE and not reading.is_set():
            reading.set()
            assert may_go_on.wait(60)

    klaviyo.before = wait
    sender = Sender(klaviyo, 4)
    with ThreadPoolExecutor(2) as lanes:
        first = lanes.submit(sender.send, [customer("nora", "berg@example.com")])
        assert reading.wait(60)
        second = lanes.submit(sender.send, [customer("olaf", "BERG@example.com")])
        third = sender.send([guest("berg@example.com", first_name="Gert")])
        assert (third, second.done()) == ([None], False)
        may_go_on.set()
        assert (first.result(60), second.result(60)) == ([None], [None])
    berg = attributes_of(klaviyo, email="berg@example.com")
    assert written(berg) == {"email": "berg@example.com", "external_id": "nora"}


# Guests


@pytest.mark.parametrize("others", [0, MANY])
def test_guest_gets_a_profile_and_updates_it(others: int, klaviyo: AccountClient) -> None:
    """A guest has no other identifier than the email address."""
    batch = [guest(f"{number}@example.com", first_name="Ada") for number in range(others)]
    for city in ("Leeds", "Hull"):
        known = guest("Gert@example.com", first_name="Gert", location={"city": city})
        assert send(klaviyo, known, *batch, bulk_threshold=1) == [None] * (others + 1)
        gert = attributes_of(klaviyo, email="Gert@example.com")
        assert (gert["first_name"], gert["location"]) == ("Gert", {"city": city})
    assert len(klaviyo.account.profiles) == others + 1


@pytest.mark.parametrize(("guests", "calls"), [(10, {READ: 1, IMPORT: 0, JOBS: 0}), (11, {READ: 1, JOBS: 1})])
def test_many_guests_are_sent_in_a_job(guests: int, calls: dict[str, int], klaviyo: AccountClient) -> None:
    """Orders wait for these jobs, but for less time than for Klaviyo's rate limit of individual requests."""
    batch = [guest(f"{number}@example.com", first_name="Ada") for number in range(guests)]
    assert set(send(klaviyo, *batch)) == {None}
    counted = Counter(klaviyo.names)
    assert {name: counted[name] for name in calls} == calls
    assert len(klaviyo.account.profiles) == guests


def test_order_does_not_wait_for_a_job_of_guests_that_does_not_end() -> None:
    """The job could only repeat the write. A customer's job could write an older state."""
    klaviyo = AccountClient(Account(job_seconds=3_600.0))
    guests = [guest(f"{number}@example.com", first_name="Ada") for number in range(2)]
    (error, _) = send(klaviyo, *guests, bulk_threshold=0, job_timeout=0.1)
    assert isinstance(error, Transient)
    assert not isinstance(error, JobUnfinished)
    assert send(klaviyo, *guests, bulk_threshold=0, job_timeout=0.1)
    (error, _) = send(klaviyo, customer("nora"), customer("olaf"), bulk_threshold=0, job_timeout=0.1)
    assert isinstance(error, JobUnfinished)


def test_guest_does_not_change_the_profile_of_a_customer(klaviyo: AccountClient) -> None:
    """A guest can order with another person's email address and phone number."""
    nora = klaviyo.profile(email="nora@example.com", external_id="nora", first_name="Nora", phone_number=PHONE)
    before = orjson.dumps(nora)
    assert send(klaviyo, guest("nora@example.com", first_name="Gert")) == [None]
    assert send(klaviyo, guest("gert@example.com", phone_number=PHONE)) == [None]
    assert orjson.dumps(nora) == before
    assert attributes_of(klaviyo, email="gert@example.com")["properties"]["Phone"] == PHONE
    assert send(klaviyo, guest("nora@example.com", any_profile=True, first_name="Norah")) == [None]
    assert nora["first_name"] == "Norah"


def buyer(email: str, customer: str) -> Operation:
    return guest(email, any_profile=True, external_id=customer, first_name="Accounts")


def test_order_of_a_customer_changes_no_other_profile(klaviyo: AccountClient) -> None:
    """With order.buyer = "all", the billing address is written to the customer's profile, wherever the email is."""
    nora = klaviyo.profile(email="nora@example.com", external_id="nora", first_name="Nora")
    other = klaviyo.profile(email="shared@example.com", external_id="other", first_name="Olaf")
    klaviyo.profile(email="guest@example.com", first_name="Gert")
    before = orjson.dumps(klaviyo.account.profiles[1:])
    for email in ("nora@example.com", "shared@example.com", "guest@example.com", "new@example.com"):
        nora["first_name"] = "Nora"
        assert send(klaviyo, buyer(email, "nora")) == [None]
        assert (nora["first_name"], nora["email"]) == ("Accounts", "nora@example.com")
        assert orjson.dumps(klaviyo.account.profiles[1:]) == before
    assert send(klaviyo, buyer("shared@example.com", "ada")) == [None]
    assert (other["first_name"], len(klaviyo.account.profiles)) == ("Olaf", 3)


def test_order_of_a_new_customer_creates_the_profile(klaviyo: AccountClient) -> None:
    """The profile of a guest with the customer's address becomes the customer's."""
    gert = klaviyo.profile(email="gert@example.com")
    for email, name in (("gert@example.com", "gert"), ("nora@example.com", "nora")):
        assert send(klaviyo, buyer(email, name)) == [None]
        assert attributes_of(klaviyo, email=email, external_id=name)["first_name"] == "Accounts"
    assert gert["external_id"] == "gert"


@pytest.mark.parametrize("others", [0, MANY])
def test_customers_order_never_moves_an_address(others: int, klaviyo: AccountClient) -> None:
    """With order.buyer = "all", orders are written to the profiles of customers, whose address can be another one."""
    nora = klaviyo.profile(email="nora@example.com", external_id="nora")
    olaf = klaviyo.profile(email="olaf@example.com", external_id="olaf")
    buyers = [("olaf", "nora@example.com"), ("pia", "nora@example.com"), ("quin", "quin@example.com")]
    buyers += [(f"c{number}", f"{number}@example.com") for number in range(others)]
    orders = [guest(email, any_profile=True, external_id=key, first_name=key) for key, email in buyers]
    operations = [replace(order, key=key) for order, (key, _) in zip(orders, buyers, strict=True)]
    assert send(klaviyo, *operations, bulk_threshold=0 if others else 10) == [None] * len(orders)
    assert (nora["email"], nora["external_id"], nora.get("first_name")) == ("nora@example.com", "nora", None)
    assert (olaf["email"], olaf["external_id"], olaf["first_name"]) == ("olaf@example.com", "olaf", "olaf")
    assert attributes_of(klaviyo, external_id="quin")["first_name"] == "quin"
    jobs_sent = [body["data"]["attributes"]["profiles"]["data"] for name, body in klaviyo.calls if name == JOBS]
    assert len(jobs_sent) == bool(others)
    assert not any("email" in entry["attributes"] for entries in jobs_sent for entry in entries)


# Without profiles:read


def refuse_reads(name: str, _body: Json) -> None:
    if name == READ:
        raise EndpointRefused("the scope profiles:read is missing")


def test_without_the_scope_to_read_profiles_are_imported_without_phone(klaviyo: AccountClient) -> None:
    """The phone number can be another person's."""
    nora = klaviyo.profile(email="nora@example.com", external_id="nora", phone_number=PHONE, last_name="Berg")
    klaviyo.before = refuse_reads
    batch = [customer("olaf", phone_number=PHONE, last_name=None), customer("nora", first_name="Nora")]
    assert send(klaviyo, *batch) == [None, None]
    assert writes(klaviyo) == [IMPORT, IMPORT]
    assert attributes_of(klaviyo, external_id="olaf")["properties"]["Phone"] == PHONE
    assert (nora["first_name"], nora["last_name"], nora["phone_number"]) == ("Nora", "Berg", PHONE)


def test_without_the_scope_to_read_the_profile_that_a_conflict_names_is_left_alone(klaviyo: AccountClient) -> None:
    """It can be another person's."""
    nora = klaviyo.profile(email="nora@example.com", external_id="nora")
    olaf = klaviyo.profile(email="olaf@example.com", external_id="olaf")
    klaviyo.before = refuse_reads
    assert send(klaviyo, customer("olaf", "nora@example.com", first_name="Olaf")) == [None]
    assert (written(nora), olaf["email"], olaf["first_name"]) == (
        {"email": "nora@example.com", "external_id": "nora"},
        "olaf@example.com",
        "Olaf",
    )


def test_without_the_scope_to_read_other_rejections_are_final(klaviyo: AccountClient) -> None:
    """Only a conflict is resolved."""
    rejection = Rejected("bad", 400)

    def refuse(name: str, body: Json) -> None:
        refuse_reads(name, body)
        raise rejection

    klaviyo.before = refuse
    assert send(klaviyo, customer("nora")) == [rejection]


def test_without_the_scope_to_read_guests_are_left_alone(klaviyo: AccountClient) -> None:
    """The profile can be a customer's. If the mapping allows that, it is written."""
    klaviyo.before = refuse_reads
    assert send(klaviyo, guest("gert@example.com", first_name="Gert")) == [None]
    assert klaviyo.account.profiles == []
    assert send(klaviyo, guest("gert@example.com", any_profile=True, first_name="Gert")) == [None]
    assert attributes_of(klaviyo, email="gert@example.com")["first_name"] == "Gert"


@pytest.mark.parametrize("error", [Rejected("bad", 400), RequestBlocked("firewall")])
def test_value_that_klaviyo_does_not_search_for_does_not_affect_the_others(
    error: WorkerError, klaviyo: AccountClient
) -> None:
    """Klaviyo rejects the whole filter."""
    sender = Sender(klaviyo, 4)
    real = klaviyo.call

    def call(method: str, path: str, body: Any = None, *, idempotent: bool = True) -> Json:
        if "bad" in path:
            raise error
        return real(method, path, body, idempotent=idempotent)

    klaviyo.call = call  # type: ignore[method-assign]
    results = sender.send([customer(f"c{number}") for number in range(MANY)] + [customer("bad")])
    assert results[:-1] == [None] * MANY
    assert results[-1] is (None if isinstance(error, Rejected) else error)


def test_outage_fails_all_profiles(klaviyo: AccountClient) -> None:
    """Nothing is written without having been read."""
    outage = Transient("503")

    def fail(name: str, _body: Json) -> None:
        raise outage

    klaviyo.before = fail
    assert send(klaviyo, customer("a"), customer("b"), guest("c@example.com")) == [outage] * 3


def test_filter_that_is_not_obeyed_is_no_answer(klaviyo: AccountClient) -> None:
    """The profiles of other people are ignored; many of them mean that Klaviyo has not understood."""
    for number in range(102):
        klaviyo.profile(email=f"{number}@example.com", external_id=str(number))
    found = klaviyo.account.profiles

    def find(_name: str, _value: str) -> list[Json]:
        return found

    klaviyo.account.find_profiles = find  # type: ignore[assignment,method-assign]
    (error,) = send(klaviyo, customer("nora", first_name="Nora"))
    assert isinstance(error, Transient)
    del found[100:]
    assert send(klaviyo, customer("nora", first_name="Nora")) == [None]
    assert not any("first_name" in profile["attributes"] for profile in found[:100])
