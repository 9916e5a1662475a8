"""What the worker promises on every queue, seen from outside: the installed command, and what stands in for a cloud."""

from __future__ import annotations

import json
import signal
from contextlib import closing
from itertools import islice
from typing import TYPE_CHECKING

import pytest

from tests.acceptance.conftest import NOT_MEASURED, Worker, log_lines, settled
from tests.acceptance.test_run import stop, updated, wait_for
from tests.acceptance.workload import Workload
from tests.contract.test_contract import receive
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
    return Worker(sandbox.environment | rig.environment | NOT_MEASURED, tmp_path)


@pytest.mark.also_on("directory")
def test_a_thousand_mixed_messages_have_every_effect_once(worker: Worker, sandbox: Sandbox, rig: Rig) -> None:
    """Orders, customers, products, stock, categories, in all envelopes; the dead letters stay empty."""
    workload = Workload(sandbox, 1000)
    rig.publish(workload.bodies)
    process = worker.start("run")
    wait_for(lambda: len(settled(worker)) == 1000, 60)
    stop(process)
    workload.assert_exactly_once()
    assert {line["outcome"] for line in log_lines(worker.log.read_text())} <= {"sent", "ignored"}
    assert rig.left() == []
    assert rig.dead_letters() == []


def test_poison_ends_in_the_dead_letters_while_its_neighbours_pass(worker: Worker, sandbox: Sandbox, rig: Rig) -> None:
    """The log tells each attempt, and that the last one was the end."""
    workload = Workload(sandbox, 50)
    rig.publish([*workload.bodies[:25], POISON, *workload.bodies[25:]])
    process = worker.start("run")
    wait_for(workload.is_done)
    wait_for(lambda: [letter.body for letter in rig.dead_letters()] == [POISON], 40)
    stop(process)
    workload.assert_exactly_once()
    assert rig.left() == []
    bad = [(line["attempt"], line["outcome"]) for line in log_lines(worker.log.read_text()) if line["stage"] == "parse"]
    tries = 1 if rig.guarantees.dead_letter == "always" else rig.attempts
    assert bad == [*((attempt, "retried") for attempt in range(1, tries)), (tries, "dead_lettered")]


def test_direct_dead_letters_are_there_at_once_with_their_reason(worker: Worker, rig: Rig) -> None:
    """For shops that want to read why."""
    rig.publish([b"{}"])
    process = worker.start("run", "--dead-letter", "direct")
    wait_for(rig.dead_letters)
    stop(process)
    (letter,) = rig.dead_letters()
    assert letter.body == b"{}"
    assert "notificationType" in " ".join(letter.about.values())
    assert [line["outcome"] for line in log_lines(worker.log.read_text())] == ["dead_lettered"]


@short_leases
def test_a_killed_worker_leaves_its_messages_to_the_next(worker: Worker, sandbox: Sandbox, rig: Rig) -> None:
    """Once its leases end; what it had done already is not done twice."""
    sandbox.klaviyo.latency = 0.05
    workload = Workload(sandbox, 200)
    rig.publish(workload.bodies)
    process = worker.start("run")
    wait_for(lambda: len(sandbox.account.events) > 20)
    process.kill()
    process.wait()
    assert not workload.is_done()
    rig.worker_died()
    process = worker.start("run")
    wait_for(workload.is_done, 40)
    stop(process)
    workload.assert_exactly_once()
    assert rig.dead_letters() == []


def test_sigterm_under_load_loses_nothing_and_returns_the_rest_at_once(
    worker: Worker, sandbox: Sandbox, rig: Rig
) -> None:
    """What was not begun is there for the next worker long before the leases end."""
    sandbox.klaviyo.latency = 0.05
    workload = Workload(sandbox, 400)
    rig.publish(workload.bodies)
    process = worker.start("run")
    wait_for(lambda: len(sandbox.account.events) > 20)
    stop(process)
    assert not workload.is_done()
    sandbox.klaviyo.latency = 0.0
    process = worker.start("run")
    wait_for(workload.is_done)  # within a third of a lease
    stop(process)
    workload.assert_exactly_once()
    assert rig.dead_letters() == []


def test_a_shutdown_that_takes_too_long_returns_the_message_and_exits_6(
    worker: Worker, sandbox: Sandbox, rig: Rig
) -> None:
    """The next worker has it at once."""
    customer = next(iter(sandbox.shop.customers))
    sandbox.klaviyo.faults.add(Fault(action="hang", seconds=30, times=1))
    rig.publish([json.dumps(updated(customer)).encode()])
    process = worker.start("run", "--shutdown-grace-period", "0.3")
    wait_for(lambda: sandbox.klaviyo.faults.triggered)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 6
    with closing(rig.opener()()) as queue:
        (again,) = receive(queue, 1)
    assert again.attempt == (1 if rig.guarantees.unhandled_is_free else 2)


def test_two_workers_share_the_load(worker: Worker, sandbox: Sandbox, rig: Rig, tmp_path: Path) -> None:
    """Nothing is done twice. How even the shares are is the queue's business: it sees room in both."""
    sandbox.klaviyo.latency = 0.05
    workload = Workload(sandbox, 600)
    other = Worker(worker.environment, tmp_path / "other")
    other.directory.mkdir()
    limit = ("--max-in-flight", "40", "--max-batch", "10", "--http-port", "0")
    processes = [one.start("run", *limit) for one in (worker, other)]
    left = iter(workload.bodies)
    wait_for(lambda: _both_had_some(rig, left, worker, other), 40)
    while few := list(islice(left, 5)):
        rig.publish(few)
    wait_for(lambda: len(settled(worker) | settled(other)) == 600, 60)
    for process in processes:
        stop(process)
    workload.assert_exactly_once()
    assert rig.left() == []
    shares = [len(log_lines(one.log.read_text())) for one in (worker, other)]
    assert sum(shares) == 600
    assert min(shares) > 20


def _both_had_some(rig: Rig, left: Iterator[bytes], *workers: Worker) -> bool:
    """Publish a message, until both workers are connected."""
    rig.publish([next(left)])
    return all(log_lines(worker.log.read_text()) for worker in workers)


def test_once_drains_the_queue_and_waits_for_redeliveries(worker: Worker, sandbox: Sandbox, rig: Rig) -> None:
    """Where the queue does not tell its backlog, quiet for ten seconds and nothing sent back is the end."""
    workload = Workload(sandbox, 100)
    rig.publish(workload.bodies)
    done = worker("run", "--once", "--retry-timeout", "0")
    assert done.returncode == 0, done.stderr
    workload.assert_exactly_once()
    assert rig.left() == []


def test_a_dry_run_gives_everything_back(worker: Worker, sandbox: Sandbox, rig: Rig) -> None:
    """It shows what would be sent."""
    workload = Workload(sandbox, 30)
    rig.publish(workload.bodies)
    done = worker("run", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) >= 60
    assert sandbox.account.events == []
    process = worker.start("run")
    wait_for(workload.is_done)  # at once: the leases of a minute were ended
    stop(process)


def test_publish_and_a_queue_that_is_not_there(worker: Worker, sandbox: Sandbox, rig: Rig) -> None:
    """`publish` fills the queue; a queue that is not there is exit 3, and the line names QUEUE_URL."""
    workload = Workload(sandbox, 10)
    assert worker("publish", "-", stdin=b"\n".join(workload.bodies) + b"\n").stdout == "10\n"
    assert sorted(rig.left()) == sorted(workload.bodies)
    missing = worker("run", env={"QUEUE_URL": rig.missing_url})
    assert missing.returncode == 3
    assert missing.stderr.startswith("Error: QUEUE_URL")
