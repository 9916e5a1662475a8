"""The guarantees of the installed command on Google Pub/Sub, tested on Google's emulator."""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from tests.acceptance.conftest import Worker, events_named, log_lines, settled
from tests.acceptance.test_run import stop
from tests.acceptance.workload import Workload
from tests.support.pubsub_emulator import Emulator, Network, Subscription
from tests.support.waiting import wait_for
from worker.sandbox import Sandbox

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

SOON = 20.0  # seconds, well below the lease of a minute


def on(subscription: Subscription, host: str = "") -> dict[str, str]:
    return {"QUEUE_URL": subscription.url, "PUBSUB_EMULATOR_HOST": host or subscription.emulator.host}


@pytest.fixture
def subscription(emulator: Emulator) -> Subscription:
    return Subscription(emulator)


@pytest.fixture
def worker(sandbox: Sandbox, subscription: Subscription, tmp_path: Path) -> Worker:
    return Worker(sandbox.environment | on(subscription), tmp_path)


def test_worker_reconnects_after_a_restart_of_the_emulator(sandbox: Sandbox, tmp_path: Path) -> None:
    """The emulator loses all messages, so the test publishes them again."""
    emulator = Emulator()
    try:
        subscription = Subscription(emulator)
        worker = Worker(sandbox.environment | on(subscription), tmp_path)
        sandbox.klaviyo.latency = 0.02
        workload = Workload(sandbox, 300)
        subscription.publish(*workload.bodies[:150])
        process = worker.start("run")
        wait_for(lambda: len(sandbox.account.events) > 20)
        emulator.kill()
        emulator.start()
        subscription = Subscription(emulator, name=subscription.name)
        subscription.publish(*workload.bodies)
        wait_for(workload.is_done, 60)
        stop(process)
        workload.assert_exactly_once()
    finally:
        emulator.kill()


def test_errors_contain_advice(worker: Worker) -> None:
    """A missing subscription is exit code 3 with its name, and a malformed URL is exit code 2."""
    missing = worker("run", env={"QUEUE_URL": "pubsub://demo/nowhere"})
    assert (missing.returncode, "nowhere does not exist" in missing.stderr) == (3, True)
    malformed = worker("run", env={"QUEUE_URL": "pubsub://demo"})
    assert (malformed.returncode, "pubsub://PROJECT/SUBSCRIPTION" in malformed.stderr) == (2, True)


def test_subscription_without_policies_logs_warnings(worker: Worker, emulator: Emulator) -> None:
    """Each missing policy is logged at startup."""
    process = worker.start("run", env=on(Subscription(emulator, bare=True)))
    wait_for(lambda: events_named(worker, "started"))
    stop(process)
    reasons = [line["reason"] for line in events_named(worker, "queue_warning")]
    assert ["dead-letter policy" in reasons[0], "retry policy" in reasons[1], len(reasons)] == [True, True, 2]


@pytest.mark.timeout(400)
@pytest.mark.skipif(os.environ.get("CI") != "true", reason="takes three minutes: CI=true make test")
def test_long_outages_and_a_killed_worker(emulator: Emulator, tmp_path: Path) -> None:
    """The scenarios run concurrently because each takes minutes: outages of 45 s and 120 s, and kill -9."""
    scenarios: list[Callable[[Scene], None]] = [outage_45, outage_120, killed]
    with ThreadPoolExecutor(len(scenarios)) as pool:
        for result in [pool.submit(_play, scene, emulator, tmp_path) for scene in scenarios]:
            result.result()


class Scene:
    """A worker with its own subscription, and a network to the emulator that can fail."""

    def __init__(self, sandbox: Sandbox, emulator: Emulator, directory: Path) -> None:
        directory.mkdir()
        self.sandbox = sandbox
        self.subscription = Subscription(emulator)
        self.network = Network(emulator)
        self.worker = Worker(sandbox.environment | on(self.subscription, f"127.0.0.1:{self.network.port}"), directory)
        self.workload = Workload(sandbox, 200)


def _play(scene: Callable[[Scene], None], emulator: Emulator, directory: Path) -> None:
    with Sandbox() as sandbox:
        scene(Scene(sandbox, emulator, directory / scene.__name__))


def outage_45(scene: Scene) -> None:
    _outage(scene, 45)


def outage_120(scene: Scene) -> None:
    _outage(scene, 120)


def _outage(scene: Scene, seconds: float) -> None:
    """Publish messages before, during and after an outage. No message is nacked. All arrive soon after the outage."""
    published = scene.workload.bodies
    process = scene.worker.start("run")
    scene.subscription.publish(*published[:100])
    wait_for(lambda: len(scene.sandbox.account.events) > 5)
    scene.network.down()
    scene.subscription.publish(*published[100:150])
    time.sleep(seconds)
    scene.network.up()
    scene.subscription.publish(*published[150:])
    wait_for(lambda: len(settled(scene.worker)) == 200, 100)
    stop(process)
    scene.workload.assert_exactly_once()
    assert {line["outcome"] for line in log_lines(scene.worker.log.read_text())} <= {"sent", "ignored"}
    assert scene.subscription.dead_letters(wait=1) == []


def killed(scene: Scene) -> None:
    """The next worker receives the messages of the killed worker when their leases expire."""
    scene.sandbox.klaviyo.latency = 0.05
    scene.subscription.publish(*scene.workload.bodies)
    process = scene.worker.start("run")
    wait_for(lambda: len(scene.sandbox.account.events) > 20)
    process.kill()
    process.wait()
    assert not scene.workload.is_done()
    process = scene.worker.start("run")
    wait_for(scene.workload.is_done, 100)
    stop(process)
    scene.workload.assert_exactly_once()
    assert scene.subscription.dead_letters(wait=1) == []
