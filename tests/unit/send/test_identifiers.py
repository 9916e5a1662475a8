"""Invalid identifiers: the record is sent without them if another identifier remains."""

from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING

import pytest

from tests.support.klaviyo_account import AccountClient
from tests.support.sender import Sender
from worker.errors import Rejected
from worker.model import Json, Operation, OperationKind

if TYPE_CHECKING:
    from collections.abc import Collection

    from worker.klaviyo.client import Body

WHO = {"email": "ada", "phone_number": "123", "external_id": "x", "first_name": "Ada"}


class Klaviyo:
    """A fake that rejects invalid identifiers, one per response."""

    def __init__(self, *invalid: str) -> None:
        self.invalid = invalid
        self.taken: list[tuple[str, set[str]]] = []
        self.calls = 0

    def requests_sent(self) -> int:
        return self.calls

    def call(self, method: str, path: str, body: Body = None, *, idempotent: bool = True) -> Json:
        if method == "GET":
            return {}
        assert isinstance(body, dict)
        self.calls += 1
        attributes, pointer = body["data"]["attributes"], "/data/attributes"
        if body["data"]["type"] == "event":
            attributes, pointer = attributes["profile"]["data"]["attributes"], f"{pointer}/profile/data/attributes"
        for name in self.invalid:
            if name in attributes:
                raise Rejected("invalid", 400, pointer=f"{pointer}/{name}")
        self.taken.append((f"{method} {path}", set(attributes)))
        return {}


def operation(kind: OperationKind, names: Collection[str]) -> Operation:
    attributes: Json = {name: WHO[name] for name in names}
    if kind is OperationKind.UPSERT_PROFILE:
        return Operation(kind, "x", {"type": "profile", "attributes": attributes})
    profile = {"data": {"type": "profile", "attributes": attributes}}
    metric = {"data": {"type": "metric", "attributes": {"name": "Placed Order"}}}
    attributes = {"unique_id": "1", "metric": metric, "profile": profile}
    return Operation(kind, "secret", {"type": "event", "attributes": attributes})


PATHS = {OperationKind.UPSERT_PROFILE: "POST /api/profiles", OperationKind.CREATE_EVENT: "POST /api/events"}
KINDS = pytest.mark.parametrize("kind", PATHS)


@KINDS
@pytest.mark.parametrize(
    ("invalid", "given", "left"),
    [
        (["phone_number"], {"email", "phone_number", "first_name"}, {"email", "first_name"}),
        (["phone_number"], {"external_id", "phone_number"}, {"external_id"}),
        (["email"], {"email", "phone_number"}, {"phone_number"}),
        (["email"], {"email", "external_id"}, {"external_id"}),
        (
            ["phone_number", "email"],
            {"email", "phone_number", "external_id", "first_name"},
            {"external_id", "first_name"},
        ),
    ],
)
def test_record_is_sent_without_its_invalid_identifier(
    kind: OperationKind, invalid: list[str], given: set[str], left: set[str]
) -> None:
    """An invalid phone number or email address must not prevent the event or the profile."""
    klaviyo = Klaviyo(*invalid)
    assert Sender(klaviyo, 1).send([operation(kind, given)]) == [None]
    assert klaviyo.taken == [(PATHS[kind], left)]
    assert klaviyo.calls == 1 + len(invalid)


@KINDS
@pytest.mark.parametrize("given", [{"email"}, {"email", "phone_number"}, {"email", "first_name"}])
def test_record_without_another_identifier_is_rejected(kind: OperationKind, given: set[str]) -> None:
    """A record needs at least one identifier."""
    klaviyo = Klaviyo("email", "phone_number")
    (result,) = Sender(klaviyo, 1).send([operation(kind, given)])
    assert isinstance(result, Rejected)
    assert klaviyo.taken == []


@KINDS
@pytest.mark.parametrize(
    "refusal",
    [
        Rejected("no", 400, pointer="/data/attributes/first_name"),
        Rejected("no", 400, pointer="/data/attributes/phone_number/0"),
        Rejected("no", 400),
        Rejected("no", 413, pointer="/data/attributes/phone_number"),
    ],
)
def test_other_rejections_are_final(kind: OperationKind, refusal: Rejected) -> None:
    """An identifier is dropped only after a 400 with a pointer to it."""

    class Refusing(Klaviyo):
        def call(self, method: str, path: str, body: Body = None, *, idempotent: bool = True) -> Json:
            if method == "GET":
                return {}
            self.calls += 1
            raise refusal

    klaviyo = Refusing()
    assert Sender(klaviyo, 1).send([operation(kind, WHO)]) == [refusal]
    assert klaviyo.calls == 1


@KINDS
def test_repeated_rejection_of_a_dropped_identifier_is_final(kind: OperationKind) -> None:
    """The record is rejected if Klaviyo still names an identifier that the record no longer has."""

    class Stubborn(Klaviyo):
        def call(self, method: str, path: str, body: Body = None, *, idempotent: bool = True) -> Json:
            if method == "GET":
                return {}
            self.calls += 1
            name = "profile/data/attributes/" if path == "/api/events" else ""
            raise Rejected("no", 400, pointer=f"/data/attributes/{name}phone_number")

    klaviyo = Stubborn()
    (result,) = Sender(klaviyo, 1).send([operation(kind, WHO)])
    assert isinstance(result, Rejected)
    assert klaviyo.calls == 2


def test_log_names_the_identifier_without_its_value(caplog: pytest.LogCaptureFixture) -> None:
    """The log line names the dropped identifier and contains no personal data."""
    with caplog.at_level(logging.INFO, "klaviyo_worker"):
        Sender(Klaviyo("phone_number"), 1).send([operation(OperationKind.CREATE_EVENT, WHO)])
    (record,) = caplog.records
    assert record.getMessage() == "identifier_dropped"
    line = json.dumps(vars(record), default=str)
    assert '"identifier": "phone_number"' in line
    assert not {"123", "ada", "secret"} & set(line.split('"'))


def test_locale_that_klaviyo_rejects_is_left_out() -> None:
    """The customer keeps a profile. commercetools allows a language without a country."""
    client = AccountClient()

    def reject(_name: str, body: Json) -> None:
        if body and "locale" in body["data"]["attributes"]:
            raise Rejected("no", 400, pointer="/data/attributes/locale")

    client.before = reject
    attributes = {"external_id": "ada", "email": "ada@example.com", "locale": "de"}
    upsert = Operation(OperationKind.UPSERT_PROFILE, "ada", {"type": "profile", "attributes": attributes})
    assert Sender(client, 1).send([upsert]) == [None]
    assert client.account.profiles[0]["attributes"]["email"] == "ada@example.com"
