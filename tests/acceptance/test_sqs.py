"""What the worker promises on AWS SQS, seen from outside: the installed command on a stand-in that bears load."""

from __future__ import annotations

import json
import signal
import time
from itertools import islice
from typing import TYPE_CHECKING, Any

import pytest

from tests.acceptance.conftest import Worker, json_lines, log_lines
from tests.acceptance.test_run import stop, updated, wait_for
from tests.acceptance.workload import Workload
from tests.sqs import Network, Queue, Server, bodies, environment
from worker.sandbox import Fault, Sandbox

if TYPE_CHECKING:
    from pathlib import Path

SOON = 20.0  # seconds, well below the lease of a minute


@pytest.fixture
def queue(fauxqs: Server) -> Queue:
    return Queue(fauxqs)


@pytest.fixture
def worker(sandbox: Sandbox, queue: Queue, tmp_path: Path) -> Worker:
    return Worker(sandbox.environment | queue.environment, tmp_path)


def events_named(worker: Worker, name: str) -> list[dict[str, Any]]:
    return [line for line in json_lines(worker.log.read_text()) if line["event"] == name]


def settled(worker: Worker) -> set[str]:
    """Return the messages that a started worker has deleted."""
    lines = log_lines(worker.log.read_text())
    return {line["message_id"] for line in lines if line["outcome"] in {"sent", "ignored"}}


def test_a_thousand_mixed_messages_have_every_effect_once(worker: Worker, sandbox: Sandbox, queue: Queue) -> None:
    """Orders, customers, products, stock, categories, in all envelopes."""
    workload = Workload(sandbox, 1000)
    queue.publish(*workload.bodies)
    process = worker.start("run")
    wait_for(lambda: len(settled(worker)) == 1000, 60)
    stop(process)
    workload.assert_exactly_once()
    assert {line["outcome"] for line in log_lines(worker.log.read_text())} <= {"sent", "ignored"}
    assert events_named(worker, "queue_warning") == []
    assert queue.held() == 0


def test_poison_ends_in_the_dead_letters_after_the_policys_receives_while_its_neighbours_pass(
    worker: Worker, sandbox: Sandbox, queue: Queue
) -> None:
    """The log tells each attempt, and that the last one was the end."""
    workload = Workload(sandbox, 50)
    poison = b'{"notificationType": "Message", "torn'
    queue.publish(*workload.bodies[:25], poison, *workload.bodies[25:])
    process = worker.start("run")
    wait_for(workload.is_done)
    assert bodies(queue.dead_letters(1)) == [poison]
    stop(process)
    workload.assert_exactly_once()
    bad = [line for line in log_lines(worker.log.read_text()) if line["stage"] == "parse"]
    assert [(line["attempt"], line["outcome"]) for line in bad] == [
        *((attempt, "retried") for attempt in (1, 2, 3, 4)),
        (5, "dead_lettered"),
    ]


def test_direct_dead_letters_are_there_at_once_with_their_reason(
    worker: Worker, sandbox: Sandbox, queue: Queue
) -> None:
    """For shops that want to read why."""
    queue.publish(b"{}")
    process = worker.start("run", "--dead-letter", "direct")
    (letter,) = queue.dead_letters(1)
    stop(process)
    assert letter["Body"] == "{}"
    assert letter["MessageAttributes"]["stage"]["StringValue"] == "parse"
    assert "notificationType" in letter["MessageAttributes"]["reason"]["StringValue"]
    assert [line["outcome"] for line in log_lines(worker.log.read_text())] == ["dead_lettered"]


def test_sigterm_under_load_loses_nothing_and_returns_the_rest_at_once(
    worker: Worker, sandbox: Sandbox, queue: Queue
) -> None:
    """What was not begun is there for the next worker long before the leases end."""
    sandbox.klaviyo.latency = 0.05
    workload = Workload(sandbox, 400)
    queue.publish(*workload.bodies)
    process = worker.start("run")
    wait_for(lambda: len(sandbox.account.events) > 20)
    stop(process)
    first = len(sandbox.account.events)
    assert not workload.is_done()
    sandbox.klaviyo.latency = 0.0
    process = worker.start("run")
    wait_for(workload.is_done, SOON)
    stop(process)
    assert first > 20
    workload.assert_exactly_once()
    assert queue.dead_letters() == []


def test_a_shutdown_that_takes_too_long_returns_the_message_and_exits_6(
    worker: Worker, sandbox: Sandbox, queue: Queue
) -> None:
    """The next worker has it at once."""
    customer = next(iter(sandbox.shop.customers))
    sandbox.klaviyo.faults.add(Fault(action="hang", seconds=30, times=1))
    queue.publish(json.dumps(updated(customer)).encode())
    process = worker.start("run", "--grace-period", "0.3")
    wait_for(lambda: sandbox.klaviyo.requests or sandbox.commercetools.requests)
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    assert process.wait(15) == 6
    (again,) = queue.pull(1, wait=5)
    assert again["Attributes"]["ApproximateReceiveCount"] == "2"


def test_what_a_killed_worker_held_comes_again_when_its_leases_end(
    worker: Worker, sandbox: Sandbox, queue: Queue
) -> None:
    """Here at once, as a minute of waiting would have it."""
    network = Network(queue.server)
    sandbox.klaviyo.latency = 0.05
    workload = Workload(sandbox, 200)
    queue.publish(*workload.bodies)
    process = worker.start("run", env=environment(network.port))
    wait_for(lambda: len(sandbox.account.events) > 20)
    process.kill()
    process.wait()
    assert not workload.is_done()
    time.sleep(0.2)  # for answers that are still under way
    network.end_leases()
    network.down()
    process = worker.start("run")
    wait_for(workload.is_done, SOON)
    wait_for(lambda: queue.held() == 0)
    stop(process)
    workload.assert_exactly_once()
    assert queue.dead_letters() == []


def test_two_workers_on_one_queue_share_the_load(
    worker: Worker, sandbox: Sandbox, queue: Queue, tmp_path: Path
) -> None:
    """Nothing is done twice. How even the shares are is the server's business."""
    sandbox.klaviyo.latency = 0.05
    workload = Workload(sandbox, 600)
    other = Worker(worker.environment, tmp_path / "other")
    other.directory.mkdir()
    limit = ("--max-in-flight", "40", "--max-batch", "10")
    processes = [one.start("run", *limit) for one in (worker, other)]
    left = iter(workload.bodies)
    while not all(log_lines(one.log.read_text()) for one in (worker, other)):  # until both are connected
        queue.publish(next(left))
        time.sleep(0.05)
    while few := list(islice(left, 5)):
        queue.publish(*few)
    wait_for(lambda: len(settled(worker) | settled(other)) == 600, 60)
    for process in processes:
        stop(process)
    workload.assert_exactly_once()
    assert queue.held() == 0
    shares = [len(log_lines(one.log.read_text())) for one in (worker, other)]
    assert sum(shares) == 600
    assert min(shares) > 20


def test_a_network_that_is_down_for_a_while_costs_nothing(worker: Worker, sandbox: Sandbox, queue: Queue) -> None:
    """Connections are cut and refused while messages are in work; the worker goes on by itself."""
    network = Network(queue.server)
    sandbox.klaviyo.latency = 0.02
    workload = Workload(sandbox, 300)
    queue.publish(*workload.bodies[:150])
    process = worker.start("run", env=environment(network.port))
    wait_for(lambda: len(sandbox.account.events) > 20)
    network.down()
    time.sleep(2)
    network.end_leases()  # of answers that were cut off; what the worker holds comes twice, as in longer outages
    queue.publish(*workload.bodies[150:])
    network.up()
    wait_for(workload.is_done, SOON)
    wait_for(lambda: queue.held() == 0, SOON)
    stop(process)
    workload.assert_exactly_once()
    assert events_named(worker, "receive_failed")
    assert queue.dead_letters() == []
    network.down()


def test_a_queue_that_is_made_anew_is_found_again(sandbox: Sandbox, tmp_path: Path) -> None:
    """The stand-in forgets everything when it is killed; the worker waits for the queue."""
    server = Server("fauxqs")
    try:
        queue = Queue(server)
        worker = Worker(sandbox.environment | queue.environment, tmp_path)
        process = worker.start("run")
        wait_for(lambda: events_named(worker, "started"))
        server.kill()
        server.start()
        wait_for(lambda: any("NonExistentQueue" in line["error"] for line in events_named(worker, "receive_failed")))
        queue = Queue(server, name=queue.name)
        workload = Workload(sandbox, 50)
        queue.publish(*workload.bodies)
        wait_for(workload.is_done, SOON)
        stop(process)
        workload.assert_exactly_once()
    finally:
        server.kill()


def test_once_drains_the_queue_and_waits_for_redeliveries(worker: Worker, sandbox: Sandbox, queue: Queue) -> None:
    """SQS counts approximately: nothing counted, and quiet for ten seconds, is the end."""
    workload = Workload(sandbox, 100)
    queue.publish(*workload.bodies)
    sandbox.klaviyo.faults.add(Fault(status=503, times=3, match="POST /api/events"))
    done = worker("run", "--once", "--retry-seconds", "0")
    assert done.returncode == 0, done.stderr
    workload.assert_exactly_once()
    assert queue.held() == 0


def test_a_dry_run_gives_everything_back(worker: Worker, sandbox: Sandbox, queue: Queue) -> None:
    """It shows what would be sent."""
    workload = Workload(sandbox, 30)
    queue.publish(*workload.bodies)
    done = worker("run", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) >= 60
    assert sandbox.account.events == []
    assert len(queue.pull(30)) == 30


def test_publish_and_errors(worker: Worker, sandbox: Sandbox, queue: Queue) -> None:
    """`publish` fills the queue; one that is not there is exit 3 with its name; a bad URL is exit 2."""
    workload = Workload(sandbox, 30)
    assert worker("publish", "-", stdin=b"\n".join(workload.bodies) + b"\n").stdout == "30\n"
    assert sorted(bodies(queue.pull(30))) == sorted(workload.bodies)
    missing = worker("run", env={"QUEUE_URL": "sqs://nowhere"})
    assert (missing.returncode, "nowhere does not exist" in missing.stderr) == (3, True)
    malformed = worker("run", env={"QUEUE_URL": "sqs://a/b"})
    assert (malformed.returncode, "sqs://NAME" in malformed.stderr) == (2, True)
    nowhere = worker("check", env={"AWS_DEFAULT_REGION": ""})
    assert (nowhere.returncode, "AWS_DEFAULT_REGION" in nowhere.stdout + nowhere.stderr) == (3, True)


def test_a_queue_without_a_policy_is_warned_about(worker: Worker, fauxqs: Server) -> None:
    """When the worker starts."""
    process = worker.start("run", env=Queue(fauxqs, receives=None).environment)
    wait_for(lambda: events_named(worker, "started"))
    stop(process)
    (warning,) = events_named(worker, "queue_warning")
    assert "redrive policy" in warning["reason"]
