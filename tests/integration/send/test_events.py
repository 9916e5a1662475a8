"""The bulk sender for events over real sockets: every valid event is recorded once, even after failures."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest

from tests.integration.conftest import klaviyo_for
from tests.support.sender import Sender
from worker.errors import Rejected, Transient
from worker.sandbox import Fault, Sandbox
from worker.sandbox.klaviyo.account import Account
from worker.transform.order_events import event_operation

if TYPE_CHECKING:
    from collections.abc import Iterator

    from worker.model import Operation

BULK, SINGLE = "/api/event-bulk-create-jobs", "/api/events"


@pytest.fixture(params=["ignore", "refuse", "drop", "duplicate"])
def sandbox(request: pytest.FixtureRequest) -> Iterator[Sandbox]:
    """A sandbox for each way in which Klaviyo could handle ids of earlier bulk calls."""
    with Sandbox(account=Account(request.param)) as running:
        yield running


def placed(number: int, **more: Any) -> Operation:
    profile = {"email": f"{number}@example.com"} | more.pop("profile", {})
    fields = {"metric": "Placed Order", "time": "2026-11-01T10:00:00Z", "value": None, "properties": {}} | more
    return event_operation(unique_id=str(number), profile=profile, **fields)


def sender_for(sandbox: Sandbox) -> Sender:
    return Sender(klaviyo_for(sandbox, retry_timeout=0.0), 4)


def calls(sandbox: Sandbox) -> Counter[str]:
    return Counter(request.path for request in sandbox.klaviyo.requests)


def recorded(sandbox: Sandbox) -> list[int]:
    return sorted(int(each["unique_id"]) for each in sandbox.account.events)


def test_many_events_are_one_request(sandbox: Sandbox) -> None:
    """Events in a bulk call have the same effect as individual events."""
    assert sender_for(sandbox).send([placed(number) for number in range(100)]) == [None] * 100
    assert recorded(sandbox) == list(range(100))
    assert {each["attributes"]["email"] for each in sandbox.account.profiles} == {
        f"{number}@example.com" for number in range(100)
    }
    assert calls(sandbox) == {BULK: 1}


def test_only_invalid_events_are_rejected(sandbox: Sandbox) -> None:
    """A bad time, metric or email address rejects the event. A bad phone number is dropped."""
    batch = [placed(number) for number in range(100)]
    batch[7] = placed(7, time="1989-01-01T00:00:00Z")
    batch[40] = placed(40, metric="x" * 200)
    batch[80] = placed(80, profile={"email": "invalid"})
    batch[99] = placed(99, profile={"phone_number": "123"})
    results = sender_for(sandbox).send(batch)
    assert [number for number, result in enumerate(results) if isinstance(result, Rejected)] == [7, 40, 80]
    assert recorded(sandbox) == [number for number in range(100) if number not in {7, 40, 80}]
    assert calls(sandbox) == {BULK: 5, SINGLE: 5}


@pytest.mark.parametrize("sandbox", ["ignore"], indirect=True)
@pytest.mark.parametrize(
    "fault",
    [
        Fault(match=f"POST {BULK}", action="lose_response"),
        Fault(match=f"POST {BULK}", action="truncate"),
        Fault(match=f"POST {BULK}", action="reset"),
        Fault(match=f"POST {BULK}", status=500),
        Fault(match=f"POST {BULK}", status=200, body=b"<html>maintenance</html>"),
    ],
    ids=["lose_response", "truncate", "reset", "500", "strange"],
)
def test_call_with_an_unknown_result_is_repeated_in_bulk(fault: Fault, sandbox: Sandbox) -> None:
    """Every event is recorded once, whether Klaviyo received the first call or not."""
    sandbox.klaviyo.faults.add(fault)
    sender = sender_for(sandbox)
    batch = [placed(number) for number in range(50)]
    assert all(isinstance(result, Transient) for result in sender.send(batch))
    assert sender.send(batch) == [None] * 50
    assert recorded(sandbox) == list(range(50))
    assert calls(sandbox) == {BULK: 2}


def test_repeats_in_bulk_have_the_effect_of_the_account(sandbox: Sandbox) -> None:
    """Only an account that ignores repeats records every event once. Therefore the account is asked first."""
    sender = sender_for(sandbox)
    assert sender.send([placed(number) for number in range(30)]) == [None] * 30
    assert sender.send([placed(number) for number in range(20, 50)]) == [None] * 30
    repeated = {"duplicate": [*range(20, 30)], "drop": []}.get(sandbox.account.bulk_repeats, [])
    lost = {"drop": range(30, 50)}.get(sandbox.account.bulk_repeats, ())
    assert recorded(sandbox) == sorted([*(set(range(50)) - set(lost)), *repeated])


@pytest.mark.parametrize("sandbox", ["ignore"], indirect=True)
@pytest.mark.parametrize("others", [0, 100])
def test_the_first_of_equal_events_is_sent(sandbox: Sandbox, others: int) -> None:
    """Klaviyo keeps the first, too: an order that is shipped and delivered was fulfilled when it was shipped."""
    times = ["2026-11-01T10:00:00Z", "2026-11-02T10:00:00Z"]
    batch = [*(placed(0, time=time) for time in times), *(placed(number) for number in range(1, others))]
    assert sender_for(sandbox).send(batch) == [None] * len(batch)
    assert [each["time"] for each in sandbox.account.events if each["unique_id"] == "0"] == times[:1]
