"""The guarantees of the installed command on every queue, tested on emulators of the cloud services."""

from __future__ import annotations

import json
import signal
from contextlib import closing
from itertools import islice
from typing import TYPE_CHECKING

import pytest

from tests.acceptance.conftest import Worker, log_lines, settled
from tests.acceptance.test_run import stop, updated
from tests.acceptance.workload import Workload
from tests.support.waiting import receive, wait_for
from worker.sandbox import Fault

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.rigs.base import Rig
    from worker.sandbox import Sandbox

POISON = b'{"notificationType": "Message", "torn'
short_leases = pytest.mark.short_leases


@pytest.fixture
def worker(sandbox: Sandbox, rig: Rig, tmp_path: Path) -> Worker:
    is_forked = "PYTHONPATH" not in rig.environment  # a new interpreter reads it
    return Worker(sandbox.environment | rig.environment, tmp_path, is_forked=is_forked)


@pytest.mark.also_on("directory")
def test_mixed_messages_have_every_effect_once(worker: Worker, sandbox: Sandbox, rig: Rig) -> None:
    """The messages are orders, customers, products, stock and categories, in all envelopes. None is dead-lettered."""
    workload = Workload(sandbox, 400)
    rig.publish(workload.bodies)
    process = worker.start("run")
    wait_for(lambda: len(settled(worker)) == 400, 100)
    stop(process)
    workload.assert_exactly_once()
    assert {line["outcome"] for line in log_lines(worker.log.read_text())} <= {"sent", "ignored"}
    assert rig.unsettled() == []
    assert rig.dead_letters() == []


def test_poison_message_is_dead_lettered_alone(worker: Worker, sandbox: Sandbox, rig: Rig) -> None:
    """The log has each attempt and the last outcome."""
    workload = Workload(sandbox, 50)
    rig.publish([*workload.bodies[:25], POISON, *workload.bodies[25:]])
    process = worker.start("run")
    wait_for(lambda: len(settled(worker)) == 50)  # a state is acked later than it is written
    wait_for(lambda: [dead_letter.body for dead_letter in rig.dead_letters()] == [POISON], 100)
    stop(process)
    workload.assert_exactly_once()
    assert rig.unsettled() == []
    outcomes = [
        (line["attempt"], line["outcome"]) for line in log_lines(worker.log.read_text()) if line["stage"] == "parse"
    ]
    attempts = 1 if rig.guarantees.dead_letter == "always" else rig.attempts
    assert outcomes.pop() == (attempts, "dead_lettered")
    assert outcomes == sorted({(attempt, "retried") for attempt, _ in outcomes})  # a lost response has no outcome


def test_direct_dead_letter_has_a_reason(worker: Worker, rig: Rig) -> None:
    """The worker moves the message to the dead-letter queue at the first attempt."""
    rig.publish([b"{}"])
    process = worker.start("run", "--dead-letter-mode", "direct")
    wait_for(rig.dead_letters)
    stop(process)
    (dead_letter,) = rig.dead_letters()
    assert dead_letter.body == b"{}"
    assert "notificationType" in " ".join(dead_letter.details.values())
    assert [line["outcome"] for line in log_lines(worker.log.read_text())] == ["dead_lettered"]


@short_leases
def test_messages_of_a_killed_worker_are_redelivered(worker: Worker, sandbox: Sandbox, rig: Rig) -> None:
    """The next worker receives them when the leases expire. No effect is duplicated."""
    sandbox.klaviyo.latency = 0.05
    workload = Workload(sandbox, 200)
    rig.publish(workload.bodies)
    process = worker.start("run")
    wait_for(lambda: len(sandbox.account.events) > 20)
    process.kill()
    process.wait()
    assert not workload.is_done()
    rig.expire_leases_of_killed()
    process = worker.start("run")
    wait_for(workload.is_done, 100)
    stop(process)
    workload.assert_exactly_once()
    assert rig.dead_letters() == []


def test_sigterm_under_load_nacks_unprocessed_messages(worker: Worker, sandbox: Sandbox, rig: Rig) -> None:
    """The next worker receives them long before the leases expire."""
    sandbox.klaviyo.latency = 0.05
    workload = Workload(sandbox, 400)
    rig.publish(workload.bodies)
    process = worker.start("run")
    wait_for(lambda: len(sandbox.account.events) > 20)
    stop(process)
    assert not workload.is_done()
    sandbox.klaviyo.latency = 0.0
    process = worker.start("run")
    wait_for(workload.is_done)  # takes less than a third of a lease
    stop(process)
    workload.assert_exactly_once()
    assert rig.dead_letters() == []


def test_shutdown_timeout_nacks_the_message_and_exits_6(worker: Worker, sandbox: Sandbox, rig: Rig) -> None:
    """The next worker receives the message immediately."""
    customer = next(iter(sandbox.shop.customers))
    sandbox.klaviyo.faults.add(Fault(action="hang", seconds=30, times=1, match="POST /api/profiles"))
    rig.publish([json.dumps(updated(customer)).encode()])
    process = worker.start("run", "--shutdown-grace-period", "0.3")
    wait_for(lambda: sandbox.klaviyo.faults.triggered)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 6
    with closing(rig.opener()()) as queue:
        (redelivery,) = receive(queue, 1)
    assert redelivery.attempt == (2 if rig.guarantees.unhandled_counts_as_attempt else 1)


def test_two_workers_share_the_load(worker: Worker, sandbox: Sandbox, rig: Rig, tmp_path: Path) -> None:
    """No effect is duplicated. The queue determines the shares."""
    sandbox.klaviyo.latency = 0.05
    workload = Workload(sandbox, 400)
    other = Worker(worker.environment, tmp_path / "other")
    other.directory.mkdir()
    limit = ("--max-in-flight", "40", "--max-batch", "10", "--http-port", "0")
    processes = [one.start("run", *limit) for one in (worker, other)]
    remaining = iter(workload.bodies)
    wait_for(lambda: _both_have_received(rig, remaining, worker, other), 100)
    while some := list(islice(remaining, 5)):
        rig.publish(some)
    wait_for(lambda: len(settled(worker) | settled(other)) == 400, 100)
    for process in processes:
        stop(process)
    workload.assert_exactly_once()
    assert rig.unsettled() == []
    shares = [len(log_lines(one.log.read_text())) for one in (worker, other)]
    assert sum(shares) == 400
    assert min(shares) > 20


def _both_have_received(rig: Rig, remaining: Iterator[bytes], *workers: Worker) -> bool:
    """Publish a message. Return whether both workers have received a message."""
    rig.publish([next(remaining)])
    return all(log_lines(worker.log.read_text()) for worker in workers)


def test_once_drains_the_queue(worker: Worker, sandbox: Sandbox, rig: Rig) -> None:
    """If the queue cannot report its backlog, the run ends after ten idle seconds without nacked messages."""
    workload = Workload(sandbox, 100)
    rig.publish(workload.bodies)
    done = worker("run", "--once", "--retry-timeout", "0")
    assert done.returncode == 0, done.stderr
    workload.assert_exactly_once()
    assert rig.unsettled() == []


def test_dry_run_keeps_all_messages(worker: Worker, sandbox: Sandbox, rig: Rig) -> None:
    """A dry run prints the requests."""
    workload = Workload(sandbox, 30)
    rig.publish(workload.bodies)
    done = worker("run", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) >= 60
    assert sandbox.account.events == []
    process = worker.start("run")
    wait_for(workload.is_done)  # immediately, because the leases of a minute were ended
    stop(process)


def test_publish_and_missing_queue(worker: Worker, sandbox: Sandbox, rig: Rig) -> None:
    """`publish` fills the queue. A missing queue is exit code 3, and the error names QUEUE_URL."""
    workload = Workload(sandbox, 10)
    assert worker("publish", "-", stdin=b"\n".join(workload.bodies) + b"\n").stdout == "10\n"
    assert sorted(rig.unsettled()) == sorted(workload.bodies)
    missing = worker("run", env={"QUEUE_URL": rig.missing_url})
    assert missing.returncode == 3
    assert missing.stderr.startswith("Error: QUEUE_URL")
