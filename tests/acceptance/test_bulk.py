"""A backlog of orders reaches Klaviyo with each event once, and in few requests if the account ignores repeats."""

from __future__ import annotations

import signal
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from tests.acceptance.conftest import NOT_MEASURED, Worker, log_lines
from tests.acceptance.test_run import wait_for
from worker.sandbox import Fault, Sandbox
from worker.sandbox.klaviyo.account import Account
from worker.sandbox.notifications import message

if TYPE_CHECKING:
    from collections.abc import Iterator

ORDERS = 300
FEWER = 120  # for tests that send events individually
BULK = "/api/event-bulk-create-jobs"


@pytest.fixture
def account(request: pytest.FixtureRequest) -> Account:
    return Account(getattr(request, "param", "drop"))


@pytest.fixture
def sandbox(account: Account) -> Iterator[Sandbox]:
    with Sandbox(account=account) as running:
        yield running


@pytest.fixture
def worker(worker: Worker) -> Worker:
    return replace(worker, environment=worker.environment | NOT_MEASURED)


def orders(sandbox: Sandbox, count: int = ORDERS) -> list[dict[str, Any]]:
    template = next(each for each in sandbox.shop.orders.values() if len(each["lineItems"]) == 3)
    made = []
    for number in range(count):
        lines = [line | {"id": f"{number}-{index}"} for index, line in enumerate(template["lineItems"])]
        order = template | {"id": f"o{number}", "customerEmail": f"{number}@example.com", "lineItems": lines}
        made.append(message("OrderCreated", "order", f"o{number}", order=order))
    return made


def assert_exactly_once(account: Account, count: int = ORDERS) -> None:
    assert Counter(each["metric"] for each in account.events) == {"Placed Order": count, "Ordered Product": 3 * count}
    assert set(Counter((each["metric"], each["unique_id"]) for each in account.events).values()) == {1}


IGNORING = pytest.mark.parametrize("account", ["ignore"], indirect=True)
IN_BULK = {"KLAVIYO_WORKER_BULK_EVENTS": "always"}


def outcomes(worker: Worker, **environment: str) -> Counter[str]:
    done = worker("run", "--once", env=environment)
    return Counter(line["outcome"] for line in log_lines(done.stderr))


def calls(sandbox: Sandbox) -> Counter[str]:
    return Counter(request.path for request in sandbox.klaviyo.requests)


@pytest.mark.parametrize("account", ["ignore", "refuse", "drop", "duplicate"], indirect=True)
def test_no_account_loses_or_duplicates_events_by_default(worker: Worker, sandbox: Sandbox, account: Account) -> None:
    """Both copies of a message are in one backlog, and another process sends all of them again."""
    backlog = orders(sandbox, FEWER)
    worker.publish(*backlog, *backlog)
    assert outcomes(worker) == {"sent": 2 * FEWER}
    worker.publish(*backlog)
    assert outcomes(worker) == {"sent": FEWER}
    assert_exactly_once(account, FEWER)
    assert calls(sandbox)[BULK] == 0


@IGNORING
def test_backlog_needs_few_requests(worker: Worker, sandbox: Sandbox, account: Account) -> None:
    """Three hundred orders with three lines are 1,200 events. Half of their messages are published twice."""
    backlog = orders(sandbox)
    worker.publish(*backlog, *backlog[: ORDERS // 2])
    assert outcomes(worker, **IN_BULK) == {"sent": ORDERS + ORDERS // 2}
    assert_exactly_once(account)
    assert calls(sandbox).total() < ORDERS / 5


@IGNORING
def test_second_process_has_no_effect(worker: Worker, sandbox: Sandbox, account: Account) -> None:
    """It does not know which events were sent, and sends all of them again in bulk."""
    backlog = orders(sandbox)
    for _ in range(2):
        worker.publish(*backlog)
        assert outcomes(worker, **IN_BULK) == {"sent": ORDERS}
    assert_exactly_once(account)
    assert calls(sandbox).total() < 2 * ORDERS / 5


def test_events_are_sent_individually_if_configured(worker: Worker, sandbox: Sandbox, account: Account) -> None:
    """The setting is `never`, or the threshold is larger than any batch."""
    worker.publish(*orders(sandbox)[:20])
    assert outcomes(worker, KLAVIYO_WORKER_BULK_EVENTS="never") == {"sent": 20}
    worker.publish(*orders(sandbox)[20:40])
    assert outcomes(worker, KLAVIYO_WORKER_BULK_THRESHOLD="1000", **IN_BULK) == {"sent": 20}
    assert calls(sandbox) == {"/api/events": 160}
    assert len(account.events) == 160


@IGNORING
@pytest.mark.parametrize("action", ["respond", "reset", "lose_response", "truncate"])
def test_failed_bulk_calls_cause_no_duplicates(action: str, worker: Worker, sandbox: Sandbox, account: Account) -> None:
    """Klaviyo has possibly recorded the events, and ignores them in the next bulk call."""
    sandbox.klaviyo.faults.add(Fault(status=503, times=3, match=f"POST {BULK}", action=action))
    worker.publish(*orders(sandbox))
    assert outcomes(worker, **IN_BULK) == {"sent": ORDERS}
    assert_exactly_once(account)
    assert calls(sandbox).total() < ORDERS / 5
    assert worker.dead_letters() == []


@IGNORING
def test_stopped_worker_causes_no_duplicates(worker: Worker, sandbox: Sandbox, account: Account) -> None:
    """Messages are given back to the queue before the response to their bulk call, which Klaviyo has recorded."""
    sandbox.klaviyo.faults.add(Fault(action="lose_response", seconds=15, times=None, match=f"POST {BULK}"))
    worker.publish(*orders(sandbox))
    process = worker.start("run", "--shutdown-grace-period", "0.1", env=IN_BULK)
    wait_for(lambda: any(request.path == BULK for request in sandbox.klaviyo.requests))
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 6
    sandbox.klaviyo.faults.clear()
    assert outcomes(worker, **IN_BULK).keys() == {"sent"}
    assert_exactly_once(account)


@IGNORING
def test_killed_worker_causes_no_duplicates(worker: Worker, sandbox: Sandbox, account: Account) -> None:
    """Kill -9 during bulk calls, which Klaviyo has recorded."""
    environment = IN_BULK | {"QUEUE_URL": worker.environment["QUEUE_URL"] + "?lease=1"}
    worker.publish(*orders(sandbox))
    sandbox.klaviyo.faults.add(Fault(action="lose_response", seconds=0.5, times=None, match=f"POST {BULK}"))
    process = worker.start("run", env=environment)
    wait_for(lambda: account.events)
    process.send_signal(signal.SIGKILL)
    process.wait()
    sandbox.klaviyo.faults.clear()
    assert outcomes(worker, **environment).keys() == {"sent"}
    assert_exactly_once(account)
