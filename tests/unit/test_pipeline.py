"""The journey of a message: which errors ack, nack, dead-letter, hold or park it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import pytest

from adapters.base import Failure
from tests.conftest import FakeDelivery
from worker.errors import (
    CircuitOpen,
    Disposition,
    KlaviyoMisconfigured,
    Rejected,
    RequestBlocked,
    Transient,
    WorkerError,
)
from worker.mapping import MappingConfig
from worker.model import Enriched, Message, Notification, Operation, SendResult
from worker.pipeline import MAX_TIMES_BLOCKED, Pipeline
from worker.telemetry.message_log import Telemetry, outcome_name
from worker.telemetry.metrics import Metrics

if TYPE_CHECKING:
    from collections.abc import Sequence

    from adapters.base import Delivery


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
        self.requests = 2
        self.age = 0.0  # seconds from reading to writing
        self.enriched: list[list[str]] = []
        self.sent: list[Operation] = []

    def enrich(self, notifications: Sequence[Notification]) -> list[Enriched | WorkerError]:
        if self.crash_in == "enrich":
            raise KeyError("ada@example.com")
        self.enriched.append([n.resource_id for n in notifications])
        now = datetime.now(UTC) - timedelta(seconds=self.age)
        return [self.enrich_errors.get(n.resource_id) or _with_customer(n, now, self.name) for n in notifications]  # type: ignore[misc]

    def send(self, operations: Sequence[Operation]) -> list[SendResult]:
        self.sent += operations
        if self.crash_in == "send":
            raise KeyError("ada@example.com")
        return [
            SendResult((self.send_errors.get(operation.key) or [None])[0], self.requests) for operation in operations
        ]


def _with_customer(notification: Notification, now: datetime, name: str) -> Enriched:
    customer: dict[str, object] = {"id": notification.resource_id, "email": "ada@example.com", "firstName": name}
    if notification.resource_id == "odd":
        customer["billingAddressIds"] = {"a": 1}
    return Enriched(notification, now, customer=None if notification.resource_id == "gone" else customer)


@pytest.fixture
def stages() -> Stages:
    return Stages()


@pytest.fixture
def recorded() -> RecordingQueue:
    return RecordingQueue()


@pytest.fixture
def pipeline(stages: Stages, recorded: RecordingQueue) -> Pipeline:
    return Pipeline(recorded, stages.enrich, stages.send, MappingConfig(), Telemetry(Metrics("embedded")))  # type: ignore[arg-type]


def updated(customer: str, attempt: int | None = 1) -> FakeDelivery:
    body = {"notificationType": "ResourceUpdated", "resource": {"typeId": "customer", "id": customer}}
    return FakeDelivery(json.dumps(body).encode(), id=customer, attempt=attempt)


def run(pipeline: Pipeline, *deliveries: FakeDelivery) -> list[Message]:
    return pipeline.process([pipeline.parse(delivery) for delivery in deliveries])


def test_message_is_acked_when_its_effect_is_in_klaviyo(pipeline: Pipeline, recorded: RecordingQueue) -> None:
    """Messages of a batch are acked together, in order."""
    assert run(pipeline, updated("a"), updated("b")) == []
    assert recorded.settled == [("ack", "a", 0.0, ""), ("ack", "b", 0.0, "")]


def test_batch_is_enriched_in_one_call(pipeline: Pipeline, stages: Stages) -> None:
    """Messages that already have an outcome are left out."""
    run(pipeline, updated("a"), FakeDelivery(b"bad"), updated("b"))
    assert stages.enriched == [["a", "b"]]


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
    assert outcome_name(message) == "ignored"
    assert stages.enriched == [[]]


def test_bad_message_does_not_affect_the_others_of_its_batch(
    pipeline: Pipeline, recorded: RecordingQueue, stages: Stages
) -> None:
    """Each message of a batch has its own outcome."""
    stages.enrich_errors["down"] = Transient("commercetools answered 500")
    stages.send_errors["rejected"] = [Rejected("400 invalid")]
    held = run(
        pipeline, updated("good"), FakeDelivery(b"[]", id="bad"), updated("down"), updated("rejected"), updated("gone")
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
        return [Enriched(n, datetime.now(UTC) - timedelta(seconds=stages.age), order=ORDER) for n in notifications]

    return Pipeline(recorded, enrich, stages.send, MappingConfig(), Telemetry(Metrics("embedded")))  # type: ignore[arg-type]


def test_state_written_long_after_it_was_read_is_read_again(
    pipeline: Pipeline, recorded: RecordingQueue, stages: Stages
) -> None:
    """Another worker may have written a newer state first. An unchanged state is not sent again."""
    stages.age = 2.5
    held = run(pipeline, updated("a"), updated("b"))
    assert recorded.settled == []
    stages.age = 0.0
    stages.sent.clear()
    assert pipeline.process(held[:1]) == []
    assert stages.sent == []
    stages.name = "Grace"
    assert pipeline.process(held[1:]) == []
    assert [(operation.resource or {})["attributes"]["first_name"] for operation in stages.sent] == ["Grace"]
    assert [entry[:2] for entry in recorded.settled] == [("ack", "a"), ("ack", "b")]


def test_state_that_may_have_been_overwritten_is_sent_again(
    pipeline: Pipeline, recorded: RecordingQueue, stages: Stages
) -> None:
    """A failed write may have changed Klaviyo, so the first state must be sent again."""
    stages.age = 2.5
    held = run(pipeline, updated("a"))
    stages.age = 0.0
    stages.name = "Grace"
    stages.send_errors["a"] = [Transient("no answer")]
    assert pipeline.process(held) == held
    stages.send_errors.clear()
    stages.name = "Ada"
    stages.sent.clear()
    assert pipeline.process(held) == []
    assert [(operation.resource or {})["attributes"]["first_name"] for operation in stages.sent] == ["Ada"]
    assert [entry[:2] for entry in recorded.settled] == [("ack", "a")]


def test_stale_write_is_compared_again_after_a_failed_read(
    pipeline: Pipeline, recorded: RecordingQueue, stages: Stages
) -> None:
    """The message is acked only after the comparison with the current state."""
    stages.age = 2.5
    held = run(pipeline, updated("a"))
    stages.age = 0.0
    stages.enrich_errors["a"] = CircuitOpen("down")
    assert pipeline.process(held) == held
    del stages.enrich_errors["a"]
    stages.sent.clear()
    assert pipeline.process(held) == []
    assert stages.sent == []
    assert [entry[:2] for entry in recorded.settled] == [("ack", "a")]


def test_events_are_never_stale(order_pipeline: Pipeline, recorded: RecordingQueue, stages: Stages) -> None:
    """An event describes the past, so there is no newer state."""
    stages.age = 2.5
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
