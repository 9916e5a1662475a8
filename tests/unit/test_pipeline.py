"""The journey of a message and its endings."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import pytest

from adapters.base import Failure
from tests.conftest import FakeDelivery
from worker.errors import CircuitOpen, Disposition, KlaviyoMisconfigured, Rejected, Transient, WorkerError
from worker.mapping import MappingConfig
from worker.model import Enriched, Lease, Message, Notification, Operation, SendResult
from worker.pipeline import Pipeline
from worker.telemetry.message_log import Telemetry, outcome_name
from worker.telemetry.metrics import Metrics

if TYPE_CHECKING:
    from collections.abc import Sequence

    from adapters.base import Delivery


@dataclass
class RecordingQueue:
    """Notes how deliveries are settled."""

    settled: list[tuple[str, str, float, str]] = field(default_factory=list)
    buries: bool = True
    buried: list[Failure] = field(default_factory=list)
    lease_seconds: float = 60.0

    def ack(self, deliveries: Sequence[Delivery]) -> None:
        self.settled += [("ack", d.id, 0.0, "") for d in deliveries]

    def nack(self, deliveries: Sequence[Delivery], delay: float = 0.0, failure: Failure | None = None) -> None:
        self.settled += [("nack", d.id, delay, failure.reason if failure else "") for d in deliveries]

    def dead_letter(self, delivery: Delivery, failure: Failure) -> bool:
        self.settled.append(("dead_letter", delivery.id, 0.0, failure.reason))
        self.buried.append(failure)
        return self.buries


class Stages:
    """Enrich and send stages that fail for the resources they are told to."""

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
    return pipeline.process([pipeline.accept(delivery) for delivery in deliveries])


def test_a_message_is_acked_when_its_effect_is_in_klaviyo(pipeline: Pipeline, recorded: RecordingQueue) -> None:
    """The good ending."""
    assert run(pipeline, updated("a"), updated("b")) == []
    assert recorded.settled == [("ack", "a", 0.0, ""), ("ack", "b", 0.0, "")]


def test_a_batch_is_enriched_at_once(pipeline: Pipeline, stages: Stages) -> None:
    """The stage sees the whole batch, and only what is worth fetching for."""
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
def test_what_has_no_effect_is_acked_without_fetching(
    body: bytes, pipeline: Pipeline, recorded: RecordingQueue, stages: Stages
) -> None:
    """The test notification, unknown types and events are counted and forgotten."""
    message = pipeline.accept(FakeDelivery(body))
    assert pipeline.process([message]) == []
    assert recorded.settled == [("ack", "1", 0.0, "")]
    assert outcome_name(message) == "ignored"
    assert stages.enriched == [[]]


def test_one_bad_message_does_not_stop_its_neighbours(
    pipeline: Pipeline, recorded: RecordingQueue, stages: Stages
) -> None:
    """Each message of a batch has an ending of its own."""
    stages.enrich_errors["down"] = Transient("commercetools answered 500")
    stages.send_errors["refused"] = [Rejected("400 invalid")]
    kept = run(
        pipeline, updated("good"), FakeDelivery(b"[]", id="bad"), updated("down"), updated("refused"), updated("gone")
    )
    assert [message.delivery.id for message in kept] == ["down"]
    assert {(how, which) for how, which, *_ in recorded.settled} == {
        ("ack", "good"),
        ("dead_letter", "bad"),
        ("dead_letter", "refused"),
        ("ack", "gone"),
    }


def test_a_dead_letter_says_what_message_it_is(pipeline: Pipeline, recorded: RecordingQueue, stages: Stages) -> None:
    """Type and resource, as far as they could be read; they are no personal data."""
    stages.send_errors["refused"] = [Rejected("400 invalid")]
    run(pipeline, updated("refused"), FakeDelivery(b"[]"))
    refused, unreadable = recorded.buried
    assert refused == Failure("400 invalid", "send", "Rejected", "ResourceUpdated", "customer", "refused")
    assert (unreadable.stage, unreadable.error, unreadable.message_type) == ("parse", "Rejected", "")


@pytest.mark.parametrize(
    "error", [Transient("503"), KlaviyoMisconfigured("401")], ids=["an outage", "refused credentials"]
)
def test_what_is_nobodys_fault_is_not_settled_and_can_be_tried_again(
    error: WorkerError, pipeline: Pipeline, recorded: RecordingQueue, stages: Stages
) -> None:
    """Keep the message, at no price, and go on when all is well."""
    stages.send_errors["a"] = [error]
    kept = run(pipeline, updated("a"), updated("b"))
    assert [message.delivery.id for message in kept] == ["a"]
    assert recorded.settled == [("ack", "b", 0.0, "")]
    stages.send_errors.clear()
    assert pipeline.process(kept) == []
    assert recorded.settled[1:] == [("ack", "a", 0.0, "")]


@pytest.mark.parametrize(("attempt", "delay"), [(None, 60), (1, 60), (8, 256), (100, 600)])
def test_what_was_kept_too_long_goes_back_for_a_while(
    attempt: int | None, delay: float, pipeline: Pipeline, recorded: RecordingQueue, stages: Stages
) -> None:
    """With its reason, and ever longer: attempts are scarce."""
    stages.enrich_errors["a"] = Transient("500")
    pipeline.return_to_queue(run(pipeline, updated("a", attempt)), 60.0)
    assert recorded.settled == [("nack", "a", delay, "500")]


@pytest.mark.parametrize(("attempt", "delay"), [(None, 2), (1, 2), (2, 4), (5, 32), (100, 600)])
def test_the_wait_doubles_with_every_attempt(
    attempt: int | None, delay: float, pipeline: Pipeline, recorded: RecordingQueue, stages: Stages
) -> None:
    """A message that keeps failing comes ever more rarely."""
    stages.crash_in = "send"
    run(pipeline, updated("a", attempt))
    ((how, _, waits, _),) = recorded.settled
    assert (how, waits) == ("nack", delay)


@pytest.mark.parametrize("stage", ["enrich", "send"])
def test_a_defect_of_ours_never_loses_a_batch(
    stage: str, pipeline: Pipeline, recorded: RecordingQueue, stages: Stages
) -> None:
    """An unexpected error returns the messages, and its text, which may quote anybody, stays out of reasons."""
    stages.crash_in = stage
    run(pipeline, updated("a"))
    ((how, _, _, reason),) = recorded.settled
    assert how == "nack"
    assert "KeyError" in reason
    assert "ada" not in reason


def test_data_no_handler_expects_is_a_dead_letter(
    pipeline: Pipeline, recorded: RecordingQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pure stage that fails would fail again: the message waits for a better release, not in the queue."""

    def broken(*_: object, **__: object) -> None:
        raise TypeError("ada@example.com")

    monkeypatch.setattr("worker.pipeline.transform", broken)
    run(pipeline, updated("a"))
    ((how, _, _, reason),) = recorded.settled
    assert how == "dead_letter"
    assert "TypeError" in reason
    assert "ada" not in reason


def test_the_worst_ending_of_its_operations_is_the_messages() -> None:
    """Park, hold, nack, dead letter: a retry finds the bad record again, the reverse loses the rest."""
    from worker.pipeline import _SEVERITY

    assert _SEVERITY == (Disposition.PARK, Disposition.HOLD, Disposition.NACK, Disposition.DEAD_LETTER)


ORDER = {"id": "o", "customerEmail": "ada@example.com"}


def created(attempt: int | None) -> FakeDelivery:
    body = {"notificationType": "Message", "type": "OrderCreated", "resource": {"typeId": "order", "id": "o"}}
    return FakeDelivery(json.dumps(body).encode(), attempt=attempt)


def is_fresh(operation: Operation) -> bool:
    return operation.is_first_delivery is not None and operation.is_first_delivery()


@pytest.fixture
def of_orders(stages: Stages, recorded: RecordingQueue) -> Pipeline:
    def enrich(notifications: Sequence[Notification]) -> list[Enriched]:
        return [Enriched(n, datetime.now(UTC) - timedelta(seconds=stages.age), order=ORDER) for n in notifications]

    return Pipeline(recorded, enrich, stages.send, MappingConfig(), Telemetry(Metrics("embedded")))  # type: ignore[arg-type]


@pytest.mark.parametrize(("attempt", "fresh"), [(1, True), (2, False), (None, False)])
def test_only_a_first_delivery_makes_fresh_events(
    attempt: int | None, fresh: bool, of_orders: Pipeline, stages: Stages
) -> None:
    """A queue that does not count deliveries may have delivered it before."""
    run(of_orders, created(attempt))
    assert [is_fresh(operation) for operation in stages.sent] == [fresh]


def test_events_tried_again_in_place_are_not_fresh(of_orders: Pipeline, stages: Stages) -> None:
    """What became of the first try may not be known."""
    stages.send_errors["Placed Order\0o\0ada@example.com\0None"] = [KlaviyoMisconfigured("401")]
    messages = run(of_orders, created(1))
    for _ in range(2):
        messages = of_orders.process(messages)
    assert [is_fresh(operation) for operation in stages.sent] == [True, False, False]
    assert messages[0].events_may_be_sent


def test_events_that_never_left_stay_fresh(of_orders: Pipeline, stages: Stages) -> None:
    """In an outage most calls are held back; their messages may go in bulk later, and back to the queue for nothing."""
    stages.requests = 0
    stages.send_errors["Placed Order\0o\0ada@example.com\0None"] = [CircuitOpen("down")]
    (message,) = run(of_orders, created(1))
    assert not message.events_may_be_sent
    of_orders.process([message])
    assert [is_fresh(operation) for operation in stages.sent] == [True, True]


def test_events_of_a_message_held_for_long_are_not_fresh(of_orders: Pipeline, stages: Stages) -> None:
    """A worker that was stopped may have lost the lease, and another may have sent them."""
    message = of_orders.accept(created(1))
    message.lease.until -= 31
    of_orders.process([message])
    assert [is_fresh(operation) for operation in stages.sent] == [False]


@pytest.mark.parametrize(("attempt", "requests", "begun"), [(1, 1, True), (1, 0, False), (2, 1, False)])
def test_events_that_may_be_in_klaviyo_are_begun_fresh_or_not(
    attempt: int, requests: int, begun: bool, of_orders: Pipeline, stages: Stages
) -> None:
    """A next delivery must not take them for new; one that is not the first cannot."""
    stages.requests = requests
    stages.send_errors["Placed Order\0o\0ada@example.com\0None"] = [KlaviyoMisconfigured("401")]
    message = of_orders.accept(created(attempt))
    message.lease.until -= 31
    of_orders.process([message])
    assert message.events_may_be_sent is begun


def test_a_state_written_long_after_it_was_read_is_read_again(
    pipeline: Pipeline, recorded: RecordingQueue, stages: Stages
) -> None:
    """Another worker may have written a newer one before; the same state is not sent twice."""
    stages.age = 2.5
    kept = run(pipeline, updated("a"), updated("b"))
    assert recorded.settled == []
    stages.age = 0.0
    stages.sent.clear()
    assert pipeline.process(kept[:1]) == []
    assert stages.sent == []
    stages.name = "Grace"
    assert pipeline.process(kept[1:]) == []
    assert [(operation.resource or {})["attributes"]["first_name"] for operation in stages.sent] == ["Grace"]
    assert [ending[:2] for ending in recorded.settled] == [("ack", "a"), ("ack", "b")]


def test_a_state_that_may_have_been_overwritten_is_sent_again(
    pipeline: Pipeline, recorded: RecordingQueue, stages: Stages
) -> None:
    """Back to what was written first, after a newer state got halfway: Klaviyo may hold the newer one."""
    stages.age = 2.5
    kept = run(pipeline, updated("a"))
    stages.age = 0.0
    stages.name = "Grace"
    stages.send_errors["a"] = [Transient("no answer")]
    assert pipeline.process(kept) == kept
    stages.send_errors.clear()
    stages.name = "Ada"
    stages.sent.clear()
    assert pipeline.process(kept) == []
    assert [(operation.resource or {})["attributes"]["first_name"] for operation in stages.sent] == ["Ada"]
    assert [ending[:2] for ending in recorded.settled] == [("ack", "a")]


def test_a_failed_second_reading_leaves_the_comparison_for_later(
    pipeline: Pipeline, recorded: RecordingQueue, stages: Stages
) -> None:
    """Nothing is acked that was not compared."""
    stages.age = 2.5
    kept = run(pipeline, updated("a"))
    stages.age = 0.0
    stages.enrich_errors["a"] = CircuitOpen("down")
    assert pipeline.process(kept) == kept
    del stages.enrich_errors["a"]
    stages.sent.clear()
    assert pipeline.process(kept) == []
    assert stages.sent == []
    assert [ending[:2] for ending in recorded.settled] == [("ack", "a")]


def test_events_are_not_read_again(of_orders: Pipeline, recorded: RecordingQueue, stages: Stages) -> None:
    """They tell what happened: nothing newer can be true."""
    stages.age = 2.5
    assert run(of_orders, created(1)) == []
    assert [ending[:2] for ending in recorded.settled] == [("ack", created(1).id)]


def test_what_was_begun_stays_begun(of_orders: Pipeline, stages: Stages) -> None:
    """A later try that was held back without a request does not undo the first."""
    stages.send_errors["Placed Order\0o\0ada@example.com\0None"] = [CircuitOpen("down")]
    (message,) = run(of_orders, created(1))
    stages.requests = 0
    of_orders.process([message])
    assert message.events_may_be_sent


def test_a_lease_that_may_have_ended_is_not_ours_again() -> None:
    """Somebody else may have had the message in between, whatever the queue says to an extension."""
    kept, lost = Lease(time.monotonic() + 60), Lease(time.monotonic() - 1)
    for lease in (kept, lost):
        lease.extend(time.monotonic(), 60)
    assert kept.is_valid()
    assert not lost.is_valid()


def test_what_nothing_was_done_for_is_never_acked(
    pipeline: Pipeline, recorded: RecordingQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Should a defect leave a message without operations and without an ending, the message comes again."""
    monkeypatch.setattr("worker.pipeline.transform", lambda *_, **__: ())
    run(pipeline, updated("a"))
    assert [how for how, *_ in recorded.settled] == ["nack"]


def test_a_message_with_one_failed_operation_is_not_acked(recorded: RecordingQueue, stages: Stages) -> None:
    """Placed Order arrived, its second line did not: the message comes again, and repeats are harmless."""
    line = {"id": "l1", "totalPrice": {"centAmount": 1, "fractionDigits": 2, "currencyCode": "EUR"}}
    order = {"id": "o", "customerEmail": "ada@example.com", "lineItems": [line, line | {"id": "l2"}]}
    body = {"notificationType": "Message", "type": "OrderCreated", "resource": {"typeId": "order", "id": "o"}}
    answers = [SendResult(None, 1), SendResult(None, 1), SendResult(Transient("503"), 3)]
    pipeline = Pipeline(
        recorded,  # type: ignore[arg-type]
        lambda notifications: [Enriched(n, datetime.now(UTC), order=order) for n in notifications],
        lambda operations: answers[: len(operations)],
        MappingConfig(),
        Telemetry(Metrics("embedded")),
    )
    (message,) = run(pipeline, FakeDelivery(json.dumps(body).encode()))
    assert recorded.settled == []
    assert message.requests == 5
    pipeline.process([message])
    assert message.requests == 10


def test_a_dead_letter_that_comes_again_is_reported_as_retried(
    pipeline: Pipeline, recorded: RecordingQueue, caplog: pytest.LogCaptureFixture
) -> None:
    """Where the queue's own policy gives up, only the last attempt is the end."""
    for recorded.buries in (False, True):
        with caplog.at_level("WARNING"):
            run(pipeline, FakeDelivery(b"torn"))
    assert [how for how, *_ in recorded.settled] == ["dead_letter"] * 2
    assert [vars(record)["outcome"] for record in caplog.records] == ["retried", "dead_lettered"]
