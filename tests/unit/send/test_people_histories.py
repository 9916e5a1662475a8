"""Whatever happens to customers and guests, no profile mixes two people, and the last state of each customer arrives.

`PEOPLE_EXAMPLES=20000 .venv/bin/pytest tests/unit/send/test_people_histories.py` runs more histories.
"""

from __future__ import annotations

import os
from collections import defaultdict
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.klaviyo_account import AccountClient
from tests.support.sender import Sender
from worker.errors import Transient
from worker.mapping import CustomerMapping, MappingConfig
from worker.model import Enriched, Json, Notification, Operation, OperationKind
from worker.sandbox.klaviyo.account import PHONE_MATCHES, Account
from worker.transform import transform

if TYPE_CHECKING:
    from collections.abc import Sequence

pytestmark = pytest.mark.usefixtures("fast_jobs")

EXAMPLES = int(os.environ.get("PEOPLE_EXAMPLES", "100"))
CUSTOMERS, EMAILS, PHONES = 4, 4, 3
MAPPING = MappingConfig(customer=CustomerMapping(clear_phone=True))


class Step(NamedTuple):
    """A step of a history. `customer`, `email` and `phone` are numbers; a phone of PHONES is none."""

    action: str  # change, order, guest, erase or send
    customer: int
    email: int
    phone: int


STEPS = st.lists(
    st.builds(
        Step,
        st.sampled_from(["change", "change", "change", "order", "guest", "guest", "erase", "send", "send"]),
        st.integers(0, CUSTOMERS - 1),
        st.integers(0, EMAILS - 1),
        st.integers(0, PHONES),
    ),
    max_size=40,
)


@dataclass
class World:
    """commercetools' customers, Klaviyo's account, and the customers whose messages have not been sent."""

    klaviyo: AccountClient
    sender: Sender
    shuffle: Any  # hypothesis' source of orders
    customers: dict[str, Json] = field(default_factory=dict)
    waiting: list[str] = field(default_factory=list)
    versions: int = 0
    emails_of: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))  # that a customer has had
    phones_of: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))

    def take(self, step: Step) -> None:
        """Take a step of the history."""
        customer, email = f"c{step.customer}", f"e{step.email}@example.com"
        match step.action:
            case "change":
                self.change(customer, email, step.phone)
            case "order" if customer in self.customers:
                self.send([_event({"external_id": customer, "email": self.customers[customer]["email"]})])
            case "guest":
                if step.phone < PHONES:
                    self.phones_of[email].add(_phone(step.phone))
                self.send([_guest(email, step.phone), _event({"email": email})])
            case "erase" if customer in self.customers:
                del self.customers[customer]
                self.waiting = [each for each in self.waiting if each != customer]
                self.send([Operation(OperationKind.DELETE_PROFILE, customer)])
            case "send":
                self.send_waiting()

    def change(self, customer: str, email: str, phone: int) -> None:
        """Create or change a customer. Only customers of different stores have the same email address."""
        self.versions += 1
        self.emails_of[customer].add(email)
        address = {"id": "a", "country": "GB", "city": f"City of {customer}"}
        if phone < PHONES:
            address["phone"] = _phone(phone)
            self.phones_of[customer].add(_phone(phone))
        self.customers[customer] = {
            "id": customer,
            "version": self.versions,
            "email": email,
            "firstName": f"{customer} {self.versions}",
            "companyName": f"Company of {customer}" if self.versions % 2 else "",
            "addresses": [address],
        }
        self.waiting += [customer]

    def send_waiting(self) -> None:
        """Send the messages that wait, some of them twice, in any order."""
        self.shuffle(self.waiting)
        self.send([_upsert(self.customers[customer]) for customer in self.waiting])
        self.waiting = self.waiting[:1]  # a duplicate

    def send(self, operations: Sequence[Operation]) -> None:
        """Send operations, and check that no profile mixes two people.

        Customers who wait for each other can need another attempt.
        """
        for _ in range(3):
            results = self.sender.send(operations)
            assert all(error is None or isinstance(error, Transient) for error in results)
            self.check()
            operations = [each for each, error in zip(operations, results, strict=True) if error]
        assert not operations

    def check(self) -> None:
        """Check every profile."""
        for profile in self.klaviyo.account.profiles:
            attributes = profile["attributes"]
            owner, email, name = (attributes.get(each) for each in ("external_id", "email", "first_name"))
            guests_allowed = {email} if owner is None else self.emails_of[owner]
            names = {f"Guest of {each}" for each in guests_allowed if each}
            assert name is None or name in names or name.split()[0] == owner
            assert owner is None or email is None or email in self.emails_of[owner]
            cities = {f"City of {owner}", *names}
            assert attributes.get("location", {}).get("city") in {None, *cities}
            phones = set().union(*(self.phones_of[each] for each in (owner, *guests_allowed) if each))
            assert attributes.get("phone_number") in {None, *phones}
            assert attributes["properties"].get("Phone") in {None, *phones}

    def check_end(self) -> None:
        """Check that each customer's profile has the last state."""
        profiles = [profile["attributes"] for profile in self.klaviyo.account.profiles]
        holders = {each["email"].lower(): each.get("external_id") for each in profiles if each.get("email")}
        phones = {each["phone_number"]: each for each in profiles if each.get("phone_number")}
        for key, customer in self.customers.items():
            (profile,) = [each for each in profiles if each.get("external_id") == key]
            assert profile["first_name"] == customer["firstName"]
            assert (profile.get("organization") or "") == customer["companyName"]
            assert profile["location"] == {"city": f"City of {key}", "country": "GB"}
            assert holders.get(customer["email"]) is not None
            assert profile.get("email") == customer["email"] or holders[customer["email"]] != key
            phone = _phone_of(customer)
            if profile.get("phone_number") != phone:
                assert phone in phones
                assert profile["properties"]["Phone"] == phone


def _phone(number: int) -> str:
    return f"+4420794609{50 + number}"


def _phone_of(customer: Json) -> str | None:
    phone: str | None = customer["addresses"][0].get("phone")
    return phone


def _upsert(customer: Json) -> Operation:
    notification = Notification("ResourceUpdated", "customer", customer["id"], None, {})
    (operation,) = transform(Enriched(notification, datetime.now(UTC), customer=customer), MAPPING)
    return operation


def _guest(email: str, phone: int) -> Operation:
    name = f"Guest of {email}"
    attributes: Json = {"email": email, "first_name": name, "location": {"city": name}}
    if phone < PHONES:
        attributes["phone_number"] = _phone(phone)
    return Operation(OperationKind.UPSERT_GUEST, email, {"type": "profile", "attributes": attributes})


def _event(identifiers: Json) -> Operation:
    profile = {"type": "profile", "attributes": identifiers}
    metric = {"data": {"type": "metric", "attributes": {"name": "Placed Order"}}}
    attributes = {"unique_id": "1", "properties": {}, "metric": metric, "profile": {"data": profile}}
    return Operation(OperationKind.CREATE_EVENT, str(identifiers), {"type": "event", "attributes": attributes})


@pytest.mark.parametrize("phone_match", PHONE_MATCHES)
@pytest.mark.parametrize("threshold", [0, 10])
@settings(max_examples=max(EXAMPLES // 4, 1), deadline=None, suppress_health_check=list(HealthCheck))
@given(steps=STEPS, random=st.randoms(use_true_random=False), merges_guests=st.booleans())
def test_no_profile_mixes_two_people(
    phone_match: str, threshold: int, steps: list[Step], random: Any, merges_guests: bool
) -> None:
    """Customers share phone numbers and take over email addresses; guests order with both."""
    klaviyo = AccountClient(Account(phone_match=phone_match))
    sender = Sender(klaviyo, 1, bulk_threshold=threshold, merges_guests=merges_guests)
    world = World(klaviyo, sender, random.shuffle)
    try:
        for step in steps:
            world.take(step)
        for _ in range(CUSTOMERS + 1):  # each repetition settles at least one of those who wait for each other
            world.waiting = list(world.customers)
            world.send_waiting()
        if merges_guests:
            world.check_end()
    finally:
        sender.close()
