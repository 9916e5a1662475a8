"""The Prometheus metrics of the worker."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import ProcessCollector
from prometheus_client.parser import text_string_to_metric_families

from tests.conftest import Scripted
from tests.support.worker_state import FakeWorkerState
from worker.telemetry.metrics import OUTCOMES, SERVICES, STAGES, Metrics
from worker.transform import HANDLERS

if TYPE_CHECKING:
    from collections.abc import Mapping

    from prometheus_client import Metric

PREFIX = "klaviyo_worker_"
REQUESTS: dict[str, tuple[str, set[str]]] = {}
for _service in SERVICES:
    REQUESTS |= {
        f"{_service}_requests_total": ("counter", {"endpoint", "status"}),
        f"{_service}_request_duration_seconds": ("histogram", {"endpoint"}),
    }
PROCESS = {  # on systems with /proc
    "process_cpu_seconds_total": ("counter", set[str]()),
    "process_resident_memory_bytes": ("gauge", set[str]()),
    "process_virtual_memory_bytes": ("gauge", set[str]()),
    "process_start_time_seconds": ("gauge", set[str]()),
    "process_open_fds": ("gauge", set[str]()),
    "process_max_fds": ("gauge", set[str]()),
}
TABLE: Mapping[str, tuple[str, set[str]]] = {
    "messages_received_total": ("counter", {"adapter"}),
    "messages_processed_total": ("counter", {"message_type", "outcome"}),
    "messages_excluded_total": ("counter", {"by"}),
    "erasures_total": ("counter", {"profiles"}),
    "catalog_gaps_total": ("counter", {"gap"}),
    "message_failures_total": ("counter", {"stage", "error_type"}),
    "message_duration_seconds": ("histogram", set()),
    "stage_duration_seconds": ("histogram", {"stage"}),
    "message_age_seconds": ("histogram", set()),
    "batch_size_messages": ("histogram", set()),
    "messages_in_flight": ("gauge", set()),
    "messages_held": ("gauge", set()),
    "oldest_message_age_seconds": ("gauge", set()),
    "lanes": ("gauge", set()),
    "parked": ("gauge", set()),
    "bulk_events": ("gauge", set()),
    "outage": ("gauge", {"service"}),
    "last_success_timestamp_seconds": ("gauge", set()),
    "queue_backlog_messages": ("gauge", set()),
    "dead_letter_messages": ("gauge", set()),
    "build_info": ("gauge", {"version", "klaviyo_revision"}),
    **REQUESTS,
    **(PROCESS if Path("/proc/stat").exists() else {}),
}
TYPES = {kind for _, kind in HANDLERS} | {"unreadable", "other"}


def families(metrics: Metrics) -> dict[str, Metric]:
    """Return the metrics of a scrape by full name without the prefix."""
    body, content_type = metrics.render()
    assert content_type == "text/plain; version=0.0.4; charset=utf-8"
    found = list(text_string_to_metric_families(body.decode()))
    assert all(family.name.startswith((PREFIX, "process_")) for family in found)
    names = [family.name.removeprefix(PREFIX) + "_total" * (family.type == "counter") for family in found]
    assert len(set(names)) == len(names)
    return dict(zip(names, found, strict=True))


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    """Return the value of a series; None if it does not exist."""
    values = [
        sample.value
        for family in families(metrics).values()
        for sample in family.samples
        if sample.name == PREFIX + name and sample.labels == labels
    ]
    assert len(values) <= 1
    return values[0] if values else None


def labels_of(metrics: Metrics, name: str, label: str) -> set[str]:
    """Return the values of a label."""
    return {sample.labels[label] for sample in families(metrics)[name].samples}


def busy(state: FakeWorkerState) -> Metrics:
    """Return metrics with a value in every series."""
    metrics = Metrics("pubsub")
    metrics.observe_worker(state)
    metrics.set_build_info("1.2.3", "2026-07-15")
    metrics.record_received(3)
    metrics.record_batch(3)
    metrics.record_stage("enrich", 0.2)
    metrics.record_settled("OrderCreated", "sent", 0.4, 2.0)
    metrics.record_settled(None, "dead_lettered", 0.1, 2.0)
    metrics.record_failure("parse", "Rejected")
    for service in SERVICES:
        metrics.record_request(service, "POST /api/events", 202, 0.3)
    return metrics


def test_metrics_are_those_of_the_table() -> None:
    """Dashboards and alerts depend on the names, types and labels."""
    found = families(busy(FakeWorkerState()))
    assert {name: family.type for name, family in found.items()} == {name: kind for name, (kind, _) in TABLE.items()}
    for name, (_, labels) in TABLE.items():
        assert {frozenset(sample.labels) - {"le"} for sample in found[name].samples} == {frozenset(labels)}


def test_every_metric_is_documented() -> None:
    """Dashboards are built from docs/metrics-and-logs.md."""
    text = (Path(__file__).parents[3] / "docs" / "metrics-and-logs.md").read_text(encoding="utf-8")
    assert [name for name in TABLE if f"`{name}`" not in text] == []


def test_names_follow_the_conventions_of_prometheus() -> None:
    """Counters end in _total and histograms in a base unit. Every metric has a help text."""
    for name, family in families(busy(FakeWorkerState())).items():
        assert family.documentation
        assert name.endswith("_total") == (family.type == "counter")
        assert family.type != "histogram" or name.endswith(("_seconds", "_messages"))
        assert not any(unit in name for unit in ("milli", "_ms", "minute", "hour", "kilo", "percent"))
        assert not any(sample.name.endswith("_created") for sample in family.samples)


def test_counters_of_an_idle_worker_are_zero() -> None:
    """A counter that appears with its first message would show no increase."""
    metrics = Metrics("pubsub")
    assert value(metrics, "messages_received_total", adapter="pubsub") == 0
    assert value(metrics, "messages_processed_total", message_type="OrderCreated", outcome="dead_lettered") == 0
    assert value(metrics, "last_success_timestamp_seconds") == 0
    assert labels_of(metrics, "messages_processed_total", "message_type") == TYPES
    assert labels_of(metrics, "messages_processed_total", "outcome") == set(OUTCOMES)


def test_workers_of_a_process_have_separate_metrics() -> None:
    """Tests run several workers in one process."""
    one, other = Metrics("pubsub"), Metrics("embedded")
    one.record_received(5)
    assert value(one, "messages_received_total", adapter="pubsub") == 5
    assert value(other, "messages_received_total", adapter="embedded") == 0


def test_received_messages_and_batch_sizes_are_counted() -> None:
    """Messages are counted, not calls of `receive`."""
    metrics = Metrics("pubsub")
    for number in (30, 12):
        metrics.record_received(number)
        metrics.record_batch(number)
    assert value(metrics, "messages_received_total", adapter="pubsub") == 42
    assert value(metrics, "batch_size_messages_sum") == 42
    assert value(metrics, "batch_size_messages_bucket", le="20.0") == 1


@pytest.mark.parametrize("outcome", OUTCOMES)
def test_settled_message_is_counted_once(outcome: str) -> None:
    """It is counted by type and outcome. Only sent and ignored messages have an age and update the last success."""
    metrics = Metrics("pubsub")
    started_at = time.time()
    is_success = outcome in {"sent", "ignored"}
    metrics.record_settled("OrderCreated", outcome, 0.3, 4_000.0)
    counted = families(metrics)["messages_processed_total"].samples
    assert [sample.labels for sample in counted if sample.value] == [
        {"message_type": "OrderCreated", "outcome": outcome}
    ]
    assert value(metrics, "messages_processed_total", message_type="OrderCreated", outcome=outcome) == 1
    assert value(metrics, "message_duration_seconds_sum") == 0.3
    assert value(metrics, "message_age_seconds_count") == is_success
    assert (value(metrics, "last_success_timestamp_seconds") or 0) >= started_at * is_success
    assert bool(value(metrics, "last_success_timestamp_seconds")) == is_success


def test_unknown_age_is_left_out_and_negative_age_is_zero() -> None:
    """Some queues do not report when a message was published, and the queue's clock can be ahead."""
    metrics = Metrics("pubsub")
    metrics.record_settled("OrderCreated", "sent", 0.3, None)
    assert value(metrics, "message_age_seconds_count") == 0
    metrics.record_settled("OrderCreated", "sent", 0.3, -5.0)
    assert (value(metrics, "message_age_seconds_count"), value(metrics, "message_age_seconds_sum")) == (1, 0)


def test_buckets_cover_the_expected_times() -> None:
    """Processing takes milliseconds to a minute. A message can wait for hours; alerts use five minutes."""
    metrics = busy(FakeWorkerState())
    bounds = {
        name: [float(sample.labels["le"]) for sample in family.samples if sample.name.endswith("_bucket")]
        for name, family in families(metrics).items()
        if family.type == "histogram"
    }
    for name in ("message_duration_seconds", "stage_duration_seconds", "klaviyo_request_duration_seconds"):
        assert (bounds[name][0], bounds[name][-2]) == (0.005, 60)
    assert 300 in bounds["message_age_seconds"]
    assert bounds["message_age_seconds"][-2] == 86_400


@given(st.lists(st.one_of(st.none(), st.text(), st.sampled_from(sorted(TYPES)))))
def test_messages_cannot_create_labels(message_types: list[str | None]) -> None:
    """An unknown type counts as `other`, an unreadable message as `unreadable`."""
    metrics = Metrics("pubsub")
    for message_type in message_types:
        metrics.record_settled(message_type, "ignored", 0.1, None)
    samples = families(metrics)["messages_processed_total"].samples
    assert {sample.labels["message_type"] for sample in samples} == TYPES
    counted = {
        sample.labels["message_type"]: sample.value for sample in samples if sample.labels["outcome"] == "ignored"
    }
    assert sum(counted.values()) == len(message_types)
    assert counted["unreadable"] == message_types.count(None)


@given(st.text(), st.text())
def test_unknown_stages_and_errors_count_as_other(stage: str, error: str) -> None:
    """The text of an error, passed instead of its class by mistake, could contain personal data."""
    metrics = Metrics("pubsub")
    metrics.record_failure(stage, f"no {error}")
    metrics.record_stage(f"{stage}?", 0.1)
    metrics.record_settled("OrderCreated", f"{stage}?", 0.1, None)
    found = families(metrics)
    for name, label, allowed in (
        ("message_failures_total", "stage", {*STAGES, "other"}),
        ("message_failures_total", "error_type", {"other"}),
        ("stage_duration_seconds", "stage", {"other"}),
        ("messages_processed_total", "outcome", {*OUTCOMES, "other"}),
    ):
        assert {sample.labels[label] for sample in found[name].samples} <= allowed


@pytest.mark.parametrize("error", ["Transient", "Rejected", "KlaviyoMisconfigured", "QueueError", "KeyError"])
def test_failures_are_counted_by_error_class(error: str) -> None:
    """The error classes of the worker, the adapters and Python are known."""
    metrics = Metrics("pubsub")
    metrics.record_failure("send", error)
    assert value(metrics, "message_failures_total", stage="send", error_type=error) == 1


@pytest.mark.parametrize(("status", "label", "limited"), [(202, "202", 0), (429, "429", 1), (None, "none", 0)])
def test_statuses_are_counted(status: int | None, label: str, limited: int) -> None:
    """A missing response has the status `none`. The series of 429 exists from the first request on."""
    metrics = Metrics("pubsub")
    metrics.record_request("klaviyo", "POST /api/events", status, 0.2)
    metrics.record_request("mail", "POST /api/events", status, 0.2)
    assert value(metrics, "klaviyo_requests_total", endpoint="POST /api/events", status=label) == 1
    assert value(metrics, "klaviyo_requests_total", endpoint="POST /api/events", status="429") == limited
    assert families(metrics)["commercetools_requests_total"].samples == []


def test_gauges_are_read_at_every_scrape() -> None:
    """They show the current state of the worker."""
    state = FakeWorkerState()
    metrics = Metrics("pubsub")
    metrics.observe_worker(state)
    shown = {
        "messages_in_flight": 7,
        "messages_held": 3,
        "oldest_message_age_seconds": 90,
        "lanes": 4,
        "parked": 0,
        "bulk_events": 1,
        "queue_backlog_messages": 120,
        "dead_letter_messages": 2,
    }
    assert {name: value(metrics, name) for name in shown} == shown
    state.values |= {
        "in_flight": 0,
        "parked_reason": "Klaviyo answered 401",
        "outage_reasons": {"klaviyo": "503", "commercetools": ""},
    }
    assert (value(metrics, "messages_in_flight"), value(metrics, "parked")) == (0, 1)
    assert value(metrics, "outage", service="klaviyo") == 1
    assert value(metrics, "outage", service="commercetools") == 0


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("backlog", "queue_backlog_messages"),
        ("dead_letters", "dead_letter_messages"),
        ("oldest_age", "oldest_message_age_seconds"),
    ],
)
def test_gauge_with_an_unknown_value_is_absent(source: str, name: str) -> None:
    """A 0 would mean an empty queue and scale the worker down."""
    assert families(busy(FakeWorkerState(**{source: None}))).keys() == TABLE.keys() - {name}
    assert value(busy(FakeWorkerState(**{source: 0})), name) == 0


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("in_flight", "messages_in_flight"),
        ("held", "messages_held"),
        ("oldest_age", "oldest_message_age_seconds"),
        ("lanes", "lanes"),
        ("parked_reason", "parked"),
        ("outage_reasons", "outage"),
        ("backlog", "queue_backlog_messages"),
        ("dead_letters", "dead_letter_messages"),
    ],
)
def test_failing_gauge_is_left_out_and_logged(source: str, name: str, caplog: pytest.LogCaptureFixture) -> None:
    """The log line names the metric and the error class, without the text of the error."""
    metrics = busy(FakeWorkerState(**{source: OSError("grete@mail.example")}))
    with caplog.at_level(logging.WARNING, "klaviyo_worker"):
        found = families(metrics)
    assert found.keys() == TABLE.keys() - {name}
    (record,) = caplog.records
    fields: dict[str, Any] = vars(record)
    assert (record.getMessage(), fields["metric"], fields["error"]) == ("metric_unavailable", name, "OSError")
    assert "grete" not in str(fields)


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="no /proc here")
def test_process_metrics_have_the_standard_names() -> None:
    """Dashboards for any process work."""
    found = families(Metrics("pubsub"))
    assert found["process_resident_memory_bytes"].samples[0].value > 10_000_000
    assert 0 < found["process_start_time_seconds"].samples[0].value <= time.time()


def test_unreadable_process_metrics_are_left_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Some systems have a /proc that differs from Linux. All other metrics remain."""
    metrics = busy(FakeWorkerState())
    monkeypatch.setattr(ProcessCollector, "collect", Scripted(ValueError("invalid literal")))
    assert families(metrics).keys() == TABLE.keys() - PROCESS.keys()
    assert [vars(record)["metric"] for record in caplog.records] == ["process"]


def test_build_info_has_the_versions() -> None:
    """They are the worker's version and the revision of Klaviyo's API."""
    metrics = Metrics("pubsub")
    metrics.set_build_info("1.2.3", "2026-07-15")
    assert value(metrics, "build_info", version="1.2.3", klaviyo_revision="2026-07-15") == 1


def test_counters_can_be_read() -> None:
    """The status page shows the same numbers as a scrape."""
    metrics = Metrics("embedded")
    metrics.record_settled("OrderCreated", "sent", 0.1, 2.0)
    metrics.record_settled("OrderCreated", "sent", 0.1, 3.0)
    metrics.record_settled(None, "dead_lettered", 0.1, 9.0)
    metrics.record_batch(3)
    metrics.record_request("klaviyo", "POST /api/events", 202, 0.1)
    metrics.record_request("klaviyo", "POST /api/events", 429, 0.1)
    metrics.record_request("commercetools", "orders", None, 0.1)
    counted = {key: number for key, number in metrics.outcomes().items() if number}
    assert counted == {("OrderCreated", "sent"): 2, ("unreadable", "dead_lettered"): 1}
    assert metrics.requests() == {("klaviyo", "POST /api/events"): 2, ("commercetools", "orders"): 1}
    assert metrics.ages() == (2, 5.0)
    assert metrics.batches() == (1, 3.0)
