"""A backlog of orders reaches Klaviyo in few requests, and each event once."""

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
FEWER = 120  # for tests that send many events individually, at Klaviyo's limit of 3,500 a minute
BULK = "/api/event-bulk-create-jobs"


@pytest.fixture
def account(request: pytest.FixtureRequest) -> Account:
    return Account(getattr(request, "param", "duplicate"))


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


REPEATS = pytest.mark.parametrize("account", ["ignore", "refuse", "drop", "duplicate"], indirect=True)


@REPEATS
def test_backlog_needs_few_requests(worker: Worker, sandbox: Sandbox, account: Account) -> None:
    """Three hundred orders with three lines are 1,200 events."""
    worker.publish(*orders(sandbox))
    done = worker("run", "--once")
    assert Counter(line["outcome"] for line in log_lines(done.stderr)) == {"sent": ORDERS}
    assert_exactly_once(account)
    assert len(sandbox.klaviyo.requests) < ORDERS / 5


@REPEATS
def test_duplicate_messages_have_no_effect(worker: Worker, sandbox: Sandbox, account: Account) -> None:
    """Both copies are in one backlog. Events that this process sent recently are not sent in bulk again."""
    backlog = orders(sandbox, FEWER)
    worker.publish(*backlog, *backlog)
    done = worker("run", "--once")
    assert Counter(line["outcome"] for line in log_lines(done.stderr)) == {"sent": 2 * FEWER}
    assert_exactly_once(account, FEWER)


@pytest.mark.parametrize("account", ["ignore", "refuse", "drop"], indirect=True)
def test_second_process_has_no_effect(worker: Worker, sandbox: Sandbox, account: Account) -> None:
    """It does not know which events were sent. A rejected call is narrowed with a bounded number of calls."""
    backlog = orders(sandbox)
    for _ in range(2):
        worker.publish(*backlog)
        done = worker("run", "--once")
        assert Counter(line["outcome"] for line in log_lines(done.stderr)) == {"sent": ORDERS}
        assert_exactly_once(account)
    requests = Counter(request.path for request in sandbox.klaviyo.requests)
    assert requests[BULK] < ORDERS
    if account.bulk_repeats != "refuse":
        assert requests.total() < 2 * ORDERS / 5


def test_events_are_sent_individually_if_configured(worker: Worker, sandbox: Sandbox, account: Account) -> None:
    """The setting is `never`, or the threshold is larger than any batch."""
    worker.publish(*orders(sandbox)[:20])
    assert worker("run", "--once", env={"KLAVIYO_WORKER_BULK_EVENTS": "never"}).returncode == 0
    worker.publish(*orders(sandbox)[20:40])
    assert worker("run", "--once", "--bulk-threshold", "1000").returncode == 0
    assert Counter(request.path for request in sandbox.klaviyo.requests) == {"/api/events": 160}
    assert len(account.events) == 160


@pytest.mark.parametrize("action", ["respond", "reset", "lose_response", "truncate"])
def test_failed_bulk_calls_cause_no_duplicates(action: str, worker: Worker, sandbox: Sandbox, account: Account) -> None:
    """Klaviyo has possibly recorded the events, so they are sent individually."""
    sandbox.klaviyo.faults.add(Fault(status=503, times=3, match=f"POST {BULK}", action=action))
    worker.publish(*orders(sandbox))
    done = worker("run", "--once")
    assert done.returncode == 0
    assert_exactly_once(account)
    assert worker.dead_letters() == []


def test_stopped_worker_causes_no_duplicates(worker: Worker, sandbox: Sandbox, account: Account) -> None:
    """Messages are given back to the queue before the response to their bulk call, which Klaviyo has recorded."""
    sandbox.klaviyo.faults.add(Fault(action="lose_response", seconds=15, times=None, match=f"POST {BULK}"))
    worker.publish(*orders(sandbox))
    process = worker.start("run", "--shutdown-grace-period", "0.1")
    wait_for(lambda: any(request.path == BULK for request in sandbox.klaviyo.requests))
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 6
    sandbox.klaviyo.faults.clear()
    assert worker("run", "--once").returncode == 0
    assert_exactly_once(account)


def test_killed_worker_causes_no_duplicates(worker: Worker, sandbox: Sandbox, account: Account) -> None:
    """Kill -9 during bulk calls: redelivered messages are recognized as such."""
    queue = {"QUEUE_URL": worker.environment["QUEUE_URL"] + "?lease=1"}
    worker.publish(*orders(sandbox, FEWER))
    sandbox.klaviyo.faults.add(Fault(action="lose_response", seconds=0.5, times=None, match=f"POST {BULK}"))
    process = worker.start("run", env=queue)
    wait_for(lambda: account.events)
    process.send_signal(signal.SIGKILL)
    process.wait()
    sandbox.klaviyo.faults.clear()
    assert worker("run", "--once", env=queue).returncode == 0
    assert_exactly_once(account, FEWER)
