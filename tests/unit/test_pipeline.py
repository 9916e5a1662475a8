"""The journey of a message: which errors ack, nack, dead-letter, hold or park it."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Any

import pytest

from adapters.base import Failure, QueueError
from tests.conftest import FakeDelivery
from worker.errors import (
    CircuitOpen,
    Disposition,
    JobUnfinished,
    KlaviyoMisconfigured,
    NotShownYet,
    Rejected,
    RequestBlocked,
    StaleRead,
    StateChanged,
    Transient,
    WorkerError,
)
from worker.mapping import MappingConfig
from worker.model import (
    UNKNOWN_TIME,
    Ended,
    Ending,
    Enriched,
    Message,
    Notification,
    Operation,
    OperationKind,
    SendResult,
)
from worker.pipeline import MAX_READINGS, MAX_TIMES_BLOCKED, Pipeline
from worker.telemetry.message_log import Telemetry
from worker.telemetry.metrics import Metrics
from worker.versions import READ_LAG

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from adapters.base import Delivery
    from worker.model import ResourceKey


@dataclass
class RecordingQueue:
    """A fake queue that records how deliveries are settled."""

    settled: list[tuple[str, str, float, str]] = field(default_factory=list)  # method, id, delay, reason
    can_dead_letter: bool = True
    dead_letters: list[Failure] = field(default_factory=list)
    lease_seconds: float = 60.0

    def ack(self, deliveries: Sequence[Delivery]) -> None:
        self.settled += [("ack", d.id, 0.0, "") for d in deliveries]

    def nack(self, deliveries: Sequence[Delivery], delay: float = 0.0, failure: Failure | None = None) -> None:
        self.settled += [("nack", d.id, delay, failure.reason if failure else "") for d in deliveries]

    def dead_letter(self, delivery: Delivery, failure: Failure) -> bool:
        self.settled.append(("dead_letter", delivery.id, 0.0, failure.reason))
        self.dead_letters.append(failure)
        return self.can_dead_letter


class Stages:
    """Fake enrich and send stages that fail for the given resources."""

    def __init__(self) -> None:
        self.enrich_errors: dict[str, Exception] = {}
        self.send_errors: dict[str, list[WorkerError | None]] = {}
        self.crash_in = ""
        self.name = "Ada"
        self.versions: dict[str, int | None] = {}  # of customers: None is gone, the default is 1
        self.before_read: Callable[[], None] = lambda: None
        self.requests = 2
        self.follow_ups: dict[str, frozenset[ResourceKey]] = {}
        self.seen: list[Collection[ResourceKey]] = []
        self.enriched: list[list[str]] = []
        self.read_at: list[datetime] = []
        self.sent: list[Operation] = []

    def enrich(self, notifications: Sequence[Notification]) -> list[Enriched | WorkerError]:
        if self.crash_in == "enrich":
            raise KeyError("ada@example.com")
        self.before_read()
        self.enriched.append([n.resource_id for n in notifications])
        self.seen += [notification.seen for notification in notifications]
        return [self.enrich_errors.get(n.resource_id) or self._with_customer(n) for n in notifications]  # type: ignore[misc]

    def _with_customer(self, notification: Notification) -> Enriched:
        name = notification.resource_id
        version = self.versions.get(name, 1)
        customer: dict[str, object] | None = {"id": name, "email": "ada@example.com", "firstName": self.name}
        if version is None:
            customer = None
        missing = "customer" if version is None else ""
        versions = {("customer", name): version}
        self.read_at.append(datetime.now(UTC))
        return Enriched(notification, self.read_at[-1], customer=customer, versions=versions, missing=missing)

    def send(self, operations: Sequence[Operation]) -> list[SendResult]:
        self.sent += operations
        if self.crash_in == "send":
            raise KeyError("ada@example.com")
        return [
            SendResult(
                (self.send_errors.get(operation.key) or [None])[0],
                self.requests,
                follow_ups=self.follow_ups.get(operation.key, frozenset()),
            )
            for operation in operations
        ]


@pytest.fixture
def stages() -> Stages:
    return Stages()


@pytest.fixture
def recorded() -> RecordingQueue:
    return RecordingQueue()


@pytest.fixture
def pipeline(stages: Stages, recorded: RecordingQueue) -> Pipeline:
    return Pipeline(recorded, stages.enrich, stages.send, MappingConfig(), Telemetry(Metrics("embedded")))  # type: ignore[arg-type]


def updated(customer: str, attempt: int | None = 1, **fields: object) -> FakeDelivery:
    body = {"notificationType": "ResourceUpdated", "resource": {"typeId": "customer", "id": customer}}
    return FakeDelivery(json.dumps(body | fields).encode(), id=customer, attempt=attempt)


def deleted(customer: str) -> FakeDelivery:
    return updated(customer, notificationType="ResourceDeleted", dataErasure=False)


def run(pipeline: Pipeline, *deliveries: FakeDelivery) -> list[Message]:
    return pipeline.process([pipeline.parse(delivery) for delivery in deliveries])


def test_message_is_acked_when_its_effect_is_in_klaviyo(pipeline: Pipeline, recorded: RecordingQueue) -> None:
    """Messages of a batch are acked together, in order."""
    assert run(pipeline, updated("a"), updated("b")) == []
    assert recorded.settled == [("ack", "a", 0.0, ""), ("ack", "b", 0.0, "")]


def test_redelivery_during_an_ack_is_acked_too(
    pipeline: Pipeline, recorded: RecordingQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lease ended while the queue was unreachable. The new delivery would stay until its lease ends."""
    message = pipeline.parse(updated("a"))
    ack = recorded.ack
    redelivered = [updated("a")]

    def ack_and_redeliver(deliveries: Sequence[Delivery]) -> None:
        ack(deliveries)
        if redelivered:
            message.delivery = redelivered.pop()

    monkeypatch.setattr(recorded, "ack", ack_and_redeliver)
    pipeline.process([message])
    assert recorded.settled == [("ack", "a", 0.0, "")] * 2


@pytest.mark.parametrize(
    ("method", "error"), [("nack", WorkerError("bad")), ("dead_letter", Rejected("bad")), ("ack", None)]
)
def test_message_is_marked_before_it_is_nacked(
    method: str,
    error: WorkerError | None,
    pipeline: Pipeline,
    recorded: RecordingQueue,
    stages: Stages,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The queue can redeliver it during the call. An ack is repeated instead."""
    if error:
        stages.enrich_errors["a"] = error
    message = pipeline.parse(updated("a"))
    marked: list[bool] = []
    monkeypatch.setattr(recorded, method, lambda *_: marked.append(message.is_returned))
    pipeline.process([message])
    assert marked == [method != "ack"]


@pytest.mark.parametrize("method", ["nack", "dead_letter"])
def test_no_message_is_acked_if_another_one_cannot_be_settled(
    method: str,
    pipeline: Pipeline,
    recorded: RecordingQueue,
    stages: Stages,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The worker ends because of the error, so the queue must redeliver the whole batch."""
    stages.enrich_errors["bad"] = WorkerError("bad") if method == "nack" else Rejected("bad")

    def fail(*_: object) -> None:
        raise QueueError("gone")

    monkeypatch.setattr(recorded, method, fail)
    with pytest.raises(QueueError):
        run(pipeline, updated("a"), updated("bad"), updated("b"))
    assert recorded.settled == []


def test_batch_is_enriched_in_one_call(pipeline: Pipeline, stages: Stages) -> None:
    """Messages that already have an outcome are left out."""
    run(pipeline, updated("a"), FakeDelivery(b"bad"), updated("b"))
    assert stages.enriched == [["a", "b"]] * 2


@pytest.mark.parametrize(
    "body",
    [
        b'{"notificationType": "ResourceCreated", "resource": {"typeId": "subscription", "id": "s"}}',
        b'{"notificationType": "Message", "type": "NewThing", "resource": {"typeId": "order", "id": "o"}}',
        b'{"notificationType": "Event", "type": "ImportContainerCreated"}',
    ],
    ids=["test notification", "unknown type", "event"],
)
def test_message_without_effect_is_acked_without_reading_commercetools(
    body: bytes, pipeline: Pipeline, recorded: RecordingQueue, stages: Stages
) -> None:
    """These are commercetools' test notification, unknown types and Event notifications."""
    message = pipeline.parse(FakeDelivery(body))
    assert pipeline.process([message]) == []
    assert recorded.settled == [("ack", "1", 0.0, "")]
    assert pipeline._telemetry.endings == {Ending.IGNORED: 1}
    assert stages.enriched == []


@pytest.mark.parametrize(
    ("project", "method", "reason"),
    [
        ("acme", "ack", ""),
        ("acme-staging", "ack", "from the commercetools project acme-staging, but CT_PROJECT_ID is acme"),
        ("ada@example.com", "ack", "from another commercetools project, but CT_PROJECT_ID is acme"),
        (None, "dead_letter", "expected `projectKey`, a string"),
        (["acme"], "dead_letter", "expected `projectKey`, a string"),
    ],
)
def test_only_messages_of_this_project_are_processed(
    project: object, method: str, reason: str, stages: Stages, recorded: RecordingQueue
) -> None:
    """Staging and production can share a queue. Nothing is fetched for a message of another project."""
    telemetry = Telemetry(Metrics("embedded"))
    pipeline = Pipeline(recorded, stages.enrich, stages.send, MappingConfig(), telemetry, project="acme")  # type: ignore[arg-type]
    message = pipeline.parse(updated("a", projectKey=project))
    assert pipeline.process([message]) == []
    assert recorded.settled[0][0] == method
    assert message.outcome
    assert message.outcome.reason.startswith(reason)
    assert bool(stages.enriched) == (project == "acme")
    assert telemetry.metrics.excluded()["project"] == (method == "ack" and bool(reason))


def test_bad_message_does_not_affect_the_others_of_its_batch(
    pipeline: Pipeline, recorded: RecordingQueue, stages: Stages
) -> None:
    """Each message of a batch has its own outcome."""
    stages.enrich_errors["down"] = Transient("commercetools answered 500")
    stages.send_errors["rejected"] = [Rejected("400 invalid")]
    stages.versions["gone"] = None
    held = run(
        pipeline, updated("good"), FakeDelivery(b"[]", id="bad"), updated("down"), updated("rejected"), deleted("gone")
    )
    assert [message.delivery.id for message in held] == ["down"]
    assert {(method, name) for method, name, *_ in recorded.settled} == {
        ("ack", "good"),
        ("dead_letter", "bad"),
        ("dead_letter", "rejected"),
        ("ack", "gone"),
    }


def test_dead_letter_has_the_type_and_resource_of_its_message(
    pipeline: Pipeline, recorded: RecordingQueue, stages: Stages
) -> None:
    """The failure of an unreadable message has neither."""
    stages.send_errors["rejected"] = [Rejected("400 invalid")]
    run(pipeline, updated("rejected"), FakeDelivery(b"[]"))
    rejected, unreadable = recorded.dead_letters
    assert rejected == Failure("400 invalid", "send", "Rejected", "ResourceUpdated", "customer", "rejected")
    assert (unreadable.stage, unreadable.error, unreadable.message_type) == ("parse", "Rejected", "")


@pytest.mark.parametrize(
    "error", [Transient("503"), KlaviyoMisconfigured("401")], ids=["an outage", "refused credentials"]
)
def test_message_is_held_during_an_outage_and_while_parked(
    error: WorkerError, pipeline: Pipeline, recorded: RecordingQueue, stages: Stages
) -> None:
    """It is not settled, so it can be processed again without using up an attempt."""
    stages.send_errors["a"] = [error]
    held = run(pipeline, updated("a"), updated("b"))
    assert [message.delivery.id for message in held] == ["a"]
    assert recorded.settled == [("ack", "b", 0.0, "")]
    stages.send_errors.clear()
    assert pipeline.process(held) == []
    assert recorded.settled[1:] == [("ack", "a", 0.0, "")]


@pytest.mark.parametrize("stage", ["enrich", "send"])
def test_message_that_is_blocked_several_times_in_a_row_is_dead_lettered(
    stage: str, pipeline: Pipeline, recorded: RecordingQueue, stages: Stages
) -> None:
    """A firewall refuses its data. An outage in between starts the count again, because a firewall can be at fault."""
    blocked, outage = RequestBlocked("403 with a page"), Transient("503")
    messages = [pipeline.parse(updated("x"))]
    for error in [blocked] * (MAX_TIMES_BLOCKED - 1) + [outage] + [blocked] * (MAX_TIMES_BLOCKED - 1):
        stages.enrich_errors = {"x": error} if stage == "enrich" else {}
        stages.send_errors = {"x": [error]} if stage == "send" else {}
        assert pipeline.process(messages) == messages
    stages.enrich_errors = {"x": blocked} if stage == "enrich" else {}
    stages.send_errors = {"x": [blocked]} if stage == "send" else {}
    assert pipeline.process(messages) == []
    assert recorded.settled == [("dead_letter", "x", 0.0, "403 with a page, 5 times in a row")]


@pytest.mark.parametrize(("attempt", "delay"), [(None, 60), (1, 60), (8, 256), (100, 600)])
def test_message_that_was_held_too_long_is_nacked_with_its_reason(
    attempt: int | None, delay: float, pipeline: Pipeline, recorded: RecordingQueue, stages: Stages
) -> None:
    """The delay doubles with every attempt, because attempts are limited."""
    stages.enrich_errors["a"] = Transient("500")
    pipeline.nack_held(run(pipeline, updated("a", attempt)), 60.0)
    assert recorded.settled == [("nack", "a", delay, "500")]


@pytest.mark.parametrize(("attempt", "delay"), [(None, 2), (1, 2), (2, 4), (5, 32), (100, 600)])
def test_nack_delay_doubles_with_every_attempt(
    attempt: int | None, delay: float, pipeline: Pipeline, recorded: RecordingQueue, stages: Stages
) -> None:
    """The delay is limited to MAX_DELAY."""
    stages.crash_in = "send"
    run(pipeline, updated("a", attempt))
    ((method, _, seconds, _),) = recorded.settled
    assert (method, seconds) == ("nack", delay)


@pytest.mark.parametrize("stage", ["enrich", "send"])
def test_unexpected_error_in_enrich_or_send_nacks_the_batch(
    stage: str, pipeline: Pipeline, recorded: RecordingQueue, stages: Stages
) -> None:
    """The text of the error is left out of the reason, because it can contain personal data."""
    stages.crash_in = stage
    run(pipeline, updated("a"))
    ((method, _, _, reason),) = recorded.settled
    assert method == "nack"
    assert "KeyError" in reason
    assert "ada" not in reason


def test_unexpected_error_in_a_pure_stage_dead_letters_the_message(
    pipeline: Pipeline, recorded: RecordingQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A retry would fail again. The dead letter can be replayed after the defect is fixed."""

    def broken(*_: object, **__: object) -> None:
        raise TypeError("ada@example.com")

    monkeypatch.setattr("worker.pipeline.transform", broken)
    run(pipeline, updated("a"))
    ((method, _, _, reason),) = recorded.settled
    assert method == "dead_letter"
    assert "TypeError" in reason
    assert "ada" not in reason


def test_precedence_of_the_dispositions_of_operations() -> None:
    """A retry fails again for the rejected operation, but a dead letter would lose the other operations."""
    from worker.pipeline import _PRECEDENCE

    assert _PRECEDENCE == (
        Disposition.PARK,
        Disposition.HOLD,
        Disposition.WAIT,
        Disposition.NACK,
        Disposition.DEAD_LETTER,
    )


ORDER = {"id": "o", "customerEmail": "ada@example.com"}


def created(attempt: int | None) -> FakeDelivery:
    body = {"notificationType": "Message", "type": "OrderCreated", "resource": {"typeId": "order", "id": "o"}}
    return FakeDelivery(json.dumps(body).encode(), attempt=attempt)


@pytest.fixture
def order_pipeline(stages: Stages, recorded: RecordingQueue) -> Pipeline:
    def enrich(notifications: Sequence[Notification]) -> list[Enriched]:
        return [Enriched(n, datetime.now(UTC), order=ORDER) for n in notifications]

    return Pipeline(recorded, enrich, stages.send, MappingConfig(), Telemetry(Metrics("embedded")))  # type: ignore[arg-type]


def firsts(stages: Stages) -> list[str]:
    return [(operation.resource or {})["attributes"]["first_name"] for operation in stages.sent]


def test_state_is_acked_after_a_second_reading_shows_the_written_version(
    pipeline: Pipeline, recorded: RecordingQueue, stages: Stages
) -> None:
    """It is written once."""
    assert run(pipeline, updated("a"), updated("b")) == []
    assert [operation.key for operation in stages.sent] == ["a", "b"]
    assert stages.enriched == [["a", "b"], ["a", "b"]]
    assert [entry[:2] for entry in recorded.settled] == [("ack", "a"), ("ack", "b")]


def test_state_that_changed_while_it_was_written_is_written_again(
    pipeline: Pipeline, recorded: RecordingQueue, stages: Stages
) -> None:
    """Another worker has possibly written the newer state before. Only the changed resource is written again."""
    readings = iter([("Ada", 1), ("Grace", 2), ("Grace", 2)])

    def change() -> None:
        stages.name, stages.versions["a"] = next(readings)

    stages.before_read = change
    assert run(pipeline, updated("a"), updated("b")) == []
    assert firsts(stages) == ["Ada", "Ada", "Grace"]
    assert [entry[:2] for entry in recorded.settled] == [("ack", "a"), ("ack", "b")]


def test_message_with_follow_ups_is_processed_again(
    pipeline: Pipeline, recorded: RecordingQueue, stages: Stages
) -> None:
    """It is acked when a write has named no new ones, and a reading has confirmed that write."""
    stages.follow_ups["a"] = frozenset({("sku", "s")})
    assert run(pipeline, updated("a")) == []
    assert stages.seen == [(), (("customer", "a"), ("sku", "s")), (("customer", "a"), ("sku", "s"))]
    assert [operation.key for operation in stages.sent] == ["a", "a"]
    assert [entry[:2] for entry in recorded.settled] == [("ack", "a")]


def test_state_that_keeps_changing_is_held_and_compared_later(
    pipeline: Pipeline, recorded: RecordingQueue, stages: Stages
) -> None:
    """The next attempt begins with the reading that the last write lacks."""
    version = count(1)

    def change() -> None:
        stages.versions["a"] = next(version)

    stages.before_read = change
    (held,) = run(pipeline, updated("a"))
    assert isinstance(held.outcome and held.outcome.cause, StateChanged)
    assert len(stages.sent) == MAX_READINGS
    stages.before_read = lambda: None
    assert pipeline.process([held]) == []
    assert len(stages.sent) == MAX_READINGS
    assert pipeline._telemetry.endings == {Ending.SENT: 1}


@pytest.mark.parametrize("read_error", [CircuitOpen("down"), None])
def test_written_state_is_only_compared_after_a_failed_second_reading(
    read_error: WorkerError | None, pipeline: Pipeline, recorded: RecordingQueue, stages: Stages
) -> None:
    """A lower version than the written one is a failed reading, too: replicas can lag."""

    def fail() -> None:
        if stages.sent and read_error:
            stages.enrich_errors["a"] = read_error
        elif stages.sent:
            stages.versions["a"] = 1

    stages.before_read = fail
    stages.versions["a"] = 2
    (held,) = run(pipeline, updated("a"))
    assert recorded.settled == []
    stages.before_read = lambda: None
    stages.enrich_errors.clear()
    stages.versions["a"] = 2
    held.enriched, held.operations = None, ()  # as the lane does
    assert pipeline.process([held]) == []
    assert len(stages.sent) == 1
    assert pipeline._telemetry.endings == {Ending.SENT: 1}


def test_failed_write_is_repeated_even_if_the_version_is_the_same(pipeline: Pipeline, stages: Stages) -> None:
    """It may have changed Klaviyo in part."""
    readings = iter([1, 2, 1])

    def change() -> None:
        stages.versions["a"] = next(readings, 2)
        if len(stages.sent) == 1:
            stages.send_errors["a"] = [Transient("no answer")]

    stages.before_read = change
    (held,) = run(pipeline, updated("a"))
    stages.send_errors.clear()
    stages.before_read = lambda: None
    stages.versions["a"] = 2
    assert pipeline.process([held]) == []
    assert len(stages.sent) == 3


@pytest.mark.parametrize(
    "fields",
    [{"version": 5}, {"notificationType": "Message", "type": "CustomerCreated", "version": 1, "resourceVersion": 5}],
)
def test_version_below_that_of_the_message_is_never_written(
    fields: dict[str, Any],
    pipeline: Pipeline,
    recorded: RecordingQueue,
    stages: Stages,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It proves that the reading is stale, however old the message is and whatever the clock says."""
    stages.versions["a"] = 4
    message = pipeline.parse(updated("a", **fields))
    message.received_at -= 1_000_000
    assert pipeline.process([message]) == [message]
    assert isinstance(message.outcome and message.outcome.cause, StaleRead)
    assert stages.sent == []
    message.due_at = 1.0
    assert pipeline.process([message]) == [message]
    assert [record.message for record in caplog.records] == ["reading_stale"]
    stages.versions["a"] = 5
    assert pipeline.process([message]) == []
    assert [entry[:2] for entry in recorded.settled] == [("ack", "a")]


def with_erasure(stages: Stages, recorded: RecordingQueue, *, erasure: bool = True) -> Pipeline:
    mapping = MappingConfig.model_validate({"customer": {"erasure": erasure}})
    return Pipeline(recorded, stages.enrich, stages.send, mapping, Telemetry(Metrics("embedded")))  # type: ignore[arg-type]


@pytest.mark.parametrize(("shown", "acked"), [(4, False), (5, False), (6, True)])
def test_deleted_resource_that_is_still_shown_is_a_stale_reading(
    shown: int, acked: bool, recorded: RecordingQueue, stages: Stages
) -> None:
    """Ids are never used again. A higher version than that of the deletion contradicts the message."""
    stages.versions["a"] = shown
    run(with_erasure(stages, recorded), updated("a", notificationType="ResourceDeleted", dataErasure=True, version=5))
    assert bool(recorded.settled) is acked
    assert stages.sent == []


def test_deleted_resource_is_read_once_more_some_seconds_after_the_first_receipt(
    recorded: RecordingQueue, stages: Stages
) -> None:
    """Possibly commercetools does not show its creation yet, and another worker reads and writes it afterwards."""
    stages.versions["a"] = None
    pipeline = with_erasure(stages, recorded)
    message = pipeline.parse(updated("a", notificationType="ResourceDeleted", dataErasure=True, version=5))
    assert pipeline.process([message]) == [message]
    assert stages.sent == []
    cause = message.outcome and message.outcome.cause
    assert isinstance(cause, NotShownYet)
    assert READ_LAG - 1 < (cause.retry_after or 0) <= READ_LAG
    message.received_at -= READ_LAG
    assert pipeline.process([message]) == []
    assert [operation.kind for operation in stages.sent] == [OperationKind.DELETE_PROFILE]


@pytest.mark.parametrize("attempt", [None, 1, 2])
def test_profile_of_a_customer_who_is_gone_at_a_redelivery_is_looked_up(
    attempt: int | None, stages: Stages, recorded: RecordingQueue
) -> None:
    """A worker that was killed possibly started a job, which created the profile after the erasure."""
    stages.versions["a"] = None
    pipeline = with_erasure(stages, recorded)
    message = pipeline.parse(updated("a", attempt=attempt))
    message.received_at -= READ_LAG
    assert pipeline.process([message]) == []
    assert [operation.created_since for operation in stages.sent] == ([UNKNOWN_TIME] if attempt == 2 else [])


@pytest.mark.parametrize("modified_at", ["2099-01-01T00:00:00Z", "1999-01-01T00:00:00Z", "when?"])
def test_resource_that_is_not_shown_counts_as_gone_some_seconds_after_the_first_receipt(
    modified_at: str, pipeline: Pipeline, recorded: RecordingQueue, stages: Stages
) -> None:
    """Neither the time in the message nor the wall clock matters."""
    stages.versions["a"] = None
    message = pipeline.parse(updated("a", version=5, modifiedAt=modified_at))
    assert pipeline.process([message]) == [message]
    cause = message.outcome and message.outcome.cause
    assert isinstance(cause, NotShownYet)
    assert 0 < (cause.retry_after or 0) <= 1
    message.received_at -= READ_LAG
    assert pipeline.process([message]) == []
    assert [entry[:2] for entry in recorded.settled] == [("ack", "a")]
    assert pipeline._telemetry.endings == {Ending.IGNORED: 1}


def test_resource_that_appears_is_written(pipeline: Pipeline, recorded: RecordingQueue, stages: Stages) -> None:
    """Its first reading came before commercetools' API returned the new resource."""
    stages.versions["a"] = None
    (message,) = run(pipeline, updated("a", version=1))
    stages.versions["a"] = 1
    assert pipeline.process([message]) == []
    assert firsts(stages) == ["Ada"]


@pytest.mark.parametrize("erasure", [True, False])
def test_profile_of_a_customer_who_is_gone_after_the_write_is_deleted_if_persons_are_erased(
    erasure: bool, stages: Stages, recorded: RecordingQueue
) -> None:
    """An erased person must not come back. Only a profile that this write created is deleted."""

    def delete() -> None:
        if stages.sent:
            stages.versions["a"] = None

    pipeline = with_erasure(stages, recorded, erasure=erasure)
    stages.before_read = delete
    message = pipeline.parse(updated("a"))
    message.received_at -= READ_LAG
    assert pipeline.process([message]) == []
    assert [entry[:2] for entry in recorded.settled] == [("ack", "a")]
    assert [operation.kind for operation in stages.sent] == [
        OperationKind.UPSERT_PROFILE,
        *([OperationKind.DELETE_PROFILE] if erasure else []),
    ]
    if erasure:
        assert stages.sent[-1].created_since == stages.read_at[0]


def test_message_of_an_unfinished_job_is_not_processed_until_the_job_has_ended(
    pipeline: Pipeline, recorded: RecordingQueue, stages: Stages
) -> None:
    """The job cannot be stopped, and it would overwrite what a worker writes. A nack delays the message as long."""
    stages.send_errors["a"] = [JobUnfinished("a job has not ended yet", 600.0)]
    (held,) = run(pipeline, updated("a"))
    stages.send_errors.clear()
    assert pipeline.process([held]) == [held]
    assert len(stages.sent) == 1
    held.not_before -= 100.0
    pipeline.nack_held([held], 60.0)
    ((method, _, delay, _),) = recorded.settled
    assert method == "nack"
    assert 490.0 < delay <= 500.0
    held.not_before -= 500.0
    held.outcome = replace(held.outcome, disposition=Disposition.HOLD) if held.outcome else None
    assert pipeline.process([held]) == []
    assert len(stages.sent) == 2


@pytest.mark.parametrize("attempt", [None, 1, 2])
def test_first_delivery_counts_if_the_worker_stops_before_a_job_has_ended(
    attempt: int | None, pipeline: Pipeline, recorded: RecordingQueue, stages: Stages
) -> None:
    """Otherwise the next worker would not know of the job, and the job would bring an erased person back."""
    stages.send_errors["a"] = [JobUnfinished("a job has not ended yet", 600.0)]
    held = run(pipeline, updated("a", attempt=attempt))
    pipeline.give_back([*held, pipeline.parse(updated("b"))])
    assert recorded.settled == [
        ("nack", "a", 600.0, "the worker stopped before a bulk job ended" if attempt == 1 else ""),
        ("nack", "b", 0, ""),
    ]


def test_unfinished_job_delays_its_message_even_if_another_operation_parks_it(
    pipeline: Pipeline, stages: Stages, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The parked message returns when access is restored, but not before the job has ended."""
    operations = tuple(Operation(OperationKind.UPSERT_ITEM, key) for key in "ab")
    monkeypatch.setattr("worker.pipeline.transform", lambda *_, **__: operations)
    stages.send_errors = {"a": [KlaviyoMisconfigured("401")], "b": [JobUnfinished("a job has not ended yet", 600.0)]}
    (held,) = run(pipeline, updated("a"))
    assert held.outcome is not None
    assert held.outcome.disposition is Disposition.PARK
    assert held.not_before > time.monotonic() + 590


def test_events_are_never_stale(order_pipeline: Pipeline, recorded: RecordingQueue, stages: Stages) -> None:
    """An event describes the past, so there is no newer state to read."""
    assert run(order_pipeline, created(1)) == []
    assert [entry[:2] for entry in recorded.settled] == [("ack", created(1).id)]


def test_message_without_operations_and_outcome_is_nacked(
    pipeline: Pipeline, recorded: RecordingQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only a defect can cause this. The message must not be lost."""
    monkeypatch.setattr("worker.pipeline.transform", lambda *_, **__: ())
    run(pipeline, updated("a"))
    ((method, _, _, reason),) = recorded.settled
    assert (method, reason) == ("nack", "transform returned no operations and no reason; please report it")


def test_message_with_one_failed_operation_is_held(recorded: RecordingQueue, stages: Stages) -> None:
    """All its operations are retried. Repeating those that succeeded has no second effect."""
    line = {"id": "l1", "totalPrice": {"centAmount": 1, "fractionDigits": 2, "currencyCode": "EUR"}}
    order = {"id": "o", "customerEmail": "ada@example.com", "lineItems": [line, line | {"id": "l2"}]}
    body = {"notificationType": "Message", "type": "OrderCreated", "resource": {"typeId": "order", "id": "o"}}
    results = [SendResult(None, 1), SendResult(None, 1), SendResult(Transient("503"), 3)]
    pipeline = Pipeline(
        recorded,  # type: ignore[arg-type]
        lambda notifications: [Enriched(n, datetime.now(UTC), order=order) for n in notifications],
        lambda operations: results[: len(operations)],
        MappingConfig(),
        Telemetry(Metrics("embedded")),
    )
    (message,) = run(pipeline, FakeDelivery(json.dumps(body).encode()))
    assert recorded.settled == []
    assert message.requests == 5
    pipeline.process([message])
    assert message.requests == 10


def test_message_that_the_queue_does_not_dead_letter_yet_has_outcome_retried(
    pipeline: Pipeline, recorded: RecordingQueue, caplog: pytest.LogCaptureFixture
) -> None:
    """If the queue's policy dead-letters messages, only the last attempt has outcome dead_lettered."""
    for recorded.can_dead_letter in (False, True):
        with caplog.at_level("WARNING"):
            run(pipeline, FakeDelivery(b"unreadable"))
    assert [method for method, *_ in recorded.settled] == ["dead_letter"] * 2
    assert [vars(record)["outcome"] for record in caplog.records] == ["retried", "dead_lettered"]


def test_endings_are_reported_to_the_listener(recorded: RecordingQueue, stages: Stages) -> None:
    """Backfills and replays rely on them: every message has one ending, whatever its log line says."""
    ended: list[Ended] = []
    telemetry = Telemetry(Metrics("embedded"))
    listener = type("Listener", (), {"on_endings": lambda _, given: ended.extend(given)})()
    pipeline = Pipeline(recorded, stages.enrich, stages.send, MappingConfig(), telemetry, listener)  # type: ignore[arg-type]
    stages.enrich_errors |= {"b": Rejected("400"), "c": Transient("503"), "d": WorkerError("a defect")}
    (held,) = run(pipeline, *(updated(name) for name in "abcd"))
    endings = {message.delivery.id: ending for message, ending in ended}
    assert endings == {"a": Ending.SENT, "b": Ending.DEAD_LETTERED, "d": Ending.RETRIED}
    held.not_before = time.monotonic() + 10.5
    pipeline.give_back([held, pipeline.parse(updated("e"))], 2.0)
    assert [(message.delivery.id, ending) for message, ending in ended[3:]] == [
        ("c", Ending.RETURNED),
        ("e", Ending.RETURNED),
    ]
    assert [entry[1:3] for entry in recorded.settled[3:]] == [("c", 11), ("e", 2.0)]
    assert telemetry.endings == {}


def failing_with(shared: Transient, notifications: Sequence[Notification]) -> list[WorkerError]:
    """Fail as the enrich stage does: messages share an error that was raised while another one was handled."""
    with pytest.raises(Transient):  # noqa: PT012 - an error that has a context
        try:
            json.loads("")
        except ValueError:
            raise shared from None
    return [shared] * len(notifications)


def test_cause_of_a_held_message_keeps_no_frames(pipeline: Pipeline) -> None:
    """Otherwise the frames of its tracebacks would keep the data of all their batches in memory."""
    shared = Transient("503")
    pipeline._enrich_all = partial(failing_with, shared)
    held = run(pipeline, updated("a"), updated("b"))
    assert [message.outcome and message.outcome.cause for message in held] == [shared, shared]
    assert (shared.__traceback__, shared.__context__, shared.__cause__) == (None, None, None)
