"""Profiles end in the state that commercetools has, whatever lags, lands late or happens in the meantime."""

from __future__ import annotations

import signal
from collections import Counter, defaultdict
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest
import urllib3

from tests.acceptance.conftest import Worker, log_lines
from tests.support.klaviyo_account import HEADERS
from tests.support.waiting import wait_for
from worker.sandbox import Fault, Sandbox
from worker.sandbox.klaviyo.account import Account
from worker.sandbox.notifications import change, message, payload_not_included

if TYPE_CHECKING:
    from collections.abc import Iterator

IMPORTS = "/api/profile-bulk-import-jobs"
CUSTOMERS = [f"cust-{number}" for number in range(60)]  # most of them are in one batch, which is sent as a job
ONE_LANE = {"KLAVIYO_WORKER_LANES": "1"}


@pytest.fixture
def sandbox(request: pytest.FixtureRequest) -> Iterator[Sandbox]:
    """A sandbox whose bulk jobs take the given number of seconds."""
    with Sandbox(account=Account(job_seconds=getattr(request, "param", 0.0))) as running:
        running.shop.customers.clear()
        yield running


@pytest.fixture
def worker(worker: Worker) -> Worker:
    return replace(worker, environment=worker.environment | ONE_LANE)


def job_seconds(seconds: float) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("sandbox", [seconds], indirect=True)


def put(sandbox: Sandbox, version: int, name: str, *customers: str) -> list[dict[str, Any]]:
    """Change customers in commercetools and return the notifications."""
    for customer in customers:
        sandbox.shop.customers[customer] = {
            "id": customer,
            "version": version,
            "email": f"{customer}@example.com",
            "firstName": name,
            "addresses": [],
        }
    return [change("ResourceUpdated", "customer", customer, version=version) for customer in customers]


def names(sandbox: Sandbox) -> Counter[str]:
    """Count the first names in Klaviyo."""
    with sandbox.account.lock:
        return Counter(profile["attributes"].get("first_name", "") for profile in sandbox.account.profiles)


def record_writes(sandbox: Sandbox) -> dict[str, list[str]]:
    """Return a dictionary that receives the first names that are written to each profile."""
    written: dict[str, list[str]] = defaultdict(list)
    write = sandbox.account._write

    def record(profile: Any, attributes: Any) -> None:
        if "first_name" in attributes:
            written[profile["id"]].append(attributes["first_name"])
        write(profile, attributes)

    sandbox.account._write = record  # type: ignore[method-assign]
    return written


def jobs_started(sandbox: Sandbox) -> int:
    return sum((request.method, request.path) == ("POST", IMPORTS) for request in sandbox.klaviyo.requests)


def jobs_ended(sandbox: Sandbox) -> bool:
    """Return whether all jobs have written their profiles."""
    jobs = urllib3.request("GET", f"{sandbox.klaviyo.url}{IMPORTS}?page%5Bsize%5D=100", headers=HEADERS).json()["data"]
    return all(job["attributes"]["status"] == "complete" for job in jobs)


def outcomes(worker: Worker, *arguments: str, **environment: str) -> Counter[str]:
    done = worker("run", "--once", *arguments, env=environment)
    assert done.returncode == 0, done.stderr
    return Counter(line["outcome"] for line in log_lines(done.stderr))


def test_reading_with_a_lower_version_than_the_message_is_not_believed(worker: Worker, sandbox: Sandbox) -> None:
    """The messages are minutes old. commercetools shows neither the last version of the customer nor the order."""
    (updated,) = put(sandbox, 5, "Version 5", "cust-1")
    put(sandbox, 4, "Version 4", "cust-1")
    order = next(iter(sandbox.shop.orders.values()))
    del sandbox.shop.orders[order["id"]]
    minutes_ago = (datetime.now(UTC) - timedelta(minutes=5)).isoformat()
    created = payload_not_included("OrderCreated", "order", order["id"]) | {"createdAt": minutes_ago}
    worker.publish(updated | {"modifiedAt": minutes_ago}, created)
    process = worker.start("run", "--once")
    wait_for(lambda: {"customers", "orders"} <= {r.path.rpartition("/")[2] for r in sandbox.commercetools.requests})
    sandbox.shop.orders[order["id"]] = order
    assert sandbox.account.profiles == []
    put(sandbox, 5, "Version 5", "cust-1")
    assert process.wait(60) == 0
    assert names(sandbox)["Version 5"] == 1
    assert Counter(event["metric"] for event in sandbox.account.events)["Placed Order"] == 1


def test_message_from_the_future_waits_no_longer_than_any_other(worker: Worker, sandbox: Sandbox) -> None:
    """Its customer does not exist. The wait is limited from its first receipt, and the orders do not wait."""
    future = [
        change("ResourceUpdated", "customer", f"none-{number}", version=2, modified_at="2099-01-01T00:00:00.000Z")
        for number in range(40)
    ]
    order = next(iter(sandbox.shop.orders.values()))
    placed = [message("OrderCreated", "order", f"o-{n}", order=order | {"id": f"o-{n}"}) for n in range(20)]
    worker.publish(*future, *placed)
    assert outcomes(worker, KLAVIYO_WORKER_MAX_IN_FLIGHT="40") == {"ignored": 40, "sent": 20}


@job_seconds(5.0)
def test_job_of_a_stopped_worker_does_not_leave_an_old_state(worker: Worker, sandbox: Sandbox) -> None:
    """Its messages return after the job, which then lands beside the newer states of the next worker."""
    worker = replace(worker, environment=worker.environment | {"KLAVIYO_WORKER_JOB_TIMEOUT": "7"})
    worker.publish(*put(sandbox, 1, "Old", *CUSTOMERS))
    process = worker.start("run", "--shutdown-grace-period", "1")
    wait_for(lambda: jobs_started(sandbox))
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
    worker.publish(*put(sandbox, 2, "New", *CUSTOMERS))
    process = worker.start("run", "--once", env={"KLAVIYO_WORKER_BULK_THRESHOLD": "1000"})
    assert process.wait(60) == 0
    wait_for(lambda: jobs_ended(sandbox))
    assert names(sandbox) == {"New": 60}
    assert worker.dead_letters() == []


@job_seconds(3.0)
def test_nothing_is_acked_beside_a_job_that_takes_too_long(worker: Worker, sandbox: Sandbox) -> None:
    """The newer state of a customer waits for the job, which would overwrite it."""
    worker.publish(*put(sandbox, 1, "Old", *CUSTOMERS))
    process = worker.start("run", "--once", env={"KLAVIYO_WORKER_JOB_TIMEOUT": "2"})
    wait_for(lambda: jobs_started(sandbox))
    worker.publish(*put(sandbox, 2, "New", "cust-30"))
    assert process.wait(60) == 0
    wait_for(lambda: jobs_ended(sandbox))
    assert names(sandbox) == {"Old": 59, "New": 1}


@job_seconds(2.0)
def test_job_whose_start_had_no_answer_does_not_leave_an_old_state(worker: Worker, sandbox: Sandbox) -> None:
    """Klaviyo started the job, but the worker does not know. It starts no second one while the first can write."""
    sandbox.klaviyo.faults.add(Fault(match=f"POST {IMPORTS}", action="lose_response"))
    written = record_writes(sandbox)
    worker.publish(*put(sandbox, 1, "Old", *CUSTOMERS))
    process = worker.start("run", "--once", env={"KLAVIYO_WORKER_JOB_TIMEOUT": "12"})
    wait_for(lambda: jobs_started(sandbox))
    worker.publish(*put(sandbox, 2, "New", *CUSTOMERS))
    assert process.wait(60) == 0
    assert set(map(tuple, written.values())) <= {("Old", "New"), ("New",)}
    assert names(sandbox) == {"New": 60}


@job_seconds(3.0)
def test_slow_write_costs_no_attempt_without_a_hold(worker: Worker, sandbox: Sandbox) -> None:
    """The state is read again after the write, in place."""
    worker = replace(
        worker, environment=worker.environment | {"QUEUE_URL": worker.environment["QUEUE_URL"] + "?max_attempts=1"}
    )
    worker.publish(*put(sandbox, 1, "Ada", *CUSTOMERS))
    assert outcomes(worker, KLAVIYO_WORKER_OUTAGE_HOLD="0") == {"sent": 60}


def test_conflict_with_a_profile_that_was_just_merged_is_tried_again(worker: Worker, sandbox: Sandbox) -> None:
    """Klaviyo names a profile that no longer exists. The customer must not become a dead letter."""
    meta = b'{"duplicate_profile_id":"01M"}'
    error = b'{"errors":[{"status":409,"code":"duplicate_profile","title":"Conflict.","meta":' + meta + b"}]}"
    headers = {"Content-Type": "application/vnd.api+json"}
    sandbox.klaviyo.faults.add(Fault(status=409, match="POST /api/profiles", body=error, headers=headers))
    worker.publish(*put(sandbox, 1, "Ada", "cust-1"))
    assert outcomes(worker) == {"sent": 1}
    assert names(sandbox) == {"Ada": 1}


@job_seconds(3.0)
def test_person_who_is_erased_while_a_job_is_under_way_stays_away(worker: Worker, sandbox: Sandbox) -> None:
    """The job of the backfill creates the profile after the erasure, so the backfill deletes it again."""
    (worker.directory / "mapping.toml").write_text("[customer]\nerasure = true\n")
    environment = {"KLAVIYO_WORKER_CONFIG": "mapping.toml"}
    put(sandbox, 1, "Ada", *CUSTOMERS)
    process = worker.start("backfill", "customers", env=environment)
    wait_for(lambda: jobs_started(sandbox))
    del sandbox.shop.customers["cust-30"]
    worker.publish(change("ResourceDeleted", "customer", "cust-30", dataErasure=True))
    assert outcomes(worker, **environment) == {"sent": 1}
    assert process.wait(60) == 0
    left = [profile["attributes"].get("external_id") for profile in sandbox.account.profiles]
    assert left
    assert "cust-30" not in left
