"""Runs one scenario on one queue with the installed worker, and determines the outcome of every message."""

from __future__ import annotations

import json
import math
import random
import re
import signal
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any

from tests.acceptance.conftest import Worker
from tests.acceptance.workload import Sent, Workload
from tests.rigs import RIGS
from worker.sandbox import Fault, Sandbox
from worker.sandbox.carts import METRICS
from worker.sandbox.commercetools.shop import uid
from worker.sandbox.envelopes import bare, sns
from worker.sandbox.klaviyo.account import Account
from worker.sandbox.notifications import message

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from tests.acceptance.conftest import Process
    from tests.rigs.base import Rig
    from worker.sandbox.server import Server

SETTLE_TIMEOUT = 180.0  # seconds after the last fault within which all messages, also returned ones, must be settled
IDLE_TIMEOUT = 3.0  # seconds without a log line after which a worker counts as done if the queue reports no backlog
MAX_NAMES = 12  # in an assertion message
SETTINGS = {
    "KLAVIYO_WORKER_CONNECT_TIMEOUT": "1",
    "KLAVIYO_WORKER_READ_TIMEOUT": "1",
    "KLAVIYO_WORKER_RETRY_TIMEOUT": "0.3",
    "KLAVIYO_WORKER_PARK_RETRY_INTERVAL": "0.5",
    "KLAVIYO_WORKER_OUTAGE_HOLD": "60",
    "KLAVIYO_WORKER_JOB_TIMEOUT": "5",
    "KLAVIYO_WORKER_HTTP_PORT": "0",
    "KLAVIYO_WORKER_DEAD_LETTER_MODE": "direct",
    "KLAVIYO_WORKER_MAX_BATCH": "10",  # so that a fault affects some batches only
    "KLAVIYO_WORKER_MAX_IN_FLIGHT": "40",
    "KLAVIYO_WORKER_LOG_FORMAT": "json",
}


@dataclass(frozen=True, slots=True)
class Scenario:
    """A sequence of faults.

    `rejected_orders`: the orders that Klaviyo always rejects, or that a firewall blocks if `blocks` is True.
    `no_extra_attempts`: the queues on which every message must need one delivery only. `kills`: workers are killed.
    `size`: the number of good messages, if it matters. `bombs`: bad messages that cost much. `memory_limit`: bytes;
    a worker that uses more is killed, like by the kernel in a pod.
    """

    name: str
    script: Callable[[ScenarioDriver], None]
    rejected_orders: Sequence[int] = ()
    blocks: bool = False
    no_extra_attempts: Sequence[str] = tuple(RIGS)
    kills: bool = False
    queues: Sequence[str] = tuple(RIGS)
    size: int = 0
    bombs: Sequence[bytes] = ()
    memory_limit: float = math.inf
    sandbox: Mapping[str, Any] = field(default_factory=dict)
    job_seconds: float = 0.0  # duration of Klaviyo's bulk jobs
    settings: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Result:
    """The names of messages with a wrong outcome."""

    scenario: str
    queue: str
    messages: int
    lost: Sequence[str]  # without an effect, not on the queue, not a dead letter
    duplicated: Sequence[str]  # effects that appear twice or that no message causes
    dead_lettered_wrongly: Sequence[str]  # good messages that are dead letters, bad messages that are not
    unfinished: Sequence[str]  # still on the queue
    extra_attempts: int  # deliveries beyond the first, for all messages

    @property
    def is_correct(self) -> bool:
        """Return whether every message has its expected outcome."""
        return not (self.lost or self.duplicated or self.dead_lettered_wrongly or self.unfinished)

    def __str__(self) -> str:
        names = {
            "lost": self.lost,
            "duplicated": self.duplicated,
            "dead-lettered wrongly": self.dead_lettered_wrongly,
            "still in the queue": self.unfinished,
        }
        wrong = [f"{what} ({len(which)}): {_join_names(which)}" for what, which in names.items() if which]
        return (
            f"{self.scenario} on {self.queue}: {'; '.join(wrong) or 'all well'}; extra attempts {self.extra_attempts}"
        )


class ScenarioDriver:
    """The services, queue, messages and workers that a scenario's script controls."""

    def __init__(self, scenario: Scenario, queue: Rig, sandbox: Sandbox, directory: Path, size: int) -> None:
        self.sandbox = sandbox
        self.random = random.Random(scenario.name)
        self.workload = Workload(sandbox, size, has_carts=True)
        self.queue = queue
        self._directory = directory
        mapping = directory / "mapping.toml"
        mapping.write_text("".join(["[metrics]\n", *(f'{key} = "{name}"\n' for key, name in METRICS.items())]))
        self._settings = SETTINGS | dict(scenario.settings) | {"KLAVIYO_WORKER_CONFIG": str(mapping)}
        self._memory_limit = scenario.memory_limit
        self._running: list[Process] = []
        self.logs: list[Path] = []
        self._failing: dict[str, int] = {}  # by service: faults triggered before it started to fail
        self._permanent_faults = [
            fault
            for number in scenario.rejected_orders
            for fault in _rejecting(f"order-{number}", by_firewall=scenario.blocks)
        ]
        self.bad = [
            *_poison_messages(sandbox),
            *self.workload.remove(f"order-{number}" for number in scenario.rejected_orders),
            *(Sent(f"bomb {number}", body, frozenset()) for number, body in enumerate(scenario.bombs)),
        ]
        self.messages = [*self.workload.messages, *self.bad]
        self.random.shuffle(self.messages)
        self._unpublished = list(self.messages)
        sandbox.klaviyo.faults.add(*self._permanent_faults)

    def publish(self, share: float = 1.0) -> None:
        """Publish a share of all messages, or the rest if it is smaller."""
        count = round(share * len(self.messages))
        self.queue.publish([sent.body for sent in self._unpublished[:count]])
        del self._unpublished[:count]

    def start(self, **settings: str) -> None:
        """Start a worker, in addition to those running."""
        directory = self._directory / f"worker-{len(self.logs) + 1}"
        directory.mkdir(parents=True)
        environment = self.sandbox.environment | self.queue.environment | self._settings | settings
        is_forked = self._memory_limit == math.inf  # a fork starts with the memory of the clients of all queues
        worker = Worker(environment, directory, is_forked=is_forked)
        process = worker.start("run")
        if self._memory_limit < math.inf:
            Thread(target=_kill_beyond, args=(process, self._memory_limit), daemon=True).start()
        self._running.append(process)
        self.logs.append(worker.log)

    def wait_until_started(self) -> None:
        """Wait until every worker has started. Before that, a signal would hit the Python interpreter."""
        deadline = time.monotonic() + 60
        logs = self.logs[-len(self._running) :]
        while any("started" not in log.read_text() for log in logs) and time.monotonic() < deadline:
            self.wait(0.05)

    def wait(self, seconds: float) -> None:
        """Wait. Fail if a worker exits in the meantime."""
        time.sleep(seconds)
        self._check_running()

    def wait_for_requests(self, service: str = "klaviyo", requests: int = 5) -> None:
        """Wait until the service received `requests` more requests, all messages are settled, or 15 seconds passed."""
        wanted = len(self._server(service).requests) + requests
        deadline = time.monotonic() + 15
        while len(self._server(service).requests) < wanted and time.monotonic() < deadline and not self._is_settled():
            self.wait(0.02)

    def fail(self, service: str, *faults: Fault) -> None:
        """Make a service fail. Without faults, it refuses connections."""
        server = self._server(service)
        self._failing[service] = server.faults.triggered
        if faults:
            server.faults.add(*faults)
        else:
            server.stop()

    def restore(self, service: str) -> None:
        """Make a service work again. It still rejects the orders of `rejected_orders`."""
        server = self._server(service)
        self._failing.pop(service, None)
        server.faults.clear()
        if service == "klaviyo":
            server.faults.add(*self._permanent_faults)
        server.start()

    def wait_until_fault_met(self) -> None:
        """Wait until a fault affects a request of any failing service.

        If both services fail, a fault of one service is enough: a message whose data cannot be read is never sent.
        """
        deadline = time.monotonic() + 60
        while all(self._server(name).faults.triggered == met for name, met in self._failing.items()):
            assert time.monotonic() < deadline, "the fault affected no request"
            self.wait(0.02)

    def wait_for_log(self, word: str) -> None:
        """Wait until the log of a worker contains the word."""
        deadline = time.monotonic() + 60
        while not any(word in log.read_text() for log in self.logs):
            assert time.monotonic() < deadline, f"no log contains {word}"
            self.wait(0.02)

    def kill(self) -> None:
        """Kill the worker that was started first."""
        process = self._running.pop(0)
        process.kill()
        process.wait()
        self.queue.expire_leases_of_killed()

    def terminate(self) -> None:
        """Send SIGTERM to the worker that was started first. It must exit with 0."""
        self.wait_until_started()
        process = self._running.pop(0)
        process.send_signal(signal.SIGTERM)
        try:
            code = process.wait(40)
        finally:
            process.kill()
        assert code == 0, f"a worker exited with {code} on SIGTERM; {self._log_tail()}"

    def finish(self) -> None:
        """Wait until every message is settled or the timeout is over, and terminate all workers."""
        deadline = time.monotonic() + SETTLE_TIMEOUT
        while not self._is_settled() and time.monotonic() < deadline:
            self.wait(0.1)
        while self._running:
            self.terminate()

    def clean_up(self) -> None:
        """Kill all workers and close the queue."""
        while self._running:
            process = self._running.pop()
            process.kill()
            process.wait()
        self.queue.close()

    def measure(self, scenario: str, queue: str) -> Result:
        """Return the outcomes. No worker must be running."""
        remaining = Counter(self.queue.unsettled())
        dead = Counter(self._dead_letters(len(self.bad)))
        bad, missing = {sent.body for sent in self.bad}, self.workload.missing()
        wrongly_dead_lettered = [sent.name for sent in self.workload.messages if dead[sent.body]]
        not_dead_lettered = [sent.name for sent in self.bad if not dead[sent.body]]
        lost = [sent for sent in (*missing, *self.bad) if not remaining[sent.body] and not dead[sent.body]]
        return Result(
            scenario,
            queue,
            len(self.messages),
            lost=[sent.name for sent in lost],
            duplicated=[f"{kind} {name}" for kind, name in self.workload.surplus()],
            dead_lettered_wrongly=[*wrongly_dead_lettered, *not_dead_lettered],
            unfinished=[sent.name for sent in self.messages if remaining[sent.body] and sent.body not in bad],
            extra_attempts=sum(attempts - 1 for attempts in self._attempts().values()),
        )

    def _server(self, service: str) -> Server:
        return {"klaviyo": self.sandbox.klaviyo, "commercetools": self.sandbox.commercetools}[service]

    def _check_running(self) -> None:
        for process in self._running:
            assert process.poll() is None, f"a worker exited with {process.returncode}; {self._log_tail()}"

    def _is_settled(self) -> bool:
        """Return whether all messages are settled."""
        if self._unpublished:
            return False
        empty = self.queue.is_empty()
        if empty is not None:
            return empty
        if self.workload.missing() or len(set(self._dead_letters())) < len(self.bad):
            return False
        return len(self._settled()) == len(self.messages) or self._is_idle()

    def _dead_letters(self, at_least: int = 0) -> list[bytes]:
        return [dead_letter.body for dead_letter in self.queue.dead_letters(at_least)]

    def _is_idle(self) -> bool:
        return time.time() - max(log.stat().st_mtime for log in self.logs) > IDLE_TIMEOUT

    def _settled(self) -> set[str]:
        outcomes = {"sent", "ignored", "dead_lettered"}
        return {line["message_id"] for line in self._lines() if line["outcome"] in outcomes}

    def _attempts(self) -> dict[str, int]:
        highest: dict[str, int] = {}
        for line in self._lines():
            highest[line["message_id"]] = max(highest.get(line["message_id"], 1), line["attempt"] or 1)
        return highest

    def _lines(self) -> list[dict[str, Any]]:
        """Return the canonical log lines of all workers. A killed worker can leave a truncated line."""
        complete = [line for log in self.logs for line in log.read_text().splitlines() if line[:1] + line[-1:] == "{}"]
        return [entry for entry in map(json.loads, complete) if entry["event"] == "message_processed"]

    def _log_tail(self) -> str:
        return "the end of its log: " + " | ".join(self.logs[-1].read_text().splitlines()[-5:])


def run(scenario: Scenario, name: str, queue: Rig, directory: Path, size: int) -> Result:
    """Run a scenario with about `size` messages on the queue `name`. The workers' logs stay in `directory`."""
    account = Account(job_seconds=scenario.job_seconds)
    with Sandbox(account=account, **{"latency": 0.01} | dict(scenario.sandbox)) as sandbox:
        driver = ScenarioDriver(scenario, queue, sandbox, directory, scenario.size or size)
        try:
            scenario.script(driver)
            driver.publish()
            driver.finish()
            return driver.measure(scenario.name, name)
        finally:
            driver.clean_up()


def _kill_beyond(process: Process, memory_limit: float) -> None:
    """Kill a process when its memory has exceeded the limit. Return when it has ended."""
    while process.poll() is None:
        if _peak_memory(process.pid) > memory_limit:
            process.kill()
        time.sleep(0.02)


def _peak_memory(pid: int) -> float:
    """Return the highest number of bytes of memory that a process has used so far; 0 if it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0.0
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    return int(found[1]) * 1024 if found else 0.0


def _join_names(names: Sequence[str]) -> str:
    return ", ".join([*names[:MAX_NAMES], *(["…"] if len(names) > MAX_NAMES else [])])


def _rejecting(order: str, *, by_firewall: bool) -> list[Fault]:
    """Return faults that reject all events of an order: with Klaviyo's error without a pointer, or with a page."""
    error = b'{"errors": [{"status": 400, "code": "invalid", "title": "Invalid input.", "detail": "As requested."}]}'
    status, body = (403, b"<!DOCTYPE html><title>Blocked</title>") if by_firewall else (400, error)
    endpoints = ("POST /api/events", "POST /api/event-bulk-create-jobs")
    quoted = f'"{order}"'.encode()
    return [Fault(status=status, times=None, match=match, contains=quoted, body=body) for match in endpoints]


def _poison_messages(sandbox: Sandbox) -> list[Sent]:
    """Return messages that can never succeed."""
    order = sandbox.shop.orders[uid("order:anonymous")]
    anonymous = message("OrderCreated", "order", order["id"], order=order)
    repeated = message("OrderCreated", "order", order["id"], sequence=2, order=order)
    return [
        Sent("unreadable JSON", b'{"notificationType": "Message", "trunc', frozenset()),
        Sent("JSON of something else", b'{"hello": "world"}', frozenset()),
        Sent("an order without a customer", bare(anonymous), frozenset()),
        Sent("an order without a customer, by SNS", sns(repeated), frozenset()),
    ]
