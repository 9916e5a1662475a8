"""The rows: each runs sandbox and worker anew and returns its figures, with units in their names."""

from __future__ import annotations

import math
import random
import socket
import tempfile
import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import urllib3

from benchmarks.messages import FAT_ORDERS, ORDERS
from benchmarks.processes import BenchmarkError, Worker, sandbox, wait_settled
from benchmarks.queues import opened

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from benchmarks.messages import Kind
    from benchmarks.processes import Sandbox
    from benchmarks.queues import Queue

Row = dict[str, Any]

RAISED = 10  # times Klaviyo's documented limits
DRAINED = 25_000  # orders
SHARED, WORKERS = 75_000, 4  # orders for two minutes at the ceiling
FAT_WAITING = 25_000  # messages
LIMITED_LATENCY = 50  # ms
CEILING = 150 * 1_000 / 60  # events a second: bulk calls a minute, events in each
SINGLE = 50  # messages
_BULK, _EVENTS = "/api/event-bulk-create-jobs", "/api/events"
_ACCEPTED = 202


@dataclass(frozen=True, slots=True)
class Throughput:
    """Messages of one kind, waiting when the worker starts."""

    kind: Kind
    latency_ms: float
    queue: str
    messages: int
    table = "throughput"

    @property
    def name(self) -> str:
        """Return what the row is about."""
        return self.kind.name

    def measure(self) -> Row:
        """Drain the queue once."""
        with _scene(self.latency_ms, copies=self.messages, factor=RAISED, queue=self.queue) as scene:
            usage, worker = scene.drain(self.kind, self.messages)
            seconds = max(each.at for each in worker.settled) - worker.started
            calls = {f"{name}_calls": scene.sandbox.calls(name) for name in ("klaviyo", "commercetools")}
            refused = scene.sandbox.calls("klaviyo", "429")
        ages = [each.age for each in worker.settled]
        return {
            "queue": self.queue,
            "latency_ms": self.latency_ms,
            "messages": self.messages,
            "messages_per_s": self.messages / seconds,
            "seconds": seconds,
            "cpu_ms_per_message": usage.cpu / self.messages * 1000,
            "cpu_s": usage.cpu,
            **{f"{name}_per_message": count / self.messages for name, count in calls.items()},
            **calls,
            "klaviyo_calls_answered_429": refused,
            "start_up_s": worker.started - worker.spawned,
            "peak_rss_mb": usage.peak_rss,
            "age_p50_s": percentile(ages, 0.5),
            "age_p99_s": percentile(ages, 0.99),
            "retried": worker.retried,
        }


@dataclass(frozen=True, slots=True)
class Drain:
    """A backlog of orders under Klaviyo's documented limits, by one worker or by several on one queue."""

    name: str
    messages: int
    workers: int
    latency_ms: float = LIMITED_LATENCY
    queue: str = "embedded"
    table = "limits"

    def measure(self) -> Row:
        """Drain the queue once."""
        with _scene(self.latency_ms, factor=1) as scene:
            scene.queue.publish(ORDERS.bodies(self.messages))
            with ExitStack() as stack:
                ports = [_free_port() for _ in range(self.workers)]
                workers = [stack.enter_context(scene.worker(ORDERS, port)) for port in ports]
                wait_settled(workers, self.messages)
                each = [self._process(worker, port) for worker, port in zip(workers, ports, strict=True)]
            scene.check(ORDERS, self.messages)
            added, calls = scene.sandbox.added(), scene.sandbox.calls("klaviyo")
            refused = scene.sandbox.calls("klaviyo", "429")
            log = scene.sandbox.log("klaviyo")
        seconds = max(process.pop("last_settled_at") for process in each) - min(worker.started for worker in workers)
        bulk = [line for line in log if line["path"] == _BULK]
        at = [line["at"] for line in bulk if line["status"] == _ACCEPTED]
        single = sum(line["path"] == _EVENTS and line["status"] == _ACCEPTED for line in log)
        span = max(at) - min(at)
        return {
            "queue": self.queue,
            "latency_ms": self.latency_ms,
            "messages": self.messages,
            "workers": self.workers,
            "seconds": seconds,
            "events_per_s": added["accepted_events"] / seconds,
            "first_to_last_bulk_call_s": span,
            "share_of_ceiling": (added["accepted_events"] - single) / span / CEILING,
            "bulk_calls": len(bulk),
            "bulk_calls_answered_429": len(bulk) - len(at),
            "events_sent_singly": single,
            "klaviyo_calls": calls,
            "klaviyo_calls_answered_429": refused,
            "share_answered_429": refused / calls,
            "processes": each,
        }

    def _process(self, worker: Worker, port: int) -> Row:
        """Stop a worker and return its part in it."""
        requests, refused = _requests(port)
        settled = [each.at for each in worker.settled]
        usage = worker.stop()
        return {
            "messages": len(settled),
            "klaviyo_requests": requests,
            "klaviyo_requests_answered_429": refused,
            "first_settled_s": min(settled, default=math.inf) - worker.started,
            "cpu_s": usage.cpu,
            "peak_rss_mb": usage.peak_rss,
            "last_settled_at": max(settled, default=worker.started),
        }


@dataclass(frozen=True, slots=True)
class Idle:
    """Single messages to a worker that has nothing else to do; the first, which warms up, does not count."""

    kind: Kind
    latency_ms: float
    queue: str = "embedded"
    messages: int = SINGLE
    table = "idle"

    @property
    def name(self) -> str:
        """Return what the row is about."""
        return f"idle: single {self.kind.name}"

    def measure(self) -> Row:
        """Publish one by one and time each from before that to its line in the log."""
        pause = random.Random(self.messages)
        spans: list[tuple[float, float]] = []
        with (
            _scene(self.latency_ms, copies=self.messages + 1, factor=RAISED) as scene,
            scene.worker(self.kind) as worker,
        ):
            bodies = self.kind.bodies(self.messages + 1)
            scene.queue.publish(islice(bodies, 1))
            wait_settled([worker], 1)
            scene.sandbox.begin()
            for count, body in enumerate(bodies, 2):
                time.sleep(pause.uniform(0.05, 0.15))  # the queue is polled at even intervals: meet all of them
                began = time.time()
                scene.queue.publish([body])
                wait_settled([worker], count, poll=0.005)
                spans.append((began, worker.settled[-1].at))
            usage = worker.stop()
            services = ("klaviyo", "commercetools")
            calls = sum(scene.sandbox.calls(service) for service in services)
            answers = sorted(line["at"] for service in services for line in scene.sandbox.log(service))
        took = [(end - began) * 1000 for began, end in spans]
        waits = [waited(answers, span, self.latency_ms / 1000) * 1000 for span in spans]
        return {
            "queue": self.queue,
            "latency_ms": self.latency_ms,
            "messages": self.messages,
            "publish_to_processed_p50_ms": percentile(took, 0.5),
            "publish_to_processed_p99_ms": percentile(took, 0.99),
            "of_it_latency_of_calls_p50_ms": percentile(waits, 0.5),
            "of_it_latency_of_calls_p99_ms": percentile(waits, 0.99),
            "calls_per_message": calls / self.messages,
            "cpu_s": usage.cpu,
        }


@dataclass(frozen=True, slots=True)
class Memory:
    """A backlog of large messages, and what the worker holds of it."""

    name: str = "memory: orders of 50 KB"
    messages: int = FAT_WAITING
    latency_ms: float = LIMITED_LATENCY
    queue: str = "embedded"
    table = "memory"

    def measure(self) -> Row:
        """Run a worker on nothing, then one on the backlog."""
        with _scene(self.latency_ms, factor=RAISED) as scene:
            with scene.worker(FAT_ORDERS) as worker:
                worker.wait_started()
                time.sleep(1)
                idle = worker.stop()
            usage, worker = scene.drain(FAT_ORDERS, self.messages)
        return {
            "queue": self.queue,
            "latency_ms": self.latency_ms,
            "messages": self.messages,
            "peak_rss_without_backlog_mb": idle.peak_rss,
            "peak_rss_with_backlog_mb": usage.peak_rss,
            "messages_per_s": self.messages / (max(each.at for each in worker.settled) - worker.started),
            "cpu_ms_per_message": usage.cpu / self.messages * 1000,
        }


class _Scene:
    """A sandbox and a queue, and a directory for logs."""

    def __init__(self, sandbox: Sandbox, queue: Queue, directory: Path) -> None:
        self.sandbox = sandbox
        self.queue = queue
        self._directory = directory
        self._workers = 0

    def worker(self, kind: Kind, port: int | None = None) -> Worker:
        """Start a worker with default settings; with a port for its metrics where several run."""
        self._workers += 1
        metrics = {} if port is None else {"KLAVIYO_WORKER_HTTP_PORT": str(port)}
        environment = {**self.sandbox.environment, **self.queue.environment, **kind.settings, **metrics}
        return Worker(environment, self._directory / f"worker-{self._workers}.log")

    def drain(self, kind: Kind, messages: int) -> tuple[Any, Worker]:
        """Have a worker settle a backlog; return its usage and itself, ended. Raises BenchmarkError."""
        self.sandbox.fill_catalog(kind.stocked(messages))
        self.sandbox.begin()
        self.queue.publish(kind.bodies(messages))
        with self.worker(kind) as worker:
            wait_settled([worker], messages)
            usage = worker.stop()
        self.check(kind, messages)
        return usage, worker

    def check(self, kind: Kind, messages: int) -> None:
        """Raise BenchmarkError unless the messages had their effect: else nothing was measured."""
        added = self.sandbox.added()
        for name, expected in kind.added(messages).items():
            if added[name] != expected:
                raise BenchmarkError(f"{expected} {name} were expected in Klaviyo, {added[name]} are there")


@contextmanager
def _scene(latency_ms: float, *, factor: int, copies: int = 0, queue: str = "embedded") -> Iterator[_Scene]:
    options = ("--latency", str(latency_ms / 1000), "--rate-limits", str(factor), "--copies", str(copies))
    with (
        tempfile.TemporaryDirectory() as directory,
        sandbox(*options) as running,
        opened(queue, Path(directory)) as filled,
    ):
        yield _Scene(running, filled, Path(directory))


def percentile(values: Sequence[float], share: float) -> float:
    """Return the value that so many are at or below (nearest rank)."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def waited(answers: Sequence[float], span: tuple[float, float], latency: float) -> float:
    """Return the seconds in a span in which at least one call waited for its answer."""
    total, end = 0.0, span[0]
    for answer in answers:
        if span[0] <= answer <= span[1]:
            total += max(0.0, answer - max(end, answer - latency))
            end = max(end, answer)
    return total


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def _requests(port: int) -> tuple[int, int]:
    """Return a worker's requests to Klaviyo, and how many of them were answered with 429."""
    text = urllib3.request("GET", f"http://127.0.0.1:{port}/metrics").data.decode()
    series = [line for line in text.splitlines() if line.startswith("klaviyo_worker_klaviyo_requests_total{")]
    counts = [(int(float(line.rpartition(" ")[2])), 'status="429"' in line) for line in series]
    return sum(count for count, _ in counts), sum(count for count, refused in counts if refused)
