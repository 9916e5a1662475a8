"""What Prometheus scrapes: how many messages, how fast, how old, and what stands in their way."""

from __future__ import annotations

import builtins
import time
from http import HTTPStatus
from typing import TYPE_CHECKING, TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.exposition import choose_encoder

from adapters import base
from worker import errors
from worker.telemetry.log import log
from worker.transform import HANDLERS

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Mapping

    from prometheus_client import Metric

    from worker.telemetry.state import WorkerState


OUTCOMES = ("sent", "ignored", "retried", "dead_lettered", "returned")
SERVICES = ("klaviyo", "commercetools")
STAGES = ("parse", "enrich", "transform", "send")
OTHER = "other"

_DONE = frozenset({"sent", "ignored"})
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_AGES = (*_SECONDS, 300, 900, 3_600, 14_400, 86_400)
_THROTTLED = HTTPStatus.TOO_MANY_REQUESTS.value
_SIZES = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1_000)

T = TypeVar("T")


class Metrics:
    """The worker's metrics, in a registry of their own. Safe for many threads; no call here raises.

    Labels are bounded: what is not in its list counts as `other`, so that no message, whatever it holds, makes a
    series. Names are a promise to dashboards and alerts.
    """

    def __init__(self, adapter: str) -> None:
        """`adapter` is the scheme of QUEUE_URL."""
        registry = self._registry = CollectorRegistry()
        self._types = frozenset(kind for _, kind in HANDLERS)
        self._errors = _error_types()
        self._requests = {service: _Requests(service, registry) for service in SERVICES}
        self._received = _counter(registry, "messages_received_total", "Messages received", "adapter").labels(adapter)
        self._processed = _counter(registry, "messages_processed_total", "Messages settled", "message_type", "outcome")
        self._failures = _counter(registry, "message_failures_total", "Messages that failed", "stage", "error_type")
        self._duration = _histogram(
            registry, "message_duration_seconds", "From receiving a message to settling it", _SECONDS
        )
        self._stages = _histogram(registry, "stage_duration_seconds", "A batch in a stage", _SECONDS, "stage")
        self._age = _histogram(
            registry, "message_age_seconds", "From publishing a message to its effect in Klaviyo", _AGES
        )
        self._batch = _histogram(registry, "batch_size_messages", "Messages in a batch", _SIZES)
        self._last_success = _gauge(
            registry, "last_success_timestamp_seconds", "When a message was last sent or ignored; 0: not yet"
        )
        registry.register(_Process())
        self._build = _gauge(registry, "build_info", "1, for what is running", "version", "klaviyo_revision")
        for kind in (*self._types, "unreadable", OTHER):  # from 0 on, or the first one would be no increase
            for outcome in OUTCOMES:
                self._processed.labels(kind, outcome)

    def set_build_info(self, version: str, klaviyo_revision: str) -> None:
        """Publish the versions of what is running."""
        self._build.labels(version, klaviyo_revision).set(1)

    def record_received(self, messages: int) -> None:
        """Count messages that the queue handed out."""
        self._received.inc(messages)

    def record_settled(self, message_type: str | None, outcome: str, duration: float, age: float | None) -> None:
        """Count a message that reached an ending, `duration` seconds after it came.

        `message_type` is None for a message that could not be read, `outcome` one of OUTCOMES. `age`: seconds since
        it was published, None when the queue does not say; a message that comes again is no age yet.
        """
        kind = "unreadable" if message_type is None else _bounded(message_type, self._types)
        self._processed.labels(kind, _bounded(outcome, OUTCOMES)).inc()
        self._duration.observe(duration)
        if outcome in _DONE:
            self._last_success.set(time.time())
            if age is not None:
                self._age.observe(max(age, 0.0))  # clocks differ

    def record_failure(self, stage: str, error: str) -> None:
        """Count a message that failed in one of STAGES, by the class of its error."""
        self._failures.labels(_bounded(stage, STAGES), _bounded(error, self._errors)).inc()

    def record_batch(self, messages: int) -> None:
        """Note the size of a batch that a lane takes."""
        self._batch.observe(messages)

    def record_stage(self, name: str, seconds: float) -> None:
        """Note how long a batch was in one of STAGES."""
        self._stages.labels(_bounded(name, STAGES)).observe(seconds)

    def record_request(self, service: str, endpoint: str, status: int | None, seconds: float) -> None:
        """Note a request to one of SERVICES and its answer's status; None: there was no answer.

        `endpoint` is a template like `PATCH /api/profiles/{id}`: ids and queries must not become labels.
        """
        if service in self._requests:
            self._requests[service].record(endpoint, status, seconds)

    def observe_worker(self, state: WorkerState) -> None:
        """Read the gauges from a running worker from now on. Once."""
        self._registry.register(_Gauges(state))

    def outcomes(self) -> dict[tuple[str, str], int]:
        """Count the messages settled, by type and outcome."""
        return {(labels["message_type"], labels["outcome"]): int(n) for labels, n in _totals(self._processed)}

    def requests(self) -> dict[tuple[str, str], int]:
        """Count the requests, by service and endpoint."""
        return {(service, end): n for service, of in self._requests.items() for end, n in of.by_endpoint().items()}

    def ages(self) -> tuple[int, float]:
        """Return of how many messages the age at their effect is known, and the sum of these, in seconds."""
        return _number_and_sum(self._age)

    def batches(self) -> tuple[int, float]:
        """Return the number of batches, and of the messages in them."""
        return _number_and_sum(self._batch)

    def render(self) -> tuple[bytes, str]:
        """Return the answer to GET /metrics: body and content type."""
        encode, content_type = choose_encoder("")
        return encode(_Scrape(self._registry)), content_type


class _Requests:
    """The metrics of one service."""

    def __init__(self, service: str, registry: CollectorRegistry) -> None:
        self._count = _counter(registry, f"{service}_requests_total", "Requests", "endpoint", "status")
        self._duration = _histogram(
            registry, f"{service}_request_duration_seconds", "From request to answer", _SECONDS, "endpoint"
        )

    def record(self, endpoint: str, status: int | None, seconds: float) -> None:
        self._count.labels(endpoint, "none" if status is None else status).inc()
        self._count.labels(endpoint, _THROTTLED).inc(0)  # from 0 on, or increase() misses the first one
        self._duration.labels(endpoint).observe(seconds)

    def by_endpoint(self) -> dict[str, int]:
        return {labels["endpoint"]: int(number) for labels, number in _totals(self._duration, "_count")}


class _Gauges:
    """Asks the worker at every scrape. What cannot be told is left out; the rest is there nevertheless."""

    def __init__(self, state: WorkerState) -> None:
        self._state = state

    def collect(self) -> Iterator[Metric]:
        state = self._state
        readings: tuple[tuple[str, str, Callable[[], float | None]], ...] = (
            ("messages_in_flight", "Messages received and not settled", state.in_flight),
            ("messages_held", "Messages held because they could not be handled yet", state.held),
            ("oldest_message_age_seconds", "Since the oldest message in flight was published", state.oldest_age),
            ("lanes", "Batches handled side by side", state.lanes),
            ("parked", "1 while the worker is not allowed to work", lambda: bool(state.parked_reason())),
            ("queue_backlog_messages", "Messages in the queue; absent when it cannot tell", state.backlog),
            ("dead_letter_messages", "Dead letters; absent when the queue cannot tell", state.dead_letters),
        )
        for name, text, read in readings:
            value = _read(name, read)
            if value is not None:
                yield GaugeMetricFamily(_name(name), text, value)
        outages = _read("outage", lambda: {service: bool(state.outage_reasons()[service]) for service in SERVICES})
        if outages is not None:
            family = GaugeMetricFamily(_name("outage"), "1 while a service cannot answer", labels=("service",))
            for service, out in outages.items():
                family.add_metric((service,), out)
            yield family


class _Process:
    """CPU, memory and start of this process, under the names that every Prometheus client gives them."""

    def __init__(self) -> None:
        self._collector = ProcessCollector(registry=None)

    def collect(self) -> Iterable[Metric]:
        return _read("process", self._collector.collect) or ()


class _Scrape:
    """A registry without the `_created` series, which double its size and tell one process's start many times."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry

    def collect(self) -> Iterator[Metric]:
        for family in self._registry.collect():
            family.samples = [sample for sample in family.samples if not sample.name.endswith("_created")]
            yield family


def _read(name: str, read: Callable[[], T]) -> T | None:
    try:
        return read()
    except Exception as error:  # noqa: BLE001 - a gauge that fails must not take the others with it
        log.warning("metric_unavailable", extra={"metric": name, "error": type(error).__name__})
        return None


def _totals(metric: Counter | Histogram, suffix: str = "_total") -> Iterator[tuple[Mapping[str, str], float]]:
    """Yield labels and value of every series, by the end of its name."""
    for family in metric.collect():
        yield from ((sample.labels, sample.value) for sample in family.samples if sample.name.endswith(suffix))


def _number_and_sum(histogram: Histogram) -> tuple[int, float]:
    values = {sample.name.rpartition("_")[2]: sample.value for of in histogram.collect() for sample in of.samples}
    return int(values["count"]), values["sum"]


def _error_types() -> frozenset[str]:
    """Return the classes that are told apart: Python's own and those of worker and queues."""
    named = (entry for module in (builtins, errors, base) for entry in vars(module).items())
    return frozenset(name for name, value in named if isinstance(value, type) and issubclass(value, Exception))


def _bounded(value: str, known: Collection[str]) -> str:
    return value if value in known else OTHER


def _name(name: str) -> str:
    return f"klaviyo_worker_{name}"


def _counter(registry: CollectorRegistry, name: str, text: str, *labels: str) -> Counter:
    return Counter(_name(name), text, labels, registry=registry)


def _gauge(registry: CollectorRegistry, name: str, text: str, *labels: str) -> Gauge:
    return Gauge(_name(name), text, labels, registry=registry)


def _histogram(
    registry: CollectorRegistry, name: str, text: str, buckets: tuple[float, ...], *labels: str
) -> Histogram:
    return Histogram(_name(name), text, labels, registry=registry, buckets=buckets)
