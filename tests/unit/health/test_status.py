"""The data of the status page: the condition, ten minutes of history, recent failures, no secrets."""

from __future__ import annotations

import configparser
import json
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.support.worker_state import FakeWorkerState
from tests.unit.runtime.test_runner import settings_for
from worker.health.history import STEP, STEPS, History
from worker.health.state import condition_of
from worker.health.status import Status, redact
from worker.telemetry.message_log import Telemetry
from worker.telemetry.metrics import Metrics
from worker.telemetry.recent_failures import MAX_FAILURES, MAX_TEXT, RecentFailures

if TYPE_CHECKING:
    from collections.abc import Mapping

ROOT = Path(__file__).parents[3]
DOWN = {"klaviyo": "503 to POST a.klaviyo.com/api/events", "commercetools": ""}
REFUSED = "check KLAVIYO_AUTH_KEY"
OUT = "klaviyo: 503 to POST a.klaviyo.com/api/events"


def line(**values: Any) -> dict[str, Any]:
    """Return the fields of a failure's log line."""
    return {
        "outcome": "dead_lettered",
        "message_type": "OrderCreated",
        "resource_type": "order",
        "resource_id": "o-1",
        "message_id": "7",
        "stage": "send",
        "error": "Rejected",
        "reason": "Klaviyo answered 400",
        "attempt": 1,
        "duration_s": 0.1,
    } | values


def status(state: FakeWorkerState | None = None, telemetry: Telemetry | None = None, **values: Any) -> Status:
    return Status(settings_for(**values), state or FakeWorkerState(), telemetry or Telemetry(Metrics("embedded")))


TELEMETRY = Telemetry(Metrics("embedded"))
STATUS = status(telemetry=TELEMETRY)  # shared, because hypothesis renders it a hundred times


@pytest.mark.parametrize(
    ("values", "recently", "state", "severity", "reasons"),
    [
        ({}, True, "running", "good", []),
        ({}, False, "running", "good", []),
        ({"in_flight": 0}, True, "running", "good", []),
        (
            {"in_flight": 0},
            False,
            "idle",
            "quiet",
            ["the queue has had no messages for this worker in the last minute"],
        ),
        ({"has_received": False}, False, "starting", "quiet", ["the queue has not answered yet"]),
        ({"outage_reasons": DOWN}, True, "running", "warning", [OUT]),
        ({"outage_reasons": DOWN, "in_flight": 0, "held": 0}, False, "running", "warning", [OUT]),
        ({"outage_reasons": DOWN, "paused_reason": "503"}, False, "paused", "warning", [OUT]),
        ({"parked_reason": REFUSED}, True, "parked", "bad", [REFUSED]),
        ({"parked_reason": REFUSED, "has_received": False}, True, "parked", "bad", [REFUSED]),
        ({"parked_reason": REFUSED, "outage_reasons": DOWN}, True, "parked", "bad", [REFUSED, OUT]),
        (
            {"stall_reason": "events-1 has ended", "parked_reason": REFUSED},
            True,
            "stalled",
            "bad",
            ["events-1 has ended"],
        ),
        (
            {"is_stopping": True, "parked_reason": REFUSED, "stall_reason": "events-1 has ended"},
            True,
            "stopping",
            "quiet",
            [],
        ),
    ],
)
def test_condition_is_the_most_important_state_with_its_reasons(
    values: Mapping[str, Any], *, recently: bool, state: str, severity: str, reasons: list[str]
) -> None:
    """A state that needs no action has no advice."""
    condition = condition_of(FakeWorkerState(**values), settled_recently=recently)
    assert (condition.state, condition.severity, list(condition.reasons)) == (state, severity, reasons)
    assert bool(condition.advice) == (state in {"parked", "stalled", "stopping"} or OUT in reasons)


def test_refused_endpoint_is_shown_while_messages_wait_for_it() -> None:
    """A missing scope is tolerated if no message needs it, such as the scope for discount codes."""
    reasons = ["Klaviyo answered 403 to POST /api/data-privacy-deletion-jobs: check KLAVIYO_AUTH_KEY and its scopes"]
    waiting = condition_of(FakeWorkerState(refused_endpoints=reasons, held=1), settled_recently=True)
    assert (waiting.state, waiting.severity, waiting.reasons) == ("running", "warning", reasons)
    assert "all others continue" in waiting.advice
    idle = condition_of(FakeWorkerState(refused_endpoints=reasons, held=0), settled_recently=True)
    assert idle.severity == "good"


def test_recent_failures_are_limited_and_newest_first() -> None:
    """Memory does not grow with the uptime of the worker."""
    failures = RecentFailures()
    for number in range(MAX_FAILURES + 5):
        failures.add(line(reason=f"reason {number}"))
    kept = failures.newest()
    assert [failure["reason"] for failure in kept] == [f"reason {number}" for number in range(MAX_FAILURES + 4, 4, -1)]
    assert kept[0].keys() >= {"at", "message_type", "stage", "outcome", "resource_type", "resource_id", "attempt"}


def test_one_kind_of_broken_message_is_one_entry() -> None:
    """Sizes and positions differ from message to message. They must not displace all other failures."""
    failures = RecentFailures()
    failures.add(line(reason="503 to POST a.klaviyo.com/api/events"))
    failures.add(line(reason="500 to POST a.klaviyo.com/api/events"))
    for number in range(1_000, 3_000):
        failures.add(line(reason=f"the message has {number:,} values"))
        failures.add(line(reason=f"Invalid input at /data/events/{number}/time"))
    newest = [(failure["reason"], failure["times"]) for failure in failures.newest()]
    assert newest == [
        ("Invalid input at /data/events/2999/time", 2_000),
        ("the message has 2,999 values", 2_000),
        ("500 to POST a.klaviyo.com/api/events", 1),
        ("503 to POST a.klaviyo.com/api/events", 1),
    ]


def test_repeated_failure_is_counted() -> None:
    """An outage with a thousand messages must not displace a dead letter. The newest message is shown."""
    failures = RecentFailures()
    failures.add(line(outcome="held", message_id="1"))
    failures.add(line())
    for number in range(1000):
        failures.add(line(outcome="held", message_type="CustomerCreated", message_id=str(number)))
    newest = [(f["outcome"], f["message_type"], f["message_id"], f["times"]) for f in failures.newest()]
    assert newest == [("held", "CustomerCreated", "999", 1001), ("dead_lettered", "OrderCreated", "7", 1)]


@example({"reason": "x" * MAX_TEXT, "resource_id": "x" * (MAX_TEXT + 1)})
@given(st.dictionaries(st.sampled_from(sorted(line())), st.text(st.characters(), max_size=2 * MAX_TEXT)))
def test_data_is_bounded_json_for_any_message(values: dict[str, Any]) -> None:
    """Types, ids and reasons can contain lone surrogates, quotes and tags."""
    TELEMETRY.failures = RecentFailures()
    TELEMETRY.failures.add(line(**values))
    (failure,) = json.loads(STATUS.render().decode("ascii"))["failures"]
    for name, value in values.items():
        if name in failure:
            assert failure[name] == (value if len(value) <= MAX_TEXT else f"{value[: MAX_TEXT - 1]}…")


def test_charts_show_rates_and_ages_by_step() -> None:
    """Rates are computed from the actual time between two samples. `failed` excludes returned messages."""
    metrics = Metrics("embedded")
    history = History(metrics)
    metrics.record_settled("OrderCreated", "sent", 0.1, 50.0)  # before the first sample, so no step counts it
    history.sample(100.0, 0.0)
    for outcome in ("sent", "sent", "ignored", "retried", "dead_lettered", "returned"):
        metrics.record_settled("OrderCreated", outcome, 0.1, 3.0 if outcome == "sent" else 9.0)
    history.sample(102.0, 7.26)
    history.sample(107.0, None)
    assert history.series(110.0) == {
        "ago": [8.0, 3.0],
        "sent": [1.0, 0.0],
        "ignored": [0.5, 0.0],
        "failed": [1.0, 0.0],
        "age": [5.0, None],
        "oldest": [7.3, None],
    }


def test_history_is_bounded() -> None:
    """Ten minutes of messages and one minute of requests and batches are kept."""
    metrics = Metrics("embedded")
    history = History(metrics)
    for number in range(3 * STEPS):
        metrics.record_request("klaviyo", "POST /api/events", 202, 0.1)
        metrics.record_batch(number)
        metrics.record_settled("OrderCreated", "sent", 0.1, 1.0)
        history.sample(number * STEP, 0.0)
    series = history.series(3 * STEPS * STEP)
    assert {len(values) for values in series.values()} == {STEPS}
    assert all(before - after == STEP for before, after in pairwise(series["ago"]))
    assert (series["ago"][0], series["ago"][-1]) == (STEPS * STEP, STEP)
    assert history.recent_requests() == {("klaviyo", "POST /api/events"): 12}
    assert history.recently_settled() == 12
    metrics.record_settled("OrderCreated", "sent", 0.1, 1.0)
    assert history.recently_settled() == 13  # it is counted before the next sample
    assert history.recent_batch_size() == 3 * STEPS - 6.5  # the mean of the last twelve batches


def test_document_is_complete_before_the_first_sample() -> None:
    """The page can be requested immediately after the start."""
    document = status().document()
    assert document["history"] == {
        "step": STEP,
        "ago": [],
        "sent": [],
        "ignored": [],
        "failed": [],
        "age": [],
        "oldest": [],
    }
    assert (document["batch"], document["outcomes"], document["failures"]) == (None, [], [])


def test_rate_limits_are_those_of_this_worker() -> None:
    """They are reduced to RATE_LIMIT_SHARE. Endpoints without requests in the last minute are left out."""
    metrics = Metrics("embedded")
    used = FakeWorkerState().rate_limit_status()["POST /api/events"]
    limits = {"GET /api/events": used._replace(waiting=0), "POST /api/events": used}
    page = status(FakeWorkerState(rate_limit_status=limits), Telemetry(metrics), rate_limit_share=0.5)
    page.sample(0.0)
    for service in ("klaviyo", "commercetools"):
        metrics.record_request(service, "POST /api/events", 202, 0.1)
    page.sample(5.0)
    document = page.document()
    assert document["bulk_events"] == {"in_bulk": True, "reason": "the account ignores repeats"}
    assert document["limits"] == [
        {
            "endpoint": "POST /api/events",
            "used": 1,
            "steady": 1750,
            "burst": 175,
            "burst_used": 0.25,
            "pace": 3100,
            "remaining": 2900,
            "waiting": 2,
        }
    ]
    assert document["services"] == [
        {"service": "klaviyo", "outage": "", "requests": 1},
        {"service": "commercetools", "outage": "", "requests": 1},
    ]


def test_outcomes_are_listed_by_type_the_most_frequent_first() -> None:
    """Types without messages are left out."""
    metrics = Metrics("embedded")
    for kind, outcome in ((None, "dead_lettered"), ("OrderCreated", "sent"), ("OrderCreated", "ignored")):
        metrics.record_settled(kind, outcome, 0.1, None)
    zeros = {"sent": 0, "ignored": 0, "retried": 0, "dead_lettered": 0, "returned": 0}
    assert status(telemetry=Telemetry(metrics)).document()["outcomes"] == [
        zeros | {"type": "OrderCreated", "sent": 1, "ignored": 1},
        zeros | {"type": "unreadable", "dead_lettered": 1},
    ]


def test_messages_that_are_not_served_are_counted_by_the_setting_that_excludes_them() -> None:
    """A queue that another project shares looks busy, but nothing arrives in Klaviyo."""
    metrics = Metrics("embedded")
    for setting in ("project", "project", "stores"):
        metrics.record_excluded(setting)
    document = status(telemetry=Telemetry(metrics)).document()
    assert document["excluded"] == {"project": 2, "stores": 1, "countries": 0}
    assert document["worker"]["project"] == settings_for().ct_project_id


def test_document_is_complete_if_the_queue_cannot_count() -> None:
    """The page helps to find the cause."""
    messages = status(FakeWorkerState(backlog=RuntimeError("grete@mail.example"))).document()["messages"]
    assert (messages["backlog"], messages["dead_letters"], messages["in_flight"]) == (None, None, 7)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("embedded:///var/lib/queue.db", "embedded:///var/lib/queue.db"),
        ("pubsub://project/subscription", "pubsub://project/subscription"),
        ("push://0.0.0.0:8080?audience=x&service_account=a@b.example", "push://0.0.0.0:8080"),
        ("sqs://name?region=eu-central-1#x", "sqs://name"),
        ("amqp://user:pa/ss@host/queue", "amqp://host/queue"),
    ],
)
def test_queue_url_is_shown_without_query_and_credentials(url: str, shown: str) -> None:
    """The other parts are shown unchanged."""
    assert redact(url) == shown


@given(st.text(st.characters(exclude_characters="?#")), st.text())
def test_secrets_of_a_queue_url_are_redacted(password: str, token: str) -> None:
    """The parts before an @ and after a ? can be secret, also in queues of other packages."""
    assert redact(f"amqp://user:{password}@host/queue?token={token}") == "amqp://host/queue"


def test_wheel_contains_all_files_that_are_not_modules() -> None:
    """Otherwise an installed worker would lack the files of its page."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    packed = {
        path
        for package, patterns in config["options.package_data"].items()
        for pattern in patterns.split(", ")
        for path in (ROOT / package.replace(".", "/")).glob(pattern)
    }
    files = {path for name in ("adapters", "worker") for path in (ROOT / name).rglob("*") if path.is_file()}
    assert {path for path in files if path.suffix not in {".py", ".pyc"}} == packed
