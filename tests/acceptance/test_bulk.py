"""A backlog of orders reaches Klaviyo with each event once, and in few requests if the account ignores repeats."""

from __future__ import annotations

import signal
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest

from tests.acceptance.conftest import Worker, log_lines
from tests.support.verdicts import give_verdict
from tests.support.waiting import wait_for
from worker.sandbox import Fault, Sandbox
from worker.sandbox.klaviyo.account import Account
from worker.sandbox.notifications import message

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

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


def orders(sandbox: Sandbox, count: int = ORDERS) -> list[dict[str, Any]]:
    template = next(each for each in sandbox.shop.orders.values() if len(each["lineItems"]) == 3)
    made = []
    for number in range(count):
        lines = [line | {"id": f"{number}-{index}"} for index, line in enumerate(template["lineItems"])]
        order = template | {"id": f"o{number}", "customerEmail": f"{number}@example.com", "lineItems": lines}
        del order["paymentInfo"], order["customerId"]
        made.append(message("OrderCreated", "order", f"o{number}", order=order))
    return made


def assert_exactly_once(account: Account, count: int = ORDERS) -> None:
    events = [each for each in account.events if each["metric"] != "klaviyo-worker probe"]
    assert Counter(each["metric"] for each in events) == {"Placed Order": count, "Ordered Product": 3 * count}
    assert set(Counter((each["metric"], each["unique_id"]) for each in events).values()) == {1}


ANY_ACCOUNT = pytest.mark.parametrize("account", ["ignore", "refuse", "drop", "duplicate"], indirect=True)
IGNORING = pytest.mark.parametrize("account", ["ignore"], indirect=True)


@pytest.fixture
def verdict(account: Account) -> None:
    """The account was probed."""
    give_verdict(account)


IN_BULK = pytest.mark.usefixtures("verdict")


def outcomes(worker: Worker, **environment: str) -> Counter[str]:
    done = worker("run", "--once", env=environment)
    return Counter(line["outcome"] for line in log_lines(done.stderr))


def calls(sandbox: Sandbox) -> Counter[str]:
    """Return the calls for events by path. The profiles of guests have calls of their own."""
    paths = (request.path for request in sandbox.klaviyo.requests)
    return Counter(path for path in paths if path.startswith("/api/event"))


def placed(account: Account, numbers: Iterable[int]) -> None:
    """Record Placed Order events as another integration does: individually, with the same ids."""
    for number in numbers:
        metric = {"data": {"type": "metric", "attributes": {"name": "Placed Order"}}}
        profile = {"data": {"type": "profile", "attributes": {"email": f"{number}@example.com"}}}
        event = {"unique_id": f"o{number}", "time": "2026-11-01T10:00:00Z", "properties": {}}
        account.create_event(event | {"metric": metric, "profile": profile})


@ANY_ACCOUNT
@pytest.mark.parametrize("is_probed", [False, True])
def test_no_account_loses_or_duplicates_events(
    is_probed: bool, worker: Worker, sandbox: Sandbox, account: Account
) -> None:
    """Another integration has sent orders, a backlog contains messages twice, and a backfill sends orders again.

    Only an account that ignores repeats gets bulk calls, after a probe.
    """
    if is_probed:
        assert worker("check", "--probe-bulk", "--probe-wait", "1").returncode == 0
    requests_before = calls(sandbox)
    placed(account, range(FEWER // 2))
    backlog = orders(sandbox, FEWER)
    worker.publish(*backlog, *backlog[:20])
    assert outcomes(worker) == {"sent": FEWER + 20}
    sandbox.shop.orders.clear()
    sandbox.shop.orders |= {each["order"]["id"]: each["order"] for each in backlog[:20]}
    assert worker("backfill", "orders").returncode == 0
    assert_exactly_once(account, FEWER)
    assert (calls(sandbox)[BULK] > requests_before[BULK]) is (is_probed and account.bulk_repeats == "ignore")


@ANY_ACCOUNT
def test_message_that_overtakes_another_costs_no_event(worker: Worker, sandbox: Sandbox, account: Account) -> None:
    """OrderCustomerSet creates the same event as OrderCreated. No queue guarantees their order."""
    assert worker("check", "--probe-bulk", "--probe-wait", "1").returncode == 0
    backlog = orders(sandbox, 20)
    order = backlog[5]["order"]
    worker.publish(message("OrderCustomerSet", "order", order["id"], order=order))
    assert outcomes(worker) == {"sent": 1}
    worker.publish(*backlog)
    assert outcomes(worker, KLAVIYO_WORKER_LANES="1") == {"sent": 20}  # one batch with all orders
    assert_exactly_once(account, 20)


@IGNORING
@IN_BULK
def test_backlog_needs_few_requests(worker: Worker, sandbox: Sandbox, account: Account) -> None:
    """Three hundred orders with three lines are 1,200 events. Half of their messages are published twice."""
    backlog = orders(sandbox)
    worker.publish(*backlog, *backlog[: ORDERS // 2])
    assert outcomes(worker) == {"sent": ORDERS + ORDERS // 2}
    assert_exactly_once(account)
    assert calls(sandbox).total() < ORDERS / 5


@IGNORING
@IN_BULK
def test_second_process_has_no_effect(worker: Worker, sandbox: Sandbox, account: Account) -> None:
    """It does not know which events were sent, and sends all of them again in bulk."""
    backlog = orders(sandbox)
    for _ in range(2):
        worker.publish(*backlog)
        assert outcomes(worker) == {"sent": ORDERS}
    assert_exactly_once(account)
    assert calls(sandbox).total() < 2 * ORDERS / 5


@IN_BULK
def test_events_are_sent_individually_if_configured(worker: Worker, sandbox: Sandbox, account: Account) -> None:
    """The setting is `never`, or the threshold is larger than any batch."""
    worker.publish(*orders(sandbox)[:20])
    assert outcomes(worker, KLAVIYO_WORKER_BULK_EVENTS="never") == {"sent": 20}
    worker.publish(*orders(sandbox)[20:40])
    assert outcomes(worker, KLAVIYO_WORKER_BULK_THRESHOLD="1000") == {"sent": 20}
    assert calls(sandbox)["/api/events"] == 160
    assert len(account.events) == 160


@IGNORING
@IN_BULK
@pytest.mark.parametrize("action", ["respond", "reset", "lose_response", "truncate"])
def test_failed_bulk_calls_cause_no_duplicates(action: str, worker: Worker, sandbox: Sandbox, account: Account) -> None:
    """Klaviyo has possibly recorded the events, and ignores them in the next bulk call."""
    sandbox.klaviyo.faults.add(Fault(status=503, times=3, match=f"POST {BULK}", action=action))
    worker.publish(*orders(sandbox))
    assert outcomes(worker) == {"sent": ORDERS}
    assert_exactly_once(account)
    assert calls(sandbox).total() < ORDERS / 5
    assert worker.dead_letters() == []


@IGNORING
@IN_BULK
def test_stopped_worker_causes_no_duplicates(worker: Worker, sandbox: Sandbox, account: Account) -> None:
    """Messages are given back to the queue before the response to their bulk call, which Klaviyo has recorded."""
    sandbox.klaviyo.faults.add(Fault(action="lose_response", seconds=15, times=None, match=f"POST {BULK}"))
    worker.publish(*orders(sandbox))
    process = worker.start("run", "--shutdown-grace-period", "0.1")
    wait_for(lambda: any(request.path == BULK for request in sandbox.klaviyo.requests))
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 6
    sandbox.klaviyo.faults.clear()
    assert outcomes(worker).keys() == {"sent"}
    assert_exactly_once(account)


@IGNORING
@IN_BULK
def test_killed_worker_causes_no_duplicates(worker: Worker, sandbox: Sandbox, account: Account) -> None:
    """Kill -9 during bulk calls, which Klaviyo has recorded."""
    environment = {"QUEUE_URL": worker.environment["QUEUE_URL"] + "?lease=1"}
    worker.publish(*orders(sandbox))
    sandbox.klaviyo.faults.add(Fault(action="lose_response", seconds=0.5, times=None, match=f"POST {BULK}"))
    process = worker.start("run", env=environment)
    wait_for(lambda: account.events)
    process.send_signal(signal.SIGKILL)
    process.wait()
    sandbox.klaviyo.faults.clear()
    assert outcomes(worker, **environment).keys() == {"sent"}
    assert_exactly_once(account)
