"""The installed command behind a push subscription of Google's emulator."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tests.acceptance.conftest import Worker, log_lines
from tests.acceptance.test_run import stop
from tests.acceptance.workload import Workload
from tests.support.ports import free_port
from tests.support.pubsub_emulator import Emulator, Subscription, bodies
from tests.support.waiting import wait_for
from worker.sandbox import Fault, Sandbox

if TYPE_CHECKING:
    from pathlib import Path


def test_pushed_messages_have_every_effect_once(sandbox: Sandbox, emulator: Emulator, tmp_path: Path) -> None:
    """Failed messages are redelivered. APP_TYPE and PUB_SUB_PORT are settings of the plugin by Klaviyo."""
    port = free_port()
    subscription = Subscription(emulator, push=f"http://127.0.0.1:{port}/")
    environment = {"QUEUE_URL": "push://127.0.0.1", "APP_TYPE": "EVENT", "PUB_SUB_PORT": str(port)}
    worker = Worker(sandbox.environment | environment, tmp_path)
    workload = Workload(sandbox, 200)
    sandbox.klaviyo.faults.add(Fault(status=503, times=5, match="POST /api/events"))
    process = worker.start("run", "--retry-timeout", "0")
    wait_for(lambda: "listening" in worker.log.read_text())
    poison = b"{}"
    subscription.publish(*workload.bodies, poison)
    wait_for(workload.is_done, 60)
    assert bodies(subscription.dead_letters(1, wait=40)) == [poison]
    stop(process)
    workload.assert_exactly_once()
    outcomes = [line["outcome"] for line in log_lines(worker.log.read_text())]
    assert set(outcomes) <= {"sent", "ignored", "retried"}
    assert "retried" in outcomes


def test_sigterm_finishes_open_requests(sandbox: Sandbox, emulator: Emulator, tmp_path: Path) -> None:
    """A host replaces an instance. The old instance responds to its open requests; the new one receives the others.

    The new instance listens before the old one stops because the emulator drops a message after a few failures.
    """
    old, old_url = _instance(sandbox, tmp_path / "old")
    new, new_url = _instance(sandbox, tmp_path / "new")
    processes = [worker.start("run") for worker in (old, new)]
    wait_for(lambda: all("listening" in worker.log.read_text() for worker in (old, new)))
    sandbox.klaviyo.latency = 0.1
    subscription = Subscription(emulator, push=old_url)
    workload = Workload(sandbox, 100)
    subscription.publish(*workload.bodies)
    wait_for(lambda: len(sandbox.account.events) > 5)
    subscription.push_to(new_url)
    stop(processes[0])
    assert not workload.is_done()
    wait_for(workload.is_done, 60)
    stop(processes[1])
    workload.assert_exactly_once()
    settled = [line["message_id"] for worker in (old, new) for line in _settled(worker)]
    assert len(settled) == len(set(settled)) == 100
    assert _settled(old)


def _instance(sandbox: Sandbox, directory: Path) -> tuple[Worker, str]:
    directory.mkdir()
    port = free_port()
    environment = sandbox.environment | {"QUEUE_URL": f"push://127.0.0.1:{port}"}
    return Worker(environment, directory), f"http://127.0.0.1:{port}/"


def _settled(worker: Worker) -> list[dict[str, Any]]:
    return [line for line in log_lines(worker.log.read_text()) if line["outcome"] != "returned"]


def test_port_in_use_is_exit_code_3(sandbox: Sandbox, tmp_path: Path) -> None:
    """The error names host and port."""
    taken = sandbox.environment["KLAVIYO_API_URL"].rpartition(":")[2]
    done = Worker(sandbox.environment | {"QUEUE_URL": f"push://127.0.0.1:{taken}"}, tmp_path)("run")
    assert (done.returncode, f"port {taken}: Address already in use" in done.stderr) == (3, True)


def test_other_app_type_is_an_error(sandbox: Sandbox, tmp_path: Path) -> None:
    """The error names the plugin's other APP_TYPE."""
    done = Worker(sandbox.environment | {"APP_TYPE": "BULK_IMPORT"}, tmp_path)("run", "--once")
    assert (done.returncode, "APP_TYPE is malformed" in done.stderr) == (2, True)
