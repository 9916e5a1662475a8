"""The rows of the benchmarks. Each starts a sandbox and a worker, and returns figures with units in their names."""

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

from benchmarks.messages import FORMER_NAME, LARGE_ORDERS, ORDERS
from benchmarks.processes import BenchmarkError, Worker, sandbox, wait_until_settled
from benchmarks.queues import open_queue

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from benchmarks.messages import MessageKind
    from benchmarks.processes import Sandbox
    from benchmarks.queues import Queue

Row = dict[str, Any]

RATE_LIMIT_FACTOR = 10  # of Klaviyo's documented rate limits
DRAIN_ORDERS = 25_000  # orders
SINGLE_ORDERS = 1_750  # orders whose events are sent individually, for two minutes at Klaviyo's maximum
SHARED_ORDERS, SHARED_WORKERS = 75_000, 4  # orders for two minutes at Klaviyo's maximum
LARGE_BACKLOG = 25_000  # messages
LIMITED_LATENCY = 50  # ms
MAX_BULK_EVENTS_PER_SECOND = 150 * 1_000 / 60  # bulk calls per minute * events per call / 60
MAX_EVENTS_PER_SECOND = 3_500 / 60  # events per minute / 60
IDLE_MESSAGES = 50  # messages
_BULK, _EVENTS = "/api/event-bulk-create-jobs", "/api/events"
_ACCEPTED = 202


@dataclass(frozen=True, slots=True)
class Throughput:
    """A backlog of messages of one kind."""

    kind: MessageKind
    latency_ms: float
    queue: str
    messages: int
    table = "throughput"

    @property
    def name(self) -> str:
        """Return the name of the row."""
        return self.kind.name

    def measure(self) -> Row:
        """Drain the queue."""
        with _test_bed(
            self.latency_ms,
            copies=self.messages,
            factor=RATE_LIMIT_FACTOR,
            queue=self.queue,
            has_verdict=self.kind.has_verdict,
        ) as test_bed:
            usage, worker = test_bed.drain(self.kind, self.messages)
            seconds = max(settled.at for settled in worker.settled) - worker.started
            calls = {f"{name}_calls": test_bed.sandbox.calls(name) for name in ("klaviyo", "commercetools")}
            throttled = test_bed.sandbox.calls("klaviyo", "429")
        ages = [settled.age for settled in worker.settled]
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
            "klaviyo_calls_answered_429": throttled,
            "start_up_s": worker.started - worker.spawned,
            "peak_rss_mb": usage.peak_rss,
            "age_p50_s": percentile(ages, 0.5),
            "age_p99_s": percentile(ages, 0.99),
            "retried": worker.retried,
        }


@dataclass(frozen=True, slots=True)
class Drain:
    """A backlog of orders with Klaviyo's documented rate limits, and one or several workers on one queue."""

    name: str
    messages: int
    workers: int
    has_verdict: bool = True
    latency_ms: float = LIMITED_LATENCY
    queue: str = "embedded"
    table = "limits"

    def measure(self) -> Row:
        """Drain the queue."""
        with _test_bed(self.latency_ms, factor=1, has_verdict=self.has_verdict) as test_bed:
            test_bed.queue.publish(ORDERS.bodies(self.messages))
            with ExitStack() as stack:
                ports = [_free_port() for _ in range(self.workers)]
                workers = [stack.enter_context(test_bed.worker(port)) for port in ports]
                wait_until_settled(workers, self.messages)
                processes = [self._stop(worker, port) for worker, port in zip(workers, ports, strict=True)]
            test_bed.check(ORDERS, self.messages)
            added, calls = test_bed.sandbox.added(), test_bed.sandbox.calls("klaviyo")
            throttled = test_bed.sandbox.calls("klaviyo", "429")
            log = test_bed.sandbox.log("klaviyo")
        last_settled_at = max(process.pop("last_settled_at") for process in processes)
        seconds = last_settled_at - min(worker.started for worker in workers)
        bulk = [line for line in log if line["path"] == _BULK]
        accepted_at = {
            path: [line["at"] for line in log if line["path"] == path and line["status"] == _ACCEPTED]
            for path in (_BULK, _EVENTS)
        }
        single = len(accepted_at[_EVENTS])
        in_bulk = added["accepted_events"] - single
        path, events, limit = (
            (_BULK, in_bulk, MAX_BULK_EVENTS_PER_SECOND) if bulk else (_EVENTS, single, MAX_EVENTS_PER_SECOND)
        )
        span = max(accepted_at[path]) - min(accepted_at[path])
        return {
            "queue": self.queue,
            "latency_ms": self.latency_ms,
            "messages": self.messages,
            "workers": self.workers,
            "seconds": seconds,
            "events_per_s": added["accepted_events"] / seconds,
            "first_to_last_call_s": span,
            "share_of_limit": events / span / limit,
            "bulk_calls": len(bulk),
            "bulk_calls_answered_429": len(bulk) - len(accepted_at[_BULK]),
            "events_sent_singly": single,
            "klaviyo_calls": calls,
            "klaviyo_calls_answered_429": throttled,
            "share_answered_429": throttled / calls,
            "processes": processes,
        }

    def _stop(self, worker: Worker, port: int) -> Row:
        """Stop a worker and return its figures."""
        requests, throttled = _count_requests(port)
        settled = [message.at for message in worker.settled]
        usage = worker.stop()
        return {
            "messages": len(settled),
            "klaviyo_requests": requests,
            "klaviyo_requests_answered_429": throttled,
            "first_settled_s": min(settled, default=math.inf) - worker.started,
            "cpu_s": usage.cpu,
            "peak_rss_mb": usage.peak_rss,
            "last_settled_at": max(settled, default=worker.started),
        }


@dataclass(frozen=True, slots=True)
class Idle:
    """Single messages to an idle worker. The first message warms it up and is not measured."""

    kind: MessageKind
    latency_ms: float
    queue: str = "embedded"
    messages: int = IDLE_MESSAGES
    table = "idle"

    @property
    def name(self) -> str:
        """Return the name of the row."""
        return f"idle: single {self.kind.name}"

    def measure(self) -> Row:
        """Publish one message at a time. Measure from publishing to the log line."""
        pause = random.Random(self.messages)
        spans: list[tuple[float, float]] = []
        with (
            _test_bed(self.latency_ms, copies=self.messages + 1, factor=RATE_LIMIT_FACTOR) as test_bed,
            test_bed.worker() as worker,
        ):
            bodies = self.kind.bodies(self.messages + 1)
            test_bed.queue.publish(islice(bodies, 1))
            wait_until_settled([worker], 1)
            test_bed.sandbox.start_counting()
            for count, body in enumerate(bodies, 2):
                time.sleep(pause.uniform(0.05, 0.15))  # random, because the queue is polled at even intervals
                started_at = time.time()
                test_bed.queue.publish([body])
                wait_until_settled([worker], count, poll=0.005)
                spans.append((started_at, worker.settled[-1].at))
            usage = worker.stop()
            services = ("klaviyo", "commercetools")
            calls = sum(test_bed.sandbox.calls(service) for service in services)
            responses = sorted(line["at"] for service in services for line in test_bed.sandbox.log(service))
        durations = [(end - started_at) * 1000 for started_at, end in spans]
        waits = [time_waiting(responses, span, self.latency_ms / 1000) * 1000 for span in spans]
        return {
            "queue": self.queue,
            "latency_ms": self.latency_ms,
            "messages": self.messages,
            "publish_to_processed_p50_ms": percentile(durations, 0.5),
            "publish_to_processed_p99_ms": percentile(durations, 0.99),
            "latency_of_calls_p50_ms": percentile(waits, 0.5),
            "latency_of_calls_p99_ms": percentile(waits, 0.99),
            "calls_per_message": calls / self.messages,
            "cpu_s": usage.cpu,
        }


@dataclass(frozen=True, slots=True)
class Memory:
    """The memory of a worker with a backlog of large messages."""

    name: str = "memory: orders of 50 KB"
    messages: int = LARGE_BACKLOG
    latency_ms: float = LIMITED_LATENCY
    queue: str = "embedded"
    table = "memory"

    def measure(self) -> Row:
        """Run a worker without messages, then one with the backlog."""
        with _test_bed(self.latency_ms, factor=RATE_LIMIT_FACTOR) as test_bed:
            with test_bed.worker() as worker:
                worker.wait_until_started()
                time.sleep(1)
                idle = worker.stop()
            usage, worker = test_bed.drain(LARGE_ORDERS, self.messages)
        return {
            "queue": self.queue,
            "latency_ms": self.latency_ms,
            "messages": self.messages,
            "peak_rss_without_backlog_mb": idle.peak_rss,
            "peak_rss_with_backlog_mb": usage.peak_rss,
            "messages_per_s": self.messages / (max(settled.at for settled in worker.settled) - worker.started),
            "cpu_ms_per_message": usage.cpu / self.messages * 1000,
        }


class _TestBed:
    """A sandbox, a queue and a directory for logs."""

    def __init__(self, sandbox: Sandbox, queue: Queue, directory: Path) -> None:
        self.sandbox = sandbox
        self.queue = queue
        self._directory = directory
        self._workers = 0

    def worker(self, port: int | None = None, mapping: str = "") -> Worker:
        """Start a worker with default settings, and optionally with another HTTP port and a mapping file."""
        self._workers += 1
        config = self._directory / "mapping.toml"
        config.write_text(mapping, encoding="utf-8")
        metrics = {} if port is None else {"KLAVIYO_WORKER_HTTP_PORT": str(port)}
        own = {"KLAVIYO_WORKER_CONFIG": str(config), **metrics}
        environment = {**self.sandbox.environment, **self.queue.environment, **own}
        return Worker(environment, self._directory / f"worker-{self._workers}.log")

    def drain(self, kind: MessageKind, messages: int) -> tuple[Any, Worker]:
        """Run a worker until the backlog is settled; return its usage and the stopped worker. Raises BenchmarkError."""
        self.sandbox.fill_catalog(kind.stocked(messages))
        if kind.is_repeated:
            self._settle(kind, messages)
        if kind.former:
            self.sandbox.import_customers([kind.former(number) for number in range(1, messages + 1)])
        self.sandbox.start_counting()
        usage, worker = self._settle(kind, messages)
        self.check(kind, messages)
        return usage, worker

    def _settle(self, kind: MessageKind, messages: int) -> tuple[Any, Worker]:
        self.queue.publish(kind.bodies(messages))
        with self.worker(mapping=kind.mapping) as worker:
            wait_until_settled([worker], messages)
            return worker.stop(), worker

    def check(self, kind: MessageKind, messages: int) -> None:
        """Raise BenchmarkError unless all effects of the messages are in Klaviyo.

        Repeated messages that change nothing must not write.
        """
        added = self.sandbox.added()
        for name, expected in kind.added(messages).items():
            if added[name] != expected:
                raise BenchmarkError(f"Klaviyo has {added[name]} new {name}: expected {expected}")
        writes = sum(line["method"] != "GET" for line in self.sandbox.log("klaviyo")) if kind.is_repeated else 0
        if writes and not kind.former:
            raise BenchmarkError(f"messages without a change sent {writes} writes: expected none")
        if kind.former and (former := self.sandbox.count_customers(FORMER_NAME)):
            raise BenchmarkError(f"{former} customers have their former name")


@contextmanager
def _test_bed(
    latency_ms: float, *, factor: int, copies: int = 0, queue: str = "embedded", has_verdict: bool = True
) -> Iterator[_TestBed]:
    options = ("--latency", str(latency_ms / 1000), "--rate-limits", str(factor), "--copies", str(copies))
    with (
        tempfile.TemporaryDirectory() as directory,
        sandbox("--bulk-repeats", "ignore" if has_verdict else "drop", *options) as running,
        open_queue(queue, Path(directory)) as opened,
    ):
        if has_verdict:
            running.probe()
        running.start_counting()
        yield _TestBed(running, opened, Path(directory))


def percentile(values: Sequence[float], share: float) -> float:
    """Return the percentile by nearest rank; `share` is between 0 and 1."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def time_waiting(responses: Sequence[float], span: tuple[float, float], latency: float) -> float:
    """Return the seconds of a span during which at least one call waited for its response."""
    total, end = 0.0, span[0]
    for response in responses:
        if span[0] <= response <= span[1]:
            total += max(0.0, response - max(end, response - latency))
            end = max(end, response)
    return total


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def _count_requests(port: int) -> tuple[int, int]:
    """Return how many requests a worker sent to Klaviyo, and how many were throttled."""
    text = urllib3.request("GET", f"http://127.0.0.1:{port}/metrics").data.decode()
    series = [line for line in text.splitlines() if line.startswith("klaviyo_worker_klaviyo_requests_total{")]
    counts = [(int(float(line.rpartition(" ")[2])), 'status="429"' in line) for line in series]
    return sum(count for count, _ in counts), sum(count for count, throttled in counts if throttled)
