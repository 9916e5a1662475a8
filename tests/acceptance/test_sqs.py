"""The guarantees of the installed command on AWS SQS, tested on an emulator that handles load."""

from __future__ import annotations

import signal
import socket
import time
from typing import TYPE_CHECKING

import pytest

from tests.acceptance.conftest import Worker, events_named
from tests.acceptance.test_run import stop
from tests.acceptance.workload import Workload
from tests.support.requirements import require
from tests.support.sqs_fakes import Network, Queue, Server, environment, missing
from tests.support.waiting import wait_for

if TYPE_CHECKING:
    from pathlib import Path

    from worker.sandbox import Sandbox

SOON = 45.0  # seconds, below the lease of a minute


@pytest.fixture
def queue(fauxqs: Server) -> Queue:
    return Queue(fauxqs)


@pytest.fixture
def worker(sandbox: Sandbox, queue: Queue, tmp_path: Path) -> Worker:
    return Worker(sandbox.environment | queue.environment, tmp_path)


def test_network_outage_loses_nothing(worker: Worker, sandbox: Sandbox, queue: Queue) -> None:
    """Connections are closed and refused while messages are in flight. The worker resumes by itself."""
    network = Network(queue.server)
    sandbox.klaviyo.latency = 0.02
    workload = Workload(sandbox, 300)
    queue.publish(*workload.bodies[:150])
    process = worker.start("run", env=environment(network.port))
    wait_for(lambda: len(sandbox.account.events) > 20)
    network.down()
    time.sleep(2)
    network.end_leases()  # of incomplete responses; messages in flight are redelivered, as in longer outages
    queue.publish(*workload.bodies[150:])
    network.up()
    wait_for(workload.is_done, SOON)
    wait_for(lambda: queue.count() == 0, 100)  # a message whose deletion was lost comes again after its lease
    stop(process)
    workload.assert_exactly_once()
    assert events_named(worker, "receive_failed")
    assert queue.dead_letters() == []
    network.down()


def test_worker_waits_for_a_recreated_queue(sandbox: Sandbox, tmp_path: Path) -> None:
    """The emulator loses the queue when it is killed."""
    require(missing("fauxqs"))
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


def test_errors_contain_advice(worker: Worker) -> None:
    """A missing queue or region is exit code 3 with its name, and a malformed URL is exit code 2."""
    missing = worker("run", env={"QUEUE_URL": "sqs://nowhere"})
    assert (missing.returncode, "nowhere in eu-central-1 does not exist" in missing.stderr) == (3, True)
    malformed = worker("run", env={"QUEUE_URL": "sqs://a/b"})
    assert (malformed.returncode, "sqs://NAME" in malformed.stderr) == (2, True)
    nowhere = worker("check", env={"AWS_DEFAULT_REGION": ""})
    assert (nowhere.returncode, "AWS_DEFAULT_REGION" in nowhere.stdout + nowhere.stderr) == (3, True)


def test_queue_without_a_policy_logs_a_warning(worker: Worker, fauxqs: Server) -> None:
    """The warning is logged at startup."""
    process = worker.start("run", env=Queue(fauxqs, receives=None).environment)
    wait_for(lambda: events_named(worker, "started"))
    stop(process)
    (warning,) = events_named(worker, "queue_warning")
    assert "redrive policy" in warning["reason"]


def test_signal_ends_a_worker_that_waits_for_its_queue(worker: Worker) -> None:
    """It holds no message, so it exits immediately."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        process = worker.start("run", env=environment(silent.getsockname()[1]))
        connection, _ = silent.accept()
        with connection:
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
    assert events_named(worker, "stopped")
