"""Erasures: only profiles that certainly belong to the person are deleted."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

import pytest

from worker.errors import Rejected, Transient
from worker.model import UNKNOWN_TIME, Operation, OperationKind, SendResult
from worker.send.erasure import MAX_PROFILES, Eraser

if TYPE_CHECKING:
    from worker.errors import WorkerError
    from worker.klaviyo.client import Body
    from worker.model import Json

NOW = datetime(2026, 11, 24, tzinfo=UTC)


class Account:
    """The profiles that Klaviyo's filters find, and the ids of those that were deleted."""

    def __init__(self, *, refused: int = 0) -> None:
        self.found: dict[str, list[Json]] = {}
        self.deleted: list[str] = []
        self.refused = refused  # the number of the deletion request that fails; 0: none
        self.error: WorkerError = Transient("503")
        self._sent = 0

    def call(self, method: str, path: str, body: Body = None, *, idempotent: bool = True) -> Json:
        """Return the profiles, or delete one."""
        self._sent += 1
        if method == "GET":
            value = unquote(path).partition('"')[2].partition('"')[0]
            return {"data": self.found.get(value, [])}
        assert isinstance(body, dict)
        if len(self.deleted) + 1 == self.refused:
            raise self.error
        self.deleted.append(body["data"]["attributes"]["profile"]["data"]["id"])
        return {}

    def requests_sent(self) -> int:
        """Return the number of requests."""
        return self._sent


def profile(key: str, external_id: str | None = None, email: str | None = None, **others: Any) -> Json:
    return {"id": key, "attributes": {"external_id": external_id, "email": email, **others}}


def erase(account: Account, since: datetime | None = None) -> SendResult:
    return Eraser(account).erase(Operation(OperationKind.DELETE_PROFILE, "ada", created_since=since))


def test_profiles_of_the_person_are_deleted() -> None:
    """The deletion endpoint accepts no external_id. A person can also have a profile with the email address alone."""
    account = Account()
    account.found = {
        "ada": [profile("P1", "ada", "Ada@example.com")],
        "Ada@example.com": [profile("P1", "ada", "Ada@example.com"), profile("P2", None, "ada@example.com")],
    }
    assert erase(account) == SendResult(None, 4, 2)
    assert account.deleted == ["P1", "P2"]


def test_erasure_without_a_profile_has_the_number_0() -> None:
    """The log line must not look like that of a deletion."""
    assert erase(Account()) == SendResult(None, 1, 0)


@pytest.mark.parametrize("other", [profile("P2", "bob", "ada@example.com"), profile("P2", None, "bob@example.com")])
def test_profile_of_another_person_stays(other: Json) -> None:
    """Klaviyo also finds a profile by an earlier email address."""
    account = Account()
    account.found = {"ada": [profile("P1", "ada", "ada@example.com")], "ada@example.com": [other, profile("", None)]}
    assert erase(account).error is None
    assert account.deleted == ["P1"]


@pytest.mark.parametrize(
    "foreign", [profile("P2", "bob"), profile("P2", None), profile("P2", "ADA"), profile("", "ada"), {"id": "P2"}]
)
def test_filter_that_is_not_obeyed_deletes_no_profile(foreign: Json) -> None:
    """A gateway that drops the query string returns all profiles of the account."""
    account = Account()
    account.found = {"ada": [profile("P1", "ada"), foreign]}
    error = erase(account).error
    assert isinstance(error, Rejected)
    assert "another external_id" in error.reason
    assert account.deleted == []


def test_number_of_profiles_is_limited() -> None:
    """A person has at most one profile per identifier."""
    account = Account()
    account.found = {"ada": [profile(f"P{number}", "ada") for number in range(MAX_PROFILES + 1)]}
    error = erase(account).error
    assert isinstance(error, Rejected)
    assert "more than" in error.reason
    account.found = {
        "ada": [profile("P", "ada", "a@example.com")],
        "a@example.com": [profile(f"P{number}", None, "a@example.com") for number in range(MAX_PROFILES)],
    }
    assert isinstance(erase(account).error, Rejected)
    assert account.deleted == []


def test_accepted_requests_count_if_a_later_one_fails() -> None:
    """The next attempt does not find the first profile any more."""
    account = Account(refused=2)
    account.found = {"ada": [profile("P1", "ada"), profile("P2", "ada")]}
    error, requests, erased, _ = erase(account)
    assert isinstance(error, Transient)
    assert (requests, erased) == (3, 1)


def test_profile_that_disappears_is_looked_up_again() -> None:
    """Klaviyo merges profiles by itself. The message must not be a dead letter, and the other profile must not stay."""
    account = Account(refused=1)
    account.error = Rejected("404", 404)
    account.found = {"ada": [profile("P1", "ada")]}
    assert isinstance(erase(account).error, Transient)
    account.error = Rejected("400", 400)
    assert isinstance(erase(account).error, Rejected)
    account.refused, account.found = 0, {"ada": [profile("P2", "ada")]}
    assert erase(account) == SendResult(None, 2, 1)


def test_profile_that_the_worker_created_too_late_is_deleted() -> None:
    """The profile with the email address alone existed before."""
    account = Account()
    created = (NOW + timedelta(seconds=1)).isoformat()
    account.found = {
        "ada": [profile("P1", "ada", "a@example.com", created=created)],
        "a@example.com": [profile("P2", None, "a@example.com")],
    }
    assert erase(account, NOW) == SendResult(None, 2, 1)
    assert account.deleted == ["P1"]


@pytest.mark.parametrize("created", [(NOW - timedelta(seconds=1)).isoformat(), None, "when?"])
def test_profile_that_existed_before_is_reported(created: str | None) -> None:
    """The customer was possibly deleted without erasure."""
    account = Account()
    account.found = {"ada": [profile("P1", "ada", created=created)]}
    error = erase(account, NOW).error
    assert isinstance(error, Rejected)
    assert "delete the profile" in error.reason
    assert isinstance(erase(account, UNKNOWN_TIME).error, Rejected)
    assert account.deleted == []
