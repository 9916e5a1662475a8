"""Whatever the order of changes, messages, crashes and choices in Klaviyo: no person is subscribed by accident.

CONSENT_EXAMPLES sets the number of histories.
"""

from __future__ import annotations

import os
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from hypothesis import event, given, settings
from hypothesis import strategies as st

from tests.support.klaviyo_account import AccountClient
from tests.support.sender import Sender
from worker.errors import Transient
from worker.model import Consent, Json, Operation, OperationKind

if TYPE_CHECKING:
    from collections.abc import Sequence

EXAMPLES = int(os.environ.get("CONSENT_EXAMPLES", "60"))
FIELD = (True, False, None)
CHOICES = ("joins", "leaves")  # of the person, in Klaviyo
MAX_REQUESTS = 7  # of a message
STEPS = st.one_of(
    st.sampled_from(["deliver", *CHOICES]),
    st.tuples(st.just("field"), st.sampled_from(FIELD)),
    st.tuples(st.just("crash"), st.integers(1, MAX_REQUESTS)),
    st.tuples(st.just("stale"), st.integers(1, 3)),
)
EMAIL = "ada@example.com"
WHO = {"external_id": "ada", "email": EMAIL}


class World:
    """A customer in commercetools and the account, with a worker that can crash before any of its requests."""

    def __init__(self, *, is_known: bool) -> None:
        self.klaviyo = AccountClient()
        self.fields: list[bool | None] = [None]  # by version of the customer, from 1
        self.read_version = self.written_version = 1
        self.crash_in = 0  # requests; 0: never
        self.subscribed = self.unsubscribed = 0  # by the worker
        self.has_left = False  # the person unsubscribed in Klaviyo and has not joined since
        if is_known:
            self.klaviyo.profile(**WHO)

    @property
    def field(self) -> bool | None:
        return self.fields[self.read_version - 1]

    @property
    def status(self) -> str:
        profiles = self.klaviyo.account.profiles
        marketing = profiles[0]["subscriptions"].get("email", {}).get("marketing", {}) if profiles else {}
        return str(marketing.get("consent", ""))

    @property
    def last(self) -> object:
        profiles = self.klaviyo.account.profiles
        return profiles[0]["attributes"]["properties"].get("newsletter") if profiles else None

    def take(self, step: str | tuple[str, bool | None] | tuple[str, int]) -> None:
        """Take a step of the history."""
        match step:
            case ("field", bool() | None as value):
                self.fields.append(value)
            case ("stale", int(lag)):
                self.deliver(lag)
            case ("crash", int(number)):
                self.crash_in = number
                self.deliver()
            case "deliver":
                self.deliver()
            case choice:
                self.choose(str(choice))

    def choose(self, choice: str) -> None:
        """Let the person join with a form, or leave by a link in a message."""
        if self.klaviyo.account.profiles:
            consent = "SUBSCRIBED" if choice == "joins" else "UNSUBSCRIBED"
            attributes = {"email": EMAIL, "subscriptions": {"email": {"marketing": {"consent": consent}}}}
            account = self.klaviyo.account
            change = account.subscribe if choice == "joins" else account.unsubscribe
            change({"type": "profile", "attributes": attributes})
            self.has_left = choice == "leaves"

    def deliver(self, lag: int = 0) -> None:
        """Let a new worker process a message about the customer. Its reading is `lag` versions old."""
        self.klaviyo.before = self._check_request
        self.read_version = max(len(self.fields) - lag, 1)
        before = self.last
        consent = Consent("email", "newsletter", self.field, "", self.read_version, datetime.now(UTC))
        resource: Json = {"type": "profile", "attributes": dict(WHO)}
        (error,) = Sender(self.klaviyo, 1).send(
            [Operation(OperationKind.UPSERT_PROFILE, "ada", resource, consents=(consent,))]
        )
        assert error is None or isinstance(error, Transient)
        if error is None:
            assert self.last == self.field
        if self.last != before:
            assert self.read_version >= self.written_version
            self.written_version = self.read_version
        self.crash_in = 0

    def _check_request(self, name: str, _body: Json) -> None:
        if self.crash_in:
            self.crash_in -= 1
            if self.crash_in == 0:
                self.crash_in = -1  # and every request after it
        if self.crash_in < 0:
            raise Transient("crash")
        if name.endswith("bulk-create-jobs"):
            assert self.field is True
            assert self.last is not True
            assert not self.has_left
            assert self.status != "UNSUBSCRIBED"
            self.subscribed += 1
        if name.endswith("bulk-delete-jobs"):
            assert self.field is not True
            assert self.last is True
            assert self.read_version >= self.written_version
            self.unsubscribed += 1


@given(st.booleans(), st.lists(STEPS, max_size=12))
@settings(max_examples=EXAMPLES, deadline=None)
def test_no_person_is_subscribed_by_accident(is_known: bool, steps: Sequence[str]) -> None:
    """Eventually the property has the value of the field, and a repeated message has no effect."""
    world = World(is_known=is_known)
    for step in steps:
        world.take(step)
    world.deliver()
    if world.field is True and world.status != "UNSUBSCRIBED":
        assert world.status == "SUBSCRIBED"
    before = len(world.klaviyo.calls)
    world.deliver()
    assert len(world.klaviyo.calls) - before == 1
    event(f"subscribed {min(world.subscribed, 2)}, unsubscribed {min(world.unsubscribed, 2)}")
