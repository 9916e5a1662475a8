"""The Prometheus metrics of the worker."""

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
from worker.model import Ending
from worker.telemetry.log import log
from worker.transform import HANDLERS

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Mapping

    from prometheus_client import Metric

    from worker.telemetry.state import WorkerState


OUTCOMES = tuple(ending.value for ending in Ending)
SERVICES = ("klaviyo", "commercetools")
STAGES = ("parse", "enrich", "transform", "send")
GAPS = ("price", "sku")
EXCLUDED_BY = ("project", "stores", "countries")
OTHER = "other"
_ERASED = ("0", "1", "2", "3")  # profiles of an erasure; 0: Klaviyo had none

_DONE = frozenset({Ending.SENT.value, Ending.IGNORED.value})
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_AGES = (*_SECONDS, 300, 900, 3_600, 14_400, 86_400)
_THROTTLED = HTTPStatus.TOO_MANY_REQUESTS.value
_SIZES = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1_000)

T = TypeVar("T")


class Metrics:
    """The metrics of one worker, in a separate registry. Thread-safe. No method raises an error.

    The values of labels are bounded: an unlisted value counts as `other`, so that hostile messages cannot create
    series. Dashboards and alerts depend on the names of the metrics.
    """

    def __init__(self, adapter: str) -> None:
        """Create the metrics. `adapter` is the scheme of QUEUE_URL."""
        registry = self._registry = CollectorRegistry()
        self._types = frozenset(kind for _, kind in HANDLERS)
        self._errors = _error_types()
        self._requests = {service: _Requests(service, registry) for service in SERVICES}
        self._received = _counter(registry, "messages_received_total", "Messages received", "adapter").labels(adapter)
        self._processed = _counter(registry, "messages_processed_total", "Messages settled", "message_type", "outcome")
        self._failures = _counter(registry, "message_failures_total", "Messages that failed", "stage", "error_type")
        self._excluded = _counter(
            registry, "messages_excluded_total", "Messages of a project, store or country that is not served", "by"
        )
        self._erasures = _counter(registry, "erasures_total", "Completed erasures, by number of profiles", "profiles")
        self._gaps = _counter(registry, "catalog_gaps_total", "Variants without a price, or without a sku", "gap")
        self._duration = _histogram(
            registry, "message_duration_seconds", "Time from receiving a message to settling it", _SECONDS
        )
        self._stages = _histogram(registry, "stage_duration_seconds", "Time of a batch in a stage", _SECONDS, "stage")
        self._age = _histogram(
            registry, "message_age_seconds", "Time from publishing a message to its effect in Klaviyo", _AGES
        )
        self._batch = _histogram(registry, "batch_size_messages", "Messages in a batch", _SIZES)
        self._last_success = _gauge(
            registry, "last_success_timestamp_seconds", "Time when a message was last sent or ignored; 0 if never"
        )
        registry.register(_Process())
        self._build = _gauge(registry, "build_info", "Always 1; the labels are versions", "version", "klaviyo_revision")
        for number in _ERASED:
            self._erasures.labels(number)
        for kind in (*self._types, "unreadable", OTHER):  # start at 0; otherwise increase() misses the first message
            for outcome in OUTCOMES:
                self._processed.labels(kind, outcome)
        for gap in GAPS:
            self._gaps.labels(gap)
        for setting in EXCLUDED_BY:
            self._excluded.labels(setting)

    def set_build_info(self, version: str, klaviyo_revision: str) -> None:
        """Set the version of the worker and the revision of Klaviyo's API."""
        self._build.labels(version, klaviyo_revision).set(1)

    def record_received(self, messages: int) -> None:
        """Count messages received from the queue."""
        self._received.inc(messages)

    def record_settled(self, message_type: str | None, outcome: str, duration: float, age: float | None) -> None:
        """Count a message that was settled `duration` seconds after it was received.

        `message_type` is None if the message is unreadable. `outcome` is one of OUTCOMES. `age` is the number of
        seconds since the message was published; None if unknown. The age is recorded only if the message was sent or
        ignored.
        """
        kind = "unreadable" if message_type is None else _bounded(message_type, self._types)
        self._processed.labels(kind, _bounded(outcome, OUTCOMES)).inc()
        self._duration.observe(duration)
        if outcome in _DONE:
            self._last_success.set(time.time())
            if age is not None:
                self._age.observe(max(age, 0.0))  # clocks can differ

    def record_failure(self, stage: str, error: str) -> None:
        """Count a message that failed in one of STAGES, by error class."""
        self._failures.labels(_bounded(stage, STAGES), _bounded(error, self._errors)).inc()

    def record_excluded(self, by: str) -> None:
        """Count a message that one of EXCLUDED_BY excluded. It is also counted as ignored."""
        self._excluded.labels(_bounded(by, EXCLUDED_BY)).inc()

    def record_erasure(self, profiles: int) -> None:
        """Count a completed erasure. `profiles` is the number of profiles whose deletion was requested."""
        self._erasures.labels(_bounded(str(profiles), _ERASED)).inc()

    def record_gap(self, gap: str) -> None:
        """Count a variant that was written without a price, or was not written because it has no sku: one of GAPS."""
        self._gaps.labels(_bounded(gap, GAPS)).inc()

    def record_batch(self, messages: int) -> None:
        """Record the number of messages in a batch."""
        self._batch.observe(messages)

    def record_stage(self, name: str, seconds: float) -> None:
        """Record the time that a batch spent in one of STAGES."""
        self._stages.labels(_bounded(name, STAGES)).observe(seconds)

    def record_request(self, service: str, endpoint: str, status: int | None, seconds: float) -> None:
        """Count a request to one of SERVICES. `status` is None if there was no response.

        `endpoint` is a template like `PATCH /api/profiles/{id}`: ids and queries must not become labels.
        """
        if service in self._requests:
            self._requests[service].record(endpoint, status, seconds)

    def observe_worker(self, state: WorkerState) -> None:
        """Read the gauges from a running worker at every scrape. Call this method only once."""
        self._registry.register(_Gauges(state))

    def outcomes(self) -> dict[tuple[str, str], int]:
        """Return the number of settled messages by type and outcome."""
        return {(labels["message_type"], labels["outcome"]): int(n) for labels, n in _totals(self._processed)}

    def excluded(self) -> dict[str, int]:
        """Return the number of excluded messages by EXCLUDED_BY."""
        return {labels["by"]: int(n) for labels, n in _totals(self._excluded)}

    def requests(self) -> dict[tuple[str, str], int]:
        """Return the number of requests by service and endpoint."""
        return {
            (service, endpoint): number
            for service, requests in self._requests.items()
            for endpoint, number in requests.by_endpoint().items()
        }

    def ages(self) -> tuple[int, float]:
        """Return the number of sent or ignored messages with a known age, and the sum of these ages in seconds."""
        return _number_and_sum(self._age)

    def batches(self) -> tuple[int, float]:
        """Return the number of batches, and the number of messages in them."""
        return _number_and_sum(self._batch)

    def render(self) -> tuple[bytes, str]:
        """Return the body and the content type of the response to GET /metrics."""
        encode, content_type = choose_encoder("")
        return encode(_Scrape(self._registry)), content_type


class _Requests:
    """The metrics of one service."""

    def __init__(self, service: str, registry: CollectorRegistry) -> None:
        self._count = _counter(registry, f"{service}_requests_total", "Requests", "endpoint", "status")
        self._duration = _histogram(
            registry, f"{service}_request_duration_seconds", "Time from request to response", _SECONDS, "endpoint"
        )

    def record(self, endpoint: str, status: int | None, seconds: float) -> None:
        self._count.labels(endpoint, "none" if status is None else status).inc()
        self._count.labels(endpoint, _THROTTLED).inc(0)  # start at 0; otherwise increase() misses the first 429
        self._duration.labels(endpoint).observe(seconds)

    def by_endpoint(self) -> dict[str, int]:
        return {labels["endpoint"]: int(number) for labels, number in _totals(self._duration, "_count")}


class _Gauges:
    """Gauges that are read from the worker at every scrape. A gauge is absent if its value is unknown."""

    def __init__(self, state: WorkerState) -> None:
        self._state = state

    def collect(self) -> Iterator[Metric]:
        state = self._state
        readings: tuple[tuple[str, str, Callable[[], float | None]], ...] = (
            ("messages_in_flight", "Messages received and not settled", state.in_flight),
            ("messages_held", "Messages in flight that are held", state.held),
            ("oldest_message_age_seconds", "Age of the oldest message in flight", state.oldest_age),
            ("lanes", "Number of lanes", state.lanes),
            ("parked", "1 while the worker is parked", lambda: bool(state.parked_reason())),
            ("bulk_events", "1 while events are sent in bulk", lambda: state.bulk_events().in_bulk),
            ("queue_backlog_messages", "Messages on the queue that are not settled; absent if unknown", state.backlog),
            ("dead_letter_messages", "Dead letters; absent if unknown", state.dead_letters),
        )
        for name, text, read in readings:
            value = _read(name, read)
            if value is not None:
                yield GaugeMetricFamily(_name(name), text, value)
        outages = _read("outage", lambda: {service: bool(state.outage_reasons()[service]) for service in SERVICES})
        if outages is not None:
            family = GaugeMetricFamily(_name("outage"), "1 during an outage of a service", labels=("service",))
            for service, is_out in outages.items():
                family.add_metric((service,), is_out)
            yield family


class _Process:
    """CPU time, memory and start time of this process, with the standard names of Prometheus clients."""

    def __init__(self) -> None:
        self._collector = ProcessCollector(registry=None)

    def collect(self) -> Iterable[Metric]:
        return _read("process", self._collector.collect) or ()


class _Scrape:
    """A registry without the `_created` series. These repeat the start time and double the size of a scrape."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry

    def collect(self) -> Iterator[Metric]:
        for family in self._registry.collect():
            family.samples = [sample for sample in family.samples if not sample.name.endswith("_created")]
            yield family


def _read(name: str, read: Callable[[], T]) -> T | None:
    try:
        return read()
    except Exception as error:  # noqa: BLE001 - a failing gauge must not affect the others
        log.warning("metric_unavailable", extra={"metric": name, "error": type(error).__name__})
        return None


def _totals(metric: Counter | Histogram, suffix: str = "_total") -> Iterator[tuple[Mapping[str, str], float]]:
    """Yield the labels and value of every series whose name ends with `suffix`."""
    for family in metric.collect():
        yield from ((sample.labels, sample.value) for sample in family.samples if sample.name.endswith(suffix))


def _number_and_sum(histogram: Histogram) -> tuple[int, float]:
    values = {sample.name.rpartition("_")[2]: sample.value for of in histogram.collect() for sample in of.samples}
    return int(values["count"]), values["sum"]


def _error_types() -> frozenset[str]:
    """Return the values of the label `error_type`: the exceptions of Python, the worker and the adapters."""
    entries = (entry for module in (builtins, errors, base) for entry in vars(module).items())
    return frozenset(name for name, value in entries if isinstance(value, type) and issubclass(value, Exception))


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
