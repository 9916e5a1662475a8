"""Runs one scenario on one queue with the installed worker, and measures what became of every message."""

from __future__ import annotations

import json
import random
import signal
import time
from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from tests.acceptance.conftest import NOT_MEASURED, Worker
from tests.acceptance.workload import Sent, Workload
from tests.rigs import RIGS
from worker.sandbox import Fault, Sandbox
from worker.sandbox.commercetools.shop import uid
from worker.sandbox.klaviyo.account import Account
from worker.sandbox.notifications import bare, message, sns

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from tests.rigs.base import Rig
    from worker.sandbox.server import Server

PATIENCE = 45.0  # seconds until everything must be settled, once a scenario has done its worst
QUIET = 3.0  # seconds without a line in the log after which a worker on a queue that cannot tell has finished
SHOWN = 12  # names in a message
AHEAD = timedelta(seconds=5)  # by which commercetools' clock is ahead where what it made is not readable yet
SETTINGS = {
    "KLAVIYO_WORKER_CONNECT_TIMEOUT": "1",
    "KLAVIYO_WORKER_READ_TIMEOUT": "1",
    "KLAVIYO_WORKER_RETRY_TIMEOUT": "0.3",
    "KLAVIYO_WORKER_PARK_RETRY_INTERVAL": "0.5",
    "KLAVIYO_WORKER_OUTAGE_HOLD": "60",
    "KLAVIYO_WORKER_HTTP_PORT": "0",
    "KLAVIYO_WORKER_DEAD_LETTER_MODE": "direct",
    "KLAVIYO_WORKER_MAX_BATCH": "10",  # so that a fault meets some batches and spares others
    "KLAVIYO_WORKER_MAX_IN_FLIGHT": "40",
    "KLAVIYO_WORKER_LOG_FORMAT": "json",
    **NOT_MEASURED,
}


@dataclass(frozen=True, slots=True)
class Scenario:
    """What goes wrong.

    `refused`: orders that Klaviyo never takes. `fresh`: orders not in the shop yet when their messages come.
    `costless`: the queues on which no message may need more than one delivery. `kills`: whether workers are killed.
    `size`: good messages, where it matters.
    """

    name: str
    script: Callable[[Stage], None]
    refused: Sequence[int] = ()
    fresh: bool = False
    costless: Sequence[str] = tuple(RIGS)
    kills: bool = False
    queues: Sequence[str] = tuple(RIGS)
    size: int = 0
    sandbox: Mapping[str, Any] = field(default_factory=dict)
    job_seconds: float = 0.0  # that Klaviyo's bulk jobs take
    settings: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Result:
    """What became of the messages: the names of those with which something is wrong."""

    scenario: str
    queue: str
    messages: int
    lost: Sequence[str]  # neither an effect, nor in the queue, nor a dead letter
    doubled: Sequence[str]  # effects that are there twice, or that no message asked for
    dead_lettered_wrongly: Sequence[str]  # good ones that are dead letters, bad ones that are not
    unfinished: Sequence[str]  # still in the queue
    extra_attempts: int  # deliveries beyond the first, of all messages

    @property
    def is_right(self) -> bool:
        """Tell whether every message came to its right end."""
        return not (self.lost or self.doubled or self.dead_lettered_wrongly or self.unfinished)

    def __str__(self) -> str:
        names = {
            "lost": self.lost,
            "doubled": self.doubled,
            "dead-lettered wrongly": self.dead_lettered_wrongly,
            "still in the queue": self.unfinished,
        }
        wrong = [f"{what} ({len(which)}): {_listed(which)}" for what, which in names.items() if which]
        return (
            f"{self.scenario} on {self.queue}: {'; '.join(wrong) or 'all well'}; extra attempts {self.extra_attempts}"
        )


class Stage:
    """What a scenario's script acts on: the services, the queue, the messages, the workers."""

    def __init__(self, scenario: Scenario, queue: Rig, sandbox: Sandbox, directory: Path, size: int) -> None:
        self.sandbox = sandbox
        self.random = random.Random(scenario.name)
        created_at = (datetime.now(UTC) + AHEAD).isoformat() if scenario.fresh else "2026-11-23T10:00:00.123Z"
        self.load = Workload(sandbox, size, created_at=created_at)
        self.queue = queue
        self._directory = directory
        self._settings = SETTINGS | dict(scenario.settings)
        self._running: list[subprocess.Popen[bytes]] = []
        self.logs: list[Path] = []
        self._failing: dict[str, int] = {}  # faults met so far, by service, when it began to fail
        self._always = [fault for number in scenario.refused for fault in _refusing(f"order-{number}")]
        self.bad = [*_poison(sandbox), *self.load.remove(f"order-{number}" for number in scenario.refused)]
        self.messages = [*self.load.messages, *self.bad]
        self.random.shuffle(self.messages)
        self._unpublished = list(self.messages)
        sandbox.klaviyo.faults.add(*self._always)

    def publish(self, share: float = 1.0) -> None:
        """Publish a share of the messages, or what is left of them."""
        count = round(share * len(self.messages))
        self.queue.publish([sent.body for sent in self._unpublished[:count]])
        del self._unpublished[:count]

    def start(self, **settings: str) -> None:
        """Start a worker; there may be several."""
        directory = self._directory / f"worker-{len(self.logs) + 1}"
        directory.mkdir(parents=True)
        worker = Worker(self.sandbox.environment | self.queue.environment | self._settings | settings, directory)
        self._running.append(worker.start("run"))
        self.logs.append(worker.log)

    def all_up(self) -> None:
        """Wait until every worker has begun: before that a signal finds a program that is still being loaded."""
        deadline = time.monotonic() + 30
        logs = self.logs[-len(self._running) :]
        while any("started" not in log.read_text() for log in logs) and time.monotonic() < deadline:
            self.wait(0.05)

    def wait(self, seconds: float) -> None:
        """Let time pass. A worker that ends meanwhile has failed."""
        time.sleep(seconds)
        self._check_running()

    def under_way(self, service: str = "klaviyo", requests: int = 5) -> None:
        """Wait until the service has had so many requests more; not for ever, as there may be nothing to do."""
        wanted = len(self._server(service).requests) + requests
        deadline = time.monotonic() + 15
        while len(self._server(service).requests) < wanted and time.monotonic() < deadline and not self._is_settled():
            self.wait(0.02)

    def fail(self, service: str, *faults: Fault) -> None:
        """Have a service fail from now on; without faults, refuse connections."""
        server = self._server(service)
        self._failing[service] = server.faults.triggered
        if faults:
            server.faults.add(*faults)
        else:
            server.stop()

    def mend(self, service: str) -> None:
        """Have a service work again. Records that it never takes stay refused."""
        server = self._server(service)
        self._failing.pop(service, None)
        server.faults.clear()
        if service == "klaviyo":
            server.faults.add(*self._always)
        server.start()

    def until_met(self) -> None:
        """Wait until a request meets a service that fails: a scenario whose fault met nothing shows nothing.

        Of two services one will do: what cannot be read from the first is never sent to the second.
        """
        deadline = time.monotonic() + 20
        while all(self._server(name).faults.triggered == met for name, met in self._failing.items()):
            assert time.monotonic() < deadline, "no request met the fault"
            self.wait(0.02)

    def until_said(self, word: str) -> None:
        """Wait until a worker's log holds the word."""
        deadline = time.monotonic() + 20
        while not any(word in log.read_text() for log in self.logs):
            assert time.monotonic() < deadline, f"no worker said {word}"
            self.wait(0.02)

    def kill(self) -> None:
        """Kill -9 the worker that was started first."""
        process = self._running.pop(0)
        process.kill()
        process.wait()
        self.queue.worker_died()

    def terminate(self) -> None:
        """Send SIGTERM to the worker that was started first; it must end in order."""
        self.all_up()
        process = self._running.pop(0)
        process.send_signal(signal.SIGTERM)
        try:
            code = process.wait(40)
        finally:
            process.kill()
        assert code == 0, f"a worker exited with {code} on SIGTERM; {self._tail()}"

    def finish(self) -> None:
        """Wait until every message is settled, but not for ever, and stop all workers in order."""
        deadline = time.monotonic() + PATIENCE
        while not self._is_settled() and time.monotonic() < deadline:
            self.wait(0.1)
        while self._running:
            self.terminate()

    def abandon(self) -> None:
        """Let nothing run on, whatever happened."""
        while self._running:
            process = self._running.pop()
            process.kill()
            process.wait()
        self.queue.close()

    def measure(self, scenario: str, queue: str) -> Result:
        """Return what became of the messages, once no worker runs."""
        left = Counter(self.queue.left())
        dead = Counter(self._dead_letters(len(self.bad)))
        bad, missing = {sent.body for sent in self.bad}, self.load.missing()
        buried_good = [sent.name for sent in self.load.messages if dead[sent.body]]
        unburied = [sent.name for sent in self.bad if not dead[sent.body]]
        vanished = [sent for sent in (*missing, *self.bad) if not left[sent.body] and not dead[sent.body]]
        return Result(
            scenario,
            queue,
            len(self.messages),
            lost=[sent.name for sent in vanished],
            doubled=[f"{kind} {name}" for kind, name in self.load.surplus()],
            dead_lettered_wrongly=[*buried_good, *unburied],
            unfinished=[sent.name for sent in self.messages if left[sent.body] and sent.body not in bad],
            extra_attempts=sum(attempts - 1 for attempts in self._attempts().values()),
        )

    def _server(self, service: str) -> Server:
        return {"klaviyo": self.sandbox.klaviyo, "commercetools": self.sandbox.commercetools}[service]

    def _check_running(self) -> None:
        for process in self._running:
            assert process.poll() is None, f"a worker ended by itself with {process.returncode}; {self._tail()}"

    def _is_settled(self) -> bool:
        """Tell whether the workers have nothing more to do."""
        if self._unpublished:
            return False
        empty = self.queue.is_empty()
        if empty is not None:
            return empty
        if self.load.missing() or len(set(self._dead_letters())) < len(self.bad):
            return False
        return len(self._settled()) == len(self.messages) or self._is_quiet()

    def _dead_letters(self, at_least: int = 0) -> list[bytes]:
        return [letter.body for letter in self.queue.dead_letters(at_least)]

    def _is_quiet(self) -> bool:
        return time.time() - max(log.stat().st_mtime for log in self.logs) > QUIET

    def _settled(self) -> set[str]:
        ends = {"sent", "ignored", "dead_lettered"}
        return {line["message_id"] for line in self._lines() if line["outcome"] in ends}

    def _attempts(self) -> dict[str, int]:
        highest: dict[str, int] = {}
        for line in self._lines():
            highest[line["message_id"]] = max(highest.get(line["message_id"], 1), line["attempt"] or 1)
        return highest

    def _lines(self) -> list[dict[str, Any]]:
        """Return the canonical lines of all workers; a killed one may have left half a line."""
        whole = [line for log in self.logs for line in log.read_text().splitlines() if line[:1] + line[-1:] == "{}"]
        return [entry for entry in map(json.loads, whole) if entry["event"] == "message_processed"]

    def _tail(self) -> str:
        return "the end of its log: " + " | ".join(self.logs[-1].read_text().splitlines()[-5:])


def run(scenario: Scenario, name: str, queue: Rig, directory: Path, size: int) -> Result:
    """Run a scenario with about `size` messages on the queue called `name`. The workers' logs stay in `directory`."""
    account = Account(job_seconds=scenario.job_seconds)
    with Sandbox(account=account, **{"latency": 0.01} | dict(scenario.sandbox)) as sandbox:
        stage = Stage(scenario, queue, sandbox, directory, scenario.size or size)
        try:
            scenario.script(stage)
            stage.publish()
            stage.finish()
            return stage.measure(scenario.name, name)
        finally:
            stage.abandon()


def _listed(names: Sequence[str]) -> str:
    return ", ".join([*names[:SHOWN], *(["…"] if len(names) > SHOWN else [])])


def _refusing(order: str) -> list[Fault]:
    """Return the faults of a Klaviyo that takes nothing about an order, and does not say which record it means."""
    body = b'{"errors": [{"status": 400, "code": "invalid", "title": "Invalid input.", "detail": "As asked for."}]}'
    endpoints = ("POST /api/events", "POST /api/event-bulk-create-jobs")
    quoted = f'"{order}"'.encode()
    return [Fault(status=400, times=None, match=match, contains=quoted, body=body) for match in endpoints]


def _poison(sandbox: Sandbox) -> list[Sent]:
    """Return messages that no attempt can help."""
    order = sandbox.shop.orders[uid("order:anonymous")]
    anonymous = message("OrderCreated", "order", order["id"], order=order)
    again = message("OrderCreated", "order", order["id"], sequence=2, order=order)
    return [
        Sent("unreadable JSON", b'{"notificationType": "Message", "torn', frozenset()),
        Sent("JSON of something else", b'{"hello": "world"}', frozenset()),
        Sent("an order without a customer", bare(anonymous), frozenset()),
        Sent("an order without a customer, by SNS", sns(again), frozenset()),
    ]
