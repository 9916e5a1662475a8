"""The receive loop: lanes, leases, parking, outages, shutdown and `once`."""

from __future__ import annotations

import sqlite3
import threading
import time
from contextlib import closing
from typing import TYPE_CHECKING, Any

import pytest

from adapters import Failure, QueueError, QueueRefusedError, QueueWarning
from adapters.embedded.queue import EmbeddedQueue
from tests.conftest import FakeDelivery, Scripted
from tests.support.waiting import wait_for
from worker.errors import CircuitOpen, Disposition, Ignored, KlaviyoMisconfigured, Rejected, Throttled, Transient
from worker.model import Message, Notification, Operation, OperationKind, Outcome
from worker.runtime.lane import STALL_PER_MESSAGE, STALL_TIMEOUT, Lane
from worker.runtime.runner import Runner, ShutdownTimeoutError
from worker.setting_sources import load
from worker.settings import Settings
from worker.telemetry.message_log import Telemetry
from worker.telemetry.metrics import Metrics

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from adapters.base import Delivery

ENVIRONMENT = {
    "ct_api_url": "https://api.example.com",
    "ct_auth_url": "https://auth.example.com",
    "ct_project_id": "shop",
    "ct_api_client": '{"clientId": "id", "secret": "secret"}',
    "klaviyo_auth_key": "pk_1",
}


class Pipeline:
    """A fake pipeline: `work` returns the messages to hold, and all others are acked. Records the batches."""

    def __init__(self, queue: EmbeddedQueue, work: Callable[[Sequence[Message]], list[Message]]) -> None:
        self._queue = queue
        self._work = work
        self.batches: list[tuple[int, list[bytes]]] = []
        self.nacked: list[tuple[bytes, float]] = []  # with the delay

    def parse(self, delivery: Delivery) -> Message:
        resource = delivery.body.decode().partition(":")[0]
        return Message(delivery, time.monotonic(), Notification("T", resource, resource, None, {}))

    def process(self, messages: Sequence[Message]) -> list[Message]:
        held = self._work(messages)
        done = [message for message in messages if message not in held]
        self.batches.append((threading.get_ident(), [message.delivery.body for message in done]))
        self._queue.ack([message.delivery for message in done])
        return held

    def give_back(self, messages: Sequence[Message], delay: float = 0.0) -> None:
        self._queue.nack([message.delivery for message in messages], delay)

    def nack_held(self, messages: Sequence[Message], delay: float) -> None:
        self.nacked += [(message.delivery.body, delay) for message in messages]
        self._queue.nack([message.delivery for message in messages], delay, Failure("503", "send", "CircuitOpen"))


class Services:
    """Fake services: their answers can be changed."""

    def __init__(self) -> None:
        self.refused = ""
        self.down = ""

    def refusal_reason(self) -> str:
        return self.refused

    def down_reason(self) -> str:
        return self.down


def succeed(_messages: Sequence[Message]) -> list[Message]:
    return []


@pytest.fixture
def queue(tmp_path: Path) -> EmbeddedQueue:
    return EmbeddedQueue(tmp_path / "q.db", lease_seconds=30)


def runner_for(
    queue: Any,
    work: Callable[[Sequence[Message]], list[Message]] = succeed,
    services: Services | None = None,
    **values: Any,
) -> tuple[Runner, Pipeline]:
    pipeline = Pipeline(queue, work)
    settings = settings_for(**{"park_retry_interval": 0.05} | values)
    telemetry = Telemetry(Metrics("embedded"))
    return Runner(queue, pipeline, services or Services(), settings, telemetry, threading.Event()), pipeline  # type: ignore[arg-type]


def settings_for(**values: Any) -> Settings:
    """Return settings with addresses that do not exist."""
    return load(Settings, ENVIRONMENT | values)


def processed(pipeline: Pipeline) -> list[bytes]:
    return [body for _, bodies in pipeline.batches for body in bodies]


def test_once_drains_the_queue_and_returns(queue: EmbeddedQueue) -> None:
    """`once` returns without waiting when the queue is empty."""
    queue.publish(f"{n}:x".encode() for n in range(250))
    runner, pipeline = runner_for(queue)
    started_at = time.monotonic()
    runner.run(once=True)
    assert len(processed(pipeline)) == 250
    assert time.monotonic() - started_at < 5


def test_messages_of_a_resource_use_one_lane_in_order(queue: EmbeddedQueue) -> None:
    """Two changes of one customer are never processed concurrently in a process."""
    queue.publish(f"{n % 7}:{n}".encode() for n in range(300))
    runner, pipeline = runner_for(queue, lanes=4)
    runner.run(once=True)
    lanes: dict[str, set[int]] = {}
    order: dict[str, list[int]] = {}
    for lane, bodies in pipeline.batches:
        for body in bodies:
            resource, _, number = body.decode().partition(":")
            lanes.setdefault(resource, set()).add(lane)
            order.setdefault(resource, []).append(int(number))
    assert all(len(threads) == 1 for threads in lanes.values())
    assert all(numbers == sorted(numbers) for numbers in order.values())
    assert len(set.union(*lanes.values())) > 1


def test_batches_grow_with_the_backlog_up_to_their_limit(queue: EmbeddedQueue) -> None:
    """A lane processes all messages in its inbox together, and does not wait for a full batch."""

    def slow(_messages: Sequence[Message]) -> list[Message]:
        time.sleep(0.05)
        return []

    queue.publish(b"one:x" for _ in range(100))
    runner, pipeline = runner_for(queue, slow, lanes=1, max_batch=40)
    runner.run(once=True)
    sizes = [len(bodies) for _, bodies in pipeline.batches]
    assert max(sizes) == 40
    assert sum(sizes) == 100


@pytest.mark.parametrize(("body", "largest"), [(b"order:x", 200), (b"product:x", 250)])
def test_batches_of_events_need_whole_readings(body: bytes, largest: int, queue: EmbeddedQueue) -> None:
    """They are two requests of 100 profiles at most. Batches of other effects can be larger."""
    queue.publish(body for _ in range(600))
    runner, pipeline = runner_for(queue, lanes=1)
    runner.run(once=True)
    assert max(len(bodies) for _, bodies in pipeline.batches) == largest


@pytest.mark.parametrize("limit", [{"max_in_flight": 10}, {"max_in_flight_bytes": 50, "max_in_flight": 10}])
def test_messages_in_flight_are_limited(limit: dict[str, int], queue: EmbeddedQueue) -> None:
    """The number and the bytes of messages in flight are limited, regardless of the backlog."""
    most = 0

    def measure(_messages: Sequence[Message]) -> list[Message]:
        nonlocal most
        most = max(most, len(runner._in_flight))
        time.sleep(0.01)
        return []

    queue.publish(f"{n}:abcde".encode() for n in range(60))
    runner, pipeline = runner_for(queue, measure, None, **limit)
    runner.run(once=True)
    assert len(processed(pipeline)) == 60
    assert 0 < most <= 10


def test_events_profiles_and_catalog_have_separate_lanes(queue: EmbeddedQueue) -> None:
    """Bulk jobs of profiles and of the catalog can take minutes and must not delay orders."""
    others = [b"customer:1", b"product:1", b"category:1", b"inventory-entry:1"]
    queue.publish([*others, b"order:1", b"payment:1"])
    release = threading.Event()

    def work(messages: Sequence[Message]) -> list[Message]:
        if not {message.key[0] for message in messages} <= {"order", "payment"}:
            assert release.wait(60)
        return []

    runner, pipeline = runner_for(queue, work, lanes=1)
    running = threading.Thread(target=runner.run, kwargs={"once": True})
    running.start()
    wait_for(lambda: len(processed(pipeline)) == 2)
    assert sorted(processed(pipeline)) == [b"order:1", b"payment:1"]
    release.set()
    running.join(60)
    assert len(processed(pipeline)) == 6


def test_leases_of_messages_in_flight_are_extended(tmp_path: Path) -> None:
    """A message that takes longer than its lease is not processed twice."""
    queue = EmbeddedQueue(tmp_path / "q.db", lease_seconds=0.3)

    def slow(_messages: Sequence[Message]) -> list[Message]:
        time.sleep(1)
        return []

    queue.publish([b"a:x"])
    runner, pipeline = runner_for(queue, slow)
    runner.run(once=True)
    assert processed(pipeline) == [b"a:x"]


def failing_once(method: Callable[..., None], error: Exception) -> Callable[..., None]:
    """Return a method that fails the first time."""
    errors = [error]

    def call(*arguments: Any, **named: Any) -> None:
        if errors:
            raise errors.pop()
        method(*arguments, **named)

    return call


def test_leases_are_extended_again_after_an_unexpected_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The log shows only the class of the error, because its text can contain personal data."""
    queue = EmbeddedQueue(tmp_path / "q.db", lease_seconds=1.2)
    monkeypatch.setattr(queue, "extend", failing_once(queue.extend, RuntimeError("ada@example.com")))
    queue.publish([b"a:x"])
    runner, pipeline = runner_for(queue, lambda _: time.sleep(1.6) or [])  # type: ignore[func-returns-value]
    runner.run(once=True)
    assert processed(pipeline) == [b"a:x"]
    (record,) = [record for record in caplog.records if record.message == "lease_extension_failed"]
    assert vars(record)["reason"] == "unexpected RuntimeError"


def parking(times: int) -> Callable[[Sequence[Message]], list[Message]]:
    """Park the messages of the first `times` batches."""
    remaining = times

    def work(messages: Sequence[Message]) -> list[Message]:
        nonlocal remaining
        if remaining == 0:
            return []
        remaining -= 1
        for message in messages:
            message.outcome = Outcome(Disposition.PARK, "send", KlaviyoMisconfigured("401: check KLAVIYO_AUTH_KEY"))
        return list(messages)

    return work


def test_parked_worker_holds_its_messages_and_resumes_by_itself(queue: EmbeddedQueue) -> None:
    """While the key is refused, no attempt is used up and no new message is pulled."""
    queue.publish([b"a:1", b"b:1"])
    runner, pipeline = runner_for(queue, parking(3), max_in_flight=1)
    stopper = threading.Timer(2.0, runner.stop)
    stopper.start()
    runner.run()
    stopper.cancel()
    assert sorted(processed(pipeline)) == [b"a:1", b"b:1"]


def test_parked_worker_pulls_nothing(
    queue: EmbeddedQueue, running: Callable[[Runner], threading.Thread], caplog: pytest.LogCaptureFixture
) -> None:
    """Messages stay in the queue for other workers, or until the service accepts the worker again."""
    services = Services()
    services.refused = "401: check KLAVIYO_AUTH_KEY"
    runner, pipeline = runner_for(queue, services=services)
    running(runner)
    wait_for(lambda: caplog.records)
    assert (caplog.records[0].message, runner.parked_reason()) == ("parked", services.refused)
    queue.publish([b"a:1"])
    runner._in_flight.wait_for_change(1.2)  # longer than a pull
    assert queue.backlog() == 1
    assert runner.in_flight() == 0
    services.refused = ""
    wait_for(lambda: processed(pipeline) == [b"a:1"])


def holding(error: Exception, until: threading.Event) -> Callable[[Sequence[Message]], list[Message]]:
    """Hold every message whose body starts with `a`, until the event is set."""

    def work(messages: Sequence[Message]) -> list[Message]:
        held = [] if until.is_set() else [message for message in messages if message.delivery.body.startswith(b"a")]
        for message in held:
            message.outcome = Outcome(Disposition.HOLD, "send", error)
        return held

    return work


@pytest.fixture
def running() -> Iterator[Callable[[Runner], threading.Thread]]:
    """Run runners in threads, and stop them after the test."""
    started: list[tuple[Runner, threading.Thread]] = []

    def start(runner: Runner) -> threading.Thread:
        thread = threading.Thread(target=runner.run, daemon=True)
        thread.start()
        started.append((runner, thread))
        return thread

    yield start
    for runner, thread in started:
        runner.stop()
        thread.join(60)
        assert not thread.is_alive()


def test_pulling_pauses_while_a_service_is_down(
    queue: EmbeddedQueue, running: Callable[[Runner], threading.Thread], caplog: pytest.LogCaptureFixture
) -> None:
    """No message could be processed. The messages stay in the queue and use up no attempt."""
    services = Services()
    services.down = "503 to POST a.klaviyo.com/api/events"
    caplog.set_level("INFO", "klaviyo_worker")
    runner, pipeline = runner_for(queue, services=services)
    running(runner)
    queue.publish([b"a:1", b"b:2"])
    runner._in_flight.wait_for_change(1.2)  # longer than a pull
    assert (queue.backlog(), runner.in_flight(), runner.paused_reason()) == (2, 0, services.down)
    services.down = ""
    wait_for(lambda: len(processed(pipeline)) == 2)
    wait_for(lambda: [record.message for record in caplog.records] == ["pulling_paused", "pulling_resumed"])


def test_held_message_delays_no_other(queue: EmbeddedQueue, running: Callable[[Runner], threading.Thread]) -> None:
    """Even if all messages in flight are held because of an outage, others are pulled immediately."""
    queue.publish([b"a:1"])
    runner, pipeline = runner_for(queue, holding(CircuitOpen("500", retry_after=60), threading.Event()))
    running(runner)
    wait_for(lambda: runner.held() == 1)
    for number in range(5):
        queue.publish([b"b:%d" % number])
        wait_for(lambda: b"b:%d" % number in processed(pipeline))  # noqa: B023 - called at once
    assert runner.held() == 1


def test_full_budget_of_a_slow_effect_delays_no_other(
    queue: EmbeddedQueue, running: Callable[[Runner], threading.Thread], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The messages beyond the budget go back to the queue. They use up no attempt of the embedded queue."""
    monkeypatch.setattr("worker.runtime.budget.BATCH_TIMEOUT", 0.2)
    monkeypatch.setattr("worker.runtime.budget.DELAY_FACTOR", 1000.0)
    over = threading.Event()

    def work(messages: Sequence[Message]) -> list[Message]:
        held = [] if over.is_set() else [message for message in messages if message.key[0] == "product"]
        for message in held:
            message.outcome = Outcome(Disposition.WAIT, "send", Throttled("429", retry_after=0.1))
        return held

    queue.publish([*(b"product:%d" % number for number in range(30)), b"order:1"])
    runner, pipeline = runner_for(queue, work, max_in_flight=10)
    running(runner)
    wait_for(lambda: processed(pipeline) == [b"order:1"])
    wait_for(lambda: (runner.in_flight(), queue.backlog()) == (10, 30))
    over.set()
    wait_for(lambda: queue.backlog() == 20)
    with closing(sqlite3.connect(queue._path)) as database:
        assert database.execute("SELECT DISTINCT attempts FROM messages").fetchall() == [(0,)]
        (delay,) = database.execute("SELECT min(visible_at) FROM messages").fetchone()
    assert delay > time.monotonic() + 60


def test_message_beyond_the_budget_that_is_already_decided_is_settled(queue: EmbeddedQueue) -> None:
    """It needs no lane. If it went back to the queue, each return would use up an attempt of most queues."""
    runner, pipeline = runner_for(queue, max_in_flight=1)
    runner._in_flight.is_beyond_budget = lambda message: True  # type: ignore[method-assign]
    parse = pipeline.parse

    def parse_and_decide(delivery: Delivery) -> Message:
        message = parse(delivery)
        if b"ignored" in delivery.body:
            message.outcome = Outcome(Disposition.ACK, "parse", Ignored("no handler"))
        elif b"invalid" in delivery.body:
            message.outcome = Outcome(Disposition.DEAD_LETTER, "parse", Rejected("unreadable"))
        return message

    pipeline.parse = parse_and_decide  # type: ignore[method-assign]
    queue.publish([b"product:1", b"product:ignored", b"product:invalid"])
    runner._dispatch(queue.receive(9, 0))
    assert processed(pipeline) == [b"product:ignored", b"product:invalid"]
    assert (queue.backlog(), runner.in_flight()) == (1, 0)


def test_once_returns_no_message_beyond_the_budget(queue: EmbeddedQueue, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run must settle all messages before it ends, and a dead letter that is replayed would not come back."""
    monkeypatch.setattr("worker.runtime.budget.BATCH_TIMEOUT", 0.0)
    nacks: list[object] = []
    monkeypatch.setattr(queue, "nack", lambda *given: nacks.append(given))
    queue.publish(b"product:%d" % number for number in range(30))

    def slow(_messages: Sequence[Message]) -> list[Message]:
        time.sleep(0.05)
        return []

    # The bytes of the messages are known only after they were received, so some are beyond the budget.
    runner, pipeline = runner_for(queue, slow, max_in_flight=5, max_in_flight_bytes=20)
    runner.run(once=True)
    assert len(processed(pipeline)) == 30
    assert nacks == []


def test_redelivery_of_a_message_in_flight_replaces_its_delivery(
    queue: EmbeddedQueue, running: Callable[[Runner], threading.Thread]
) -> None:
    """Pub/Sub pushes a message again after each ack deadline. The last request is the one to respond to."""
    release = threading.Event()

    def work(_messages: Sequence[Message]) -> list[Message]:
        assert release.wait(60)
        return []

    first, *more = (FakeDelivery(b"a:1", id="m", attempt=number) for number in range(1, 6))
    answers = iter([[first], more])
    queue.receive = lambda *_: next(answers, [])  # type: ignore[method-assign,assignment]
    acked: list[Any] = []
    queue.ack = acked.extend  # type: ignore[method-assign,assignment]
    runner, pipeline = runner_for(queue, work)
    running(runner)
    wait_for(lambda: [message.delivery for message in runner._in_flight.messages()] == [more[-1]])
    release.set()
    wait_for(lambda: runner.in_flight() == 0)
    assert acked == [more[-1]]
    assert len(pipeline.batches) == 1


def test_pulling_continues_while_a_message_is_held_without_an_outage(
    queue: EmbeddedQueue, running: Callable[[Runner], threading.Thread]
) -> None:
    """A resource that commercetools does not return yet is not an outage."""
    queue.publish([b"a:1"])
    runner, pipeline = runner_for(queue, holding(Transient("not readable yet", 60), threading.Event()))
    running(runner)
    wait_for(lambda: runner.held() == 1)
    queue.publish([b"b:1"])
    wait_for(lambda: processed(pipeline) == [b"b:1"])


def test_stop_during_an_outage_returns_held_messages_without_using_up_an_attempt(queue: EmbeddedQueue) -> None:
    """The shutdown does not wait for the end of the outage."""
    queue.publish([b"a:1", b"a:2"])
    runner, _ = runner_for(queue, holding(CircuitOpen("down", retry_after=600), threading.Event()))
    thread = threading.Thread(target=runner.run, daemon=True)
    thread.start()
    wait_for(lambda: runner.held() == 2)
    runner.stop()
    thread.join(60)
    assert not thread.is_alive()
    again = EmbeddedQueue(queue._path).receive(9, 0)
    assert [(delivery.body, delivery.attempt) for delivery in again] == [(b"a:1", 1), (b"a:2", 1)]


def test_refusal_by_the_queue_parks_the_worker(
    queue: EmbeddedQueue, running: Callable[[Runner], threading.Thread], caplog: pytest.LogCaptureFixture
) -> None:
    """A deleted subscription or a revoked permission can be restored; the worker then resumes by itself."""
    refusals = [QueueRefusedError("QUEUE_URL: gone")] * 3
    receive = queue.receive

    def refusing(max_messages: int, wait: float) -> Any:
        if refusals:
            raise refusals.pop()
        return receive(max_messages, wait)

    queue.receive = refusing  # type: ignore[method-assign]
    queue.publish([b"a:1"])
    runner, pipeline = runner_for(queue)
    running(runner)
    wait_for(lambda: runner.parked_reason() == "QUEUE_URL: gone")
    wait_for(lambda: processed(pipeline) == [b"a:1"])
    wait_for(lambda: not runner.parked_reason())
    assert [record.message for record in caplog.records if record.levelname == "ERROR"] == ["parked"]


@pytest.mark.parametrize("answer", [[], QueueRefusedError("gone")], ids=["no messages", "refused"])
def test_has_received_is_true_after_the_queue_has_answered(
    queue: EmbeddedQueue, running: Callable[[Runner], threading.Thread], answer: Any
) -> None:
    """A refusal counts, too, because a worker that is parked from the start is up."""
    asked, release = threading.Event(), threading.Event()

    def waiting(*_: object) -> Any:
        asked.set()
        release.wait(60)
        return Scripted(answer)()

    queue.receive = waiting  # type: ignore[method-assign,assignment]
    runner, _ = runner_for(queue)
    running(runner)
    assert asked.wait(60)
    assert not runner.has_received()
    release.set()
    wait_for(runner.has_received)


def test_empty_response_soon_after_a_refusal_does_not_end_parking(
    queue: EmbeddedQueue, running: Callable[[Runner], threading.Thread], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stream reports a refusal a moment after it was opened, so parking ends only after two retry intervals."""
    monkeypatch.setattr("worker.runtime.runner.RECEIVE_WAIT", 0.05)
    refusals = [QueueRefusedError("QUEUE_URL: gone")]
    reasons: list[str] = []

    def refusing(*_: object) -> Any:
        if refusals:
            raise refusals.pop()
        reasons.append(runner.parked_reason())
        time.sleep(0.05)
        return []

    queue.receive = refusing  # type: ignore[method-assign,assignment]
    runner, _ = runner_for(queue, park_retry_interval=0.5)
    running(runner)
    wait_for(lambda: reasons and not reasons[-1])
    assert reasons[:4] == ["QUEUE_URL: gone"] * 4


def test_once_raises_the_refusal_of_the_queue(queue: EmbeddedQueue) -> None:
    """A script must not wait for an operator."""
    queue.publish([b"a:1"])
    queue.receive = Scripted(QueueRefusedError("gone"))  # type: ignore[method-assign,assignment]
    runner, _ = runner_for(queue)
    with pytest.raises(QueueRefusedError):
        runner.run(once=True)


def test_once_waits_for_the_end_of_an_outage_up_to_max_wait(
    queue: EmbeddedQueue, caplog: pytest.LogCaptureFixture
) -> None:
    """After `max_wait` the messages are returned without using up an attempt."""
    over = threading.Event()
    threading.Timer(0.5, over.set).start()
    queue.publish([b"a:1"])
    runner, pipeline = runner_for(queue, holding(CircuitOpen("down", retry_after=0.1), over))
    runner.run(once=True, max_wait=60)
    assert processed(pipeline) == [b"a:1"]
    queue = EmbeddedQueue(queue._path)
    queue.publish([b"a:2"])
    runner, _ = runner_for(queue, holding(CircuitOpen("down", retry_after=0.1), threading.Event()))
    runner.run(once=True, max_wait=0.3)
    assert "wait_timed_out" in [record.message for record in caplog.records]
    (again,) = EmbeddedQueue(queue._path).receive(9, 0)
    assert (again.body, again.attempt) == (b"a:2", 1)


def test_hanging_loop_is_stalled(
    queue: EmbeddedQueue, running: Callable[[Runner], threading.Thread], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker in an outage and a stopped worker are not stalled, because a restart would not help."""
    monkeypatch.setattr("worker.runtime.runner.STALL_TIMEOUT", 1.5)
    services = Services()
    services.down = "503"
    runner, _ = runner_for(queue, services=services)
    thread = running(runner)
    runner._in_flight.wait_for_change(2.0)
    assert runner.stall_reason() == ""
    assert not runner.is_stopping()
    release = threading.Event()
    runner._in_flight.wait_for_change = lambda _: release.wait(60)  # type: ignore[method-assign,assignment]
    wait_for(lambda: runner.stall_reason() == "the receive loop hangs")
    release.set()
    runner.stop()
    thread.join(60)
    assert runner.stall_reason() == ""
    assert runner.is_stopping()


@pytest.mark.parametrize("job_timeout", [1.0, 1_200.0])
def test_hanging_lane_is_stalled(
    job_timeout: float, queue: EmbeddedQueue, running: Callable[[Runner], threading.Thread]
) -> None:
    """The messages of a large batch wait for rate limits one after another, and for a bulk job."""
    release = threading.Event()

    def work(_messages: Sequence[Message]) -> list[Message]:
        assert release.wait(60)
        return []

    queue.publish([b"customer:1"] * 100)
    runner, _ = runner_for(queue, work, job_timeout=job_timeout)
    running(runner)
    wait_for(lambda: sum(runner.batch_sizes()["profiles"]))
    lane = next(lane for lane in runner._lanes if lane.batch_size)
    limit = STALL_TIMEOUT + STALL_PER_MESSAGE * lane.batch_size + job_timeout
    now = time.monotonic()
    assert lane.stall_reason(now + limit - 60) == ""
    assert lane.stall_reason(now + limit + 1) == f"{lane.name} has processed a batch for {(limit + 1) / 60:.0f} minutes"
    release.set()
    wait_for(lambda: not lane.stall_reason(now + 24 * 3_600))


def test_dead_lane_is_stalled(queue: EmbeddedQueue, running: Callable[[Runner], threading.Thread]) -> None:
    """Its resources would never be processed."""
    runner, _ = runner_for(queue)
    assert runner.stall_reason() == ""  # not started
    running(runner)
    wait_for(runner.has_received)
    lane = next(iter(runner._lanes))
    lane.end()
    wait_for(lambda: runner.stall_reason() == "events-1 has ended")


def test_error_of_a_lane_outside_a_batch_ends_the_run(queue: EmbeddedQueue, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the messages of the lane would stay in flight, and no other lane would process them."""

    def broken(_lane: Lane) -> list[Message]:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(Lane, "_take_due", broken)
    queue.publish([b"a:1"])
    runner, _ = runner_for(queue)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        runner.run()
    assert len(EmbeddedQueue(queue._path).receive(9, 0)) == 1


def test_once_raises_refused_credentials(queue: EmbeddedQueue) -> None:
    """The messages are returned to the queue."""
    queue.publish([b"a:1"])
    runner, _ = runner_for(queue, parking(1))
    with pytest.raises(KlaviyoMisconfigured):
        runner.run(once=True)
    assert len(EmbeddedQueue(queue._path).receive(1, 0)) == 1


def test_stop_returns_messages_that_were_not_started(queue: EmbeddedQueue) -> None:
    """They are returned while the lane finishes its batch."""
    started, release = threading.Event(), threading.Event()

    def slow(_messages: Sequence[Message]) -> list[Message]:
        started.set()
        release.wait(60)
        return []

    queue.publish(f"a:{n}".encode() for n in range(20))
    runner, pipeline = runner_for(queue, slow, lanes=1, max_batch=5)
    thread = threading.Thread(target=runner.run, daemon=True)
    thread.start()
    started.wait(60)
    runner.stop()
    left = {delivery.body for delivery in EmbeddedQueue(queue._path).receive(100, 5)}
    assert thread.is_alive()
    release.set()
    thread.join(60)
    assert not thread.is_alive()
    done = set(processed(pipeline))
    assert done | left == {f"a:{n}".encode() for n in range(20)}
    assert not done & left
    assert left


def test_messages_are_returned_after_pulling_has_ended(queue: EmbeddedQueue) -> None:
    """Before that, a streaming queue would deliver them to this worker again and use up an attempt."""
    started = threading.Event()
    calls: list[str] = []

    def slow_stop() -> None:
        time.sleep(0.5)
        calls.append("stop")

    def slow(messages: Sequence[Message]) -> list[Message]:
        started.set()
        time.sleep(0.1)
        return list(messages)

    nack = queue.nack
    queue.stop = slow_stop  # type: ignore[method-assign]
    queue.nack = lambda *given: (calls.append("nack"), nack(*given))  # type: ignore[method-assign,assignment,func-returns-value]
    queue.publish([b"a:1", b"b:1"])
    runner, _ = runner_for(queue, slow, park_retry_interval=60)
    thread = threading.Thread(target=runner.run, daemon=True)
    thread.start()
    started.wait(60)
    runner.stop()
    thread.join(60)
    assert calls[0] == "stop"
    assert "nack" in calls


def test_return_at_shutdown_uses_up_no_attempt(queue: EmbeddedQueue) -> None:
    """The embedded queue can undo the count of the delivery."""
    started = threading.Event()

    def parking(messages: Sequence[Message]) -> list[Message]:
        started.set()
        return list(messages)

    queue.publish([b"a:1"])
    runner, _ = runner_for(queue, parking, park_retry_interval=60)
    thread = threading.Thread(target=runner.run, daemon=True)
    thread.start()
    started.wait(60)
    runner.stop()
    thread.join(60)
    assert [delivery.attempt for delivery in EmbeddedQueue(queue._path).receive(1, 1)] == [1]


def test_messages_in_progress_are_returned_after_the_grace_period(queue: EmbeddedQueue) -> None:
    """The caller gets ShutdownTimeoutError."""
    release = threading.Event()

    def hanging(messages: Sequence[Message]) -> list[Message]:
        release.wait(60)
        return list(messages)

    queue.publish([b"a:1"])
    runner, _ = runner_for(queue, hanging, shutdown_grace_period=0.1)
    threading.Timer(0.3, runner.stop).start()
    with pytest.raises(ShutdownTimeoutError, match="1 messages"):
        runner.run()
    assert len(EmbeddedQueue(queue._path).receive(1, 0)) == 1
    release.set()


@pytest.mark.parametrize(
    ("kind", "operations", "is_delayed"),
    [
        (OperationKind.UPSERT_PROFILE, 11, True),
        (OperationKind.UPSERT_PROFILE, 10, False),
        (OperationKind.CREATE_EVENT, 11, False),
        (OperationKind.UPSERT_GUEST, 11, False),
    ],
)
def test_message_that_a_bulk_job_can_still_overwrite_is_returned_with_a_delay(
    kind: OperationKind, operations: int, is_delayed: bool, queue: EmbeddedQueue
) -> None:
    """At a second signal, a lane still waits for the job. The job ends within `job_timeout`."""
    sending = threading.Event()
    release = threading.Event()
    sent: list[Message] = []

    def waiting_for_job(messages: Sequence[Message]) -> list[Message]:
        for message in messages:
            message.operations = [Operation(kind, "a")] * operations
        sent.extend(messages)
        sending.set()
        release.wait(60)
        return list(messages)

    queue.publish([b"a:1"])
    runner, _ = runner_for(queue, waiting_for_job, job_timeout=500, bulk_threshold=10)

    def run_until_the_second_signal() -> None:
        with pytest.raises(ShutdownTimeoutError):
            runner.run()

    run = threading.Thread(target=run_until_the_second_signal)
    run.start()
    assert sending.wait(60)
    runner.stop()
    runner.stop()
    run.join(60)
    assert (sent[0].not_before > time.monotonic() + 400) is is_delayed
    release.set()


def slowly(_messages: Sequence[Message]) -> list[Message]:
    time.sleep(0.5)
    return []


@pytest.mark.parametrize("method", ["receive", "ack", "extend"])
def test_failing_queue_ends_the_run_unless_only_an_extension_fails(method: str, queue: EmbeddedQueue) -> None:
    """The supervisor restarts the worker, and the queue redelivers the messages when their leases expire."""
    calls = []

    def broken(*_: object) -> None:
        calls.append(1)
        raise QueueError("disk full")

    queue._lease_seconds = 0.3
    queue.publish([b"a:1"])
    setattr(queue, method, broken)
    runner, _ = runner_for(queue, slowly)
    if method == "extend":
        runner.run(once=True)
        assert calls
    else:
        with pytest.raises(QueueError):
            runner.run(once=True)


@pytest.mark.parametrize("method", ["receive", "stop", "nack"])
def test_messages_in_flight_are_returned_after_an_unexpected_error(method: str, queue: EmbeddedQueue) -> None:
    """They are returned immediately, not when their leases expire."""
    broken = RuntimeError("can't start new thread")
    queue.publish([b"a:1", b"a:2"])
    runner, pipeline = runner_for(queue, slowly, max_batch=1)
    if method == "receive":
        queue.receive = Scripted(queue.receive(2, 0), broken)  # type: ignore[method-assign,assignment]
    else:
        setattr(queue, method, failing_once(getattr(queue, method), broken))
        threading.Timer(0.3, runner.stop).start()
    with pytest.raises(RuntimeError, match="can't start new thread"):
        runner.run()
    left = [delivery.body for delivery in EmbeddedQueue(queue._path).receive(9, 0)]
    assert sorted([*processed(pipeline), *left]) == [b"a:1", b"a:2"]
    assert b"a:2" in left


def test_once_waits_for_redeliveries_up_to_max_wait(queue: EmbeddedQueue, caplog: pytest.LogCaptureFixture) -> None:
    """`max_wait` limits the total wait, and the number of remaining messages is logged."""
    queue.publish([b"a:1"])
    queue.nack(queue.receive(1, 0), delay=60)
    runner, _ = runner_for(queue)
    assert runner.run(once=True, max_wait=0.1) == "1 messages are left after waiting 0.1 s"
    assert [record.message for record in caplog.records] == ["wait_timed_out"]


def test_once_reports_that_it_was_stopped(queue: EmbeddedQueue) -> None:
    """A stopped `run --once` does not end as if the queue were empty. A stopped worker ends normally."""
    queue.publish([b"a:1"])
    queue.nack(queue.receive(1, 0), delay=60)
    for once, reason in ((True, "stopped before the queue was empty"), (False, "")):
        runner, _ = runner_for(EmbeddedQueue(queue._path))
        threading.Timer(0.3, runner.stop).start()
        assert runner.run(once=once) == reason


def test_once_reports_nothing_left(queue: EmbeddedQueue) -> None:
    """All messages were processed."""
    queue.publish([b"a:1"])
    runner, _ = runner_for(queue)
    assert runner.run(once=True) == ""


def test_once_does_not_treat_an_unreachable_queue_as_empty(
    queue: EmbeddedQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command exits with 3, and not with 0 while messages remain."""
    monkeypatch.setattr("worker.runtime.runner.IDLE_TIMEOUT", 0.1)

    def unreachable() -> list[QueueWarning]:
        raise QueueError("cannot reach")

    queue.backlog = lambda: None  # type: ignore[method-assign,assignment,return-value]
    queue.check = unreachable  # type: ignore[method-assign]
    runner, _ = runner_for(queue)
    with pytest.raises(QueueError, match="cannot reach"):
        runner.run(once=True)


def test_once_treats_a_queue_without_backlog_as_empty_after_the_idle_timeout(
    queue: EmbeddedQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pub/Sub reports no backlog. Pauses shorter than IDLE_TIMEOUT do not add up."""
    monkeypatch.setattr("worker.runtime.runner.IDLE_TIMEOUT", 0.5)
    monkeypatch.setattr("worker.runtime.runner.RECEIVE_WAIT", 0.05)
    queue.backlog = lambda: None  # type: ignore[method-assign,assignment,return-value]
    runner, pipeline = runner_for(queue)

    def publish() -> None:
        for number in range(4):
            time.sleep(0.3)
            queue.publish([b"a:%d" % number])

    publisher = threading.Thread(target=publish)
    publisher.start()
    runner.run(once=True)
    publisher.join()
    assert processed(pipeline) == [b"a:0", b"a:1", b"a:2", b"a:3"]


def test_batch_sizes_are_reported_by_lane_group(queue: EmbeddedQueue) -> None:
    """An idle lane has batch size 0. All stock has a lane of its own."""
    release = threading.Event()

    def work(_messages: Sequence[Message]) -> list[Message]:
        release.wait(60)
        return []

    runner, _ = runner_for(queue, work, lanes=2)
    groups = ("events", "profiles", "deletions", "catalog", "carts")
    assert runner.batch_sizes() == {name: [0, 0] for name in groups} | {"catalog": [0, 0, 0]}
    queue.publish([b"customer:1", b"product:1"])
    thread = threading.Thread(target=runner.run)
    thread.start()
    try:
        wait_for(lambda: sum(map(sum, runner.batch_sizes().values())) == 2)
        assert {name: sum(lanes) for name, lanes in runner.batch_sizes().items()} == {
            "events": 0,
            "profiles": 1,
            "deletions": 0,
            "catalog": 1,
            "carts": 0,
        }
        release.set()
        wait_for(lambda: not sum(map(sum, runner.batch_sizes().values())))
    finally:
        release.set()
        runner.stop()
        thread.join()


def test_stock_has_one_lane_with_large_batches(queue: EmbeddedQueue) -> None:
    """The stock messages of a new product are in one batch, so the product is written once."""
    release = threading.Event()

    def work(_messages: Sequence[Message]) -> list[Message]:
        release.wait(60)
        return []

    runner, pipeline = runner_for(queue, work, lanes=3, max_batch=5)
    queue.publish([f"inventory-entry:{number}".encode() for number in range(16)])
    thread = threading.Thread(target=runner.run)
    thread.start()
    try:
        wait_for(lambda: sum(runner.batch_sizes()["catalog"]) > 0)
        assert runner.batch_sizes()["catalog"][:3] == [0, 0, 0]
        release.set()
        wait_for(lambda: len(processed(pipeline)) == 16)
    finally:
        release.set()
        runner.stop()
        thread.join()
    assert 5 < max(len(bodies) for _, bodies in pipeline.batches) <= 15
