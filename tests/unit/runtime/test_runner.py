"""The receive loop and its lanes."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any

import pytest

from adapters import Failure, QueueError, QueueRefusedError, QueueWarning
from adapters.embedded import EmbeddedQueue
from tests.conftest import Scripted
from worker.errors import CircuitOpen, Disposition, KlaviyoMisconfigured, Transient
from worker.model import Lease, Message, Notification, Outcome
from worker.runtime.runner import Runner, ShutdownTimeoutError
from worker.settings import Settings, load
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
    """Acks everything, at the pace and with the parking it is told; notes what it saw."""

    def __init__(self, queue: EmbeddedQueue, work: Callable[[Sequence[Message]], list[Message]]) -> None:
        self._queue = queue
        self._work = work
        self.batches: list[tuple[int, list[bytes]]] = []
        self.given_up: list[tuple[bytes, float]] = []

    def accept(self, delivery: Delivery) -> Message:
        resource = delivery.body.decode().partition(":")[0]
        lease = Lease(time.monotonic() + (self._queue.lease_seconds or 0.0))
        return Message(delivery, time.monotonic(), Notification("T", resource, resource, None, {}), lease=lease)

    def process(self, messages: Sequence[Message]) -> list[Message]:
        kept = self._work(messages)
        done = [message for message in messages if message not in kept]
        self.batches.append((threading.get_ident(), [message.delivery.body for message in done]))
        self._queue.ack([message.delivery for message in done])
        return kept

    def return_to_queue(self, messages: Sequence[Message], delay: float) -> None:
        self.given_up += [(message.delivery.body, delay) for message in messages]
        self._queue.nack([message.delivery for message in messages], delay, Failure("503", "send", "CircuitOpen"))


def nothing_special(messages: Sequence[Message]) -> list[Message]:
    del messages
    return []


@pytest.fixture
def queue(tmp_path: Path) -> EmbeddedQueue:
    return EmbeddedQueue(tmp_path / "q.db", lease_seconds=30)


def runner_for(
    queue: Any, work: Callable[[Sequence[Message]], list[Message]] = nothing_special, **values: Any
) -> tuple[Runner, Pipeline]:
    pipeline = Pipeline(queue, work)
    settings = settings_for(**{"park_retry_interval": 0.05} | values)
    return Runner(queue, pipeline, settings, Telemetry(Metrics("embedded")), threading.Event()), pipeline  # type: ignore[arg-type]


def settings_for(**values: Any) -> Settings:
    """Return settings that point nowhere."""
    return load(Settings, ENVIRONMENT | values)


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def handled(pipeline: Pipeline) -> list[bytes]:
    return [body for _, bodies in pipeline.batches for body in bodies]


def test_once_empties_the_queue_and_returns(queue: EmbeddedQueue) -> None:
    """An empty queue costs no waiting."""
    queue.publish(f"{n}:x".encode() for n in range(250))
    runner, pipeline = runner_for(queue)
    began = time.monotonic()
    runner.run(once=True)
    assert len(handled(pipeline)) == 250
    assert time.monotonic() - began < 5


def test_a_resource_stays_in_its_lane_and_in_order(queue: EmbeddedQueue) -> None:
    """Two changes of one customer never race inside a process."""
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
    """What waits is taken together; nobody waits for a batch to fill."""

    def slow(messages: Sequence[Message]) -> list[Message]:
        del messages
        time.sleep(0.05)
        return []

    queue.publish(b"one:x" for _ in range(100))
    runner, pipeline = runner_for(queue, slow, lanes=1, max_batch=40)
    runner.run(once=True)
    sizes = [len(bodies) for _, bodies in pipeline.batches]
    assert max(sizes) == 40
    assert sum(sizes) == 100


@pytest.mark.parametrize("limit", [{"max_in_flight": 10}, {"max_in_flight_bytes": 50, "max_in_flight": 10}])
def test_no_more_is_held_than_allowed(limit: dict[str, int], queue: EmbeddedQueue) -> None:
    """Messages and bytes in flight are bounded, whatever waits in the queue."""
    most = 0

    def watching(messages: Sequence[Message]) -> list[Message]:
        nonlocal most
        del messages
        most = max(most, len(runner._in_flight))
        time.sleep(0.01)
        return []

    queue.publish(f"{n}:abcde".encode() for n in range(60))
    runner, pipeline = runner_for(queue, watching, **limit)
    runner.run(once=True)
    assert len(handled(pipeline)) == 60
    assert 0 < most <= 10
    assert runner._in_flight._bytes == 0


def test_events_profiles_and_the_catalog_do_not_wait_for_each_other(queue: EmbeddedQueue) -> None:
    """Jobs of profiles and of the catalog take minutes; orders have no time for that."""
    queue.publish([b"customer:1", b"product:1", b"order:1", b"payment:1"])
    release = threading.Event()

    def work(messages: Sequence[Message]) -> list[Message]:
        if messages[0].key[0] in {"customer", "product"}:
            assert release.wait(10)
        return []

    runner, pipeline = runner_for(queue, work, lanes=1)
    running = threading.Thread(target=runner.run, kwargs={"once": True})
    running.start()
    wait_for(lambda: len(handled(pipeline)) == 2)
    assert sorted(handled(pipeline)) == [b"order:1", b"payment:1"]
    release.set()
    running.join(10)
    assert len(handled(pipeline)) == 4


def test_a_message_is_ours_for_as_long_as_its_lease_is_extended(tmp_path: Path) -> None:
    """Until then its events are surely new, however long they wait."""
    queue = EmbeddedQueue(tmp_path / "q.db", lease_seconds=0.6)
    queue.publish([b"order:1"])
    ours: list[bool] = []

    def work(messages: Sequence[Message]) -> list[Message]:
        time.sleep(1.5)
        ours.extend(message.lease.is_valid() for message in messages)
        return []

    runner_for(queue, work)[0].run(once=True)
    assert ours == [True]


def test_leases_of_held_messages_are_extended(tmp_path: Path) -> None:
    """Work that takes longer than a lease is not done twice."""
    queue = EmbeddedQueue(tmp_path / "q.db", lease_seconds=0.3)

    def slow(messages: Sequence[Message]) -> list[Message]:
        del messages
        time.sleep(1)
        return []

    queue.publish([b"a:x"])
    runner, pipeline = runner_for(queue, slow)
    runner.run(once=True)
    assert handled(pipeline) == [b"a:x"]


def failing_once(method: Callable[..., None], error: Exception) -> Callable[..., None]:
    """Return a method that fails the first time."""
    errors = [error]

    def call(*arguments: Any, **named: Any) -> None:
        if errors:
            raise errors.pop()
        method(*arguments, **named)

    return call


def test_leases_are_extended_again_whatever_one_try_meets(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or all that is held would be handled a second time; the text of a stranger's error is not shown."""
    queue = EmbeddedQueue(tmp_path / "q.db", lease_seconds=1.2)
    monkeypatch.setattr(queue, "extend", failing_once(queue.extend, RuntimeError("of somebody")))
    queue.publish([b"a:x"])
    runner, pipeline = runner_for(queue, lambda _: time.sleep(1.6) or [])  # type: ignore[func-returns-value]
    runner.run(once=True)
    assert handled(pipeline) == [b"a:x"]
    (record,) = [record for record in caplog.records if record.message == "leases_not_extended"]
    assert vars(record)["reason"] == "unexpected RuntimeError"


def parking(times: int) -> Callable[[Sequence[Message]], list[Message]]:
    left = [times]

    def work(messages: Sequence[Message]) -> list[Message]:
        if left[0] == 0:
            return []
        left[0] -= 1
        for message in messages:
            message.outcome = Outcome(Disposition.PARK, "send", KlaviyoMisconfigured("401: check KLAVIYO_AUTH_KEY"))
        return list(messages)

    return work


def test_a_parked_worker_keeps_its_messages_and_goes_on_by_itself(queue: EmbeddedQueue) -> None:
    """No attempt is spent while the key is refused, and nothing new is pulled."""
    queue.publish([b"a:1", b"b:1"])
    runner, pipeline = runner_for(queue, parking(3), max_in_flight=1)
    stopper = threading.Timer(2.0, runner.stop)
    stopper.start()
    runner.run()
    stopper.cancel()
    assert sorted(handled(pipeline)) == [b"a:1", b"b:1"]


def test_a_parked_worker_pulls_nothing(queue: EmbeddedQueue) -> None:
    """What it cannot handle is left to be handled by others, or later."""
    queue.publish([b"a:1"])
    runner, _ = runner_for(queue, parking(10**9))
    thread = threading.Thread(target=runner.run, daemon=True)
    thread.start()
    time.sleep(1.3)  # longer than a pull that was under way
    queue.publish([b"b:1"])
    time.sleep(0.3)
    left = [delivery.body for delivery in EmbeddedQueue(queue._path).receive(9, 0)]
    runner.stop()
    thread.join(5)
    assert left == [b"b:1"]


def holding(error: Exception, until: threading.Event) -> Callable[[Sequence[Message]], list[Message]]:
    """Keep every message that is named `a`, until told otherwise."""

    def work(messages: Sequence[Message]) -> list[Message]:
        kept = [] if until.is_set() else [message for message in messages if message.delivery.body.startswith(b"a")]
        for message in kept:
            message.outcome = Outcome(Disposition.HOLD, "send", error)
        return kept

    return work


@pytest.fixture
def running() -> Iterator[Callable[[Runner], threading.Thread]]:
    """Run runners in threads, and stop them in the end."""
    started: list[tuple[Runner, threading.Thread]] = []

    def start(runner: Runner) -> threading.Thread:
        thread = threading.Thread(target=runner.run, daemon=True)
        thread.start()
        started.append((runner, thread))
        return thread

    yield start
    for runner, thread in started:
        runner.stop()
        thread.join(5)
        assert not thread.is_alive()


def test_pulling_pauses_while_all_that_is_held_waits_for_an_outage(
    queue: EmbeddedQueue, running: Callable[[Runner], threading.Thread], caplog: pytest.LogCaptureFixture
) -> None:
    """What nobody can handle stays where others, or a later worker, can get it; it goes on by itself."""
    over = threading.Event()
    queue.publish([b"a:1"])
    runner, pipeline = runner_for(queue, holding(CircuitOpen("down", retry_after=0.1), over))
    running(runner)
    wait_for(lambda: runner.held() == 1)
    time.sleep(1.3)  # longer than a pull that was under way
    queue.publish([b"b:1", b"b:2"])
    time.sleep(0.5)
    assert handled(pipeline) == []
    assert [record.message for record in caplog.records] == ["pulling_paused"]
    over.set()
    wait_for(lambda: len(handled(pipeline)) == 3)
    assert runner.held() == runner.in_flight() == 0


def test_a_message_in_a_while_is_pulled_in_an_outage(
    queue: EmbeddedQueue, running: Callable[[Runner], threading.Thread], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Should only the messages that are held be the trouble, the others must not wait for them."""
    monkeypatch.setattr("worker.runtime.runner.MAX_BACKOFF", 0.5)
    queue.publish([b"a:1"])
    runner, pipeline = runner_for(queue, holding(CircuitOpen("500", retry_after=0.1), threading.Event()))
    running(runner)
    wait_for(lambda: runner.held() == 1)
    time.sleep(1.1)
    queue.publish([b"b:1", b"b:2"])
    wait_for(lambda: len(handled(pipeline)) == 2)
    assert runner.held() == 1


def test_pulling_goes_on_while_a_message_waits_for_a_reason_of_its_own(
    queue: EmbeddedQueue, running: Callable[[Runner], threading.Thread]
) -> None:
    """What commercetools cannot show yet is no outage."""
    queue.publish([b"a:1"])
    runner, pipeline = runner_for(queue, holding(Transient("not readable yet", 60), threading.Event()))
    running(runner)
    wait_for(lambda: runner.held() == 1)
    queue.publish([b"b:1"])
    wait_for(lambda: handled(pipeline) == [b"b:1"])


def test_stopping_in_an_outage_returns_what_is_held_at_no_price(queue: EmbeddedQueue) -> None:
    """At once: nobody waits for the end of an outage."""
    queue.publish([b"a:1", b"a:2"])
    runner, _ = runner_for(queue, holding(CircuitOpen("down", retry_after=600), threading.Event()))
    thread = threading.Thread(target=runner.run, daemon=True)
    thread.start()
    wait_for(lambda: runner.held() == 2)
    runner.stop()
    thread.join(5)
    assert not thread.is_alive()
    again = EmbeddedQueue(queue._path).receive(9, 0)
    assert [(delivery.body, delivery.attempt) for delivery in again] == [(b"a:1", 1), (b"a:2", 1)]


def test_a_queue_that_refuses_parks_the_worker(
    queue: EmbeddedQueue, running: Callable[[Runner], threading.Thread], caplog: pytest.LogCaptureFixture
) -> None:
    """A subscription that was deleted, or a right withdrawn, may come back: unready until then, one line a minute."""
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
    wait_for(lambda: handled(pipeline) == [b"a:1"])
    wait_for(lambda: not runner.parked_reason())
    assert [record.message for record in caplog.records if record.levelname == "ERROR"] == ["parked"]


@pytest.mark.parametrize("answer", [[], QueueRefusedError("gone")], ids=["nothing there", "refused"])
def test_the_loop_has_begun_when_the_queue_has_answered(
    queue: EmbeddedQueue, running: Callable[[Runner], threading.Thread], answer: Any
) -> None:
    """Whatever it says: a worker that is parked from the start is up."""
    asked, release = threading.Event(), threading.Event()

    def waiting(max_messages: int, wait: float) -> Any:
        del max_messages, wait
        asked.set()
        release.wait(10)
        return Scripted(answer)()

    queue.receive = waiting  # type: ignore[method-assign]
    runner, _ = runner_for(queue)
    running(runner)
    assert asked.wait(10)
    assert not runner.has_polled()
    release.set()
    wait_for(runner.has_polled)


def test_a_queue_that_is_only_silent_has_not_accepted_the_worker_yet(
    queue: EmbeddedQueue, running: Callable[[Runner], threading.Thread], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stream tells of a refusal a moment after it was opened: silence counts after a second `park_retry_interval`."""
    monkeypatch.setattr("worker.runtime.runner.RECEIVE_WAIT", 0.05)
    refusals = [QueueRefusedError("QUEUE_URL: gone")]
    silent: list[str] = []

    def refusing(max_messages: int, wait: float) -> Any:
        del max_messages, wait
        if refusals:
            raise refusals.pop()
        silent.append(runner.parked_reason())
        time.sleep(0.05)
        return []

    queue.receive = refusing  # type: ignore[method-assign]
    runner, _ = runner_for(queue, park_retry_interval=0.5)
    running(runner)
    wait_for(lambda: silent and not silent[-1])
    assert silent[:4] == ["QUEUE_URL: gone"] * 4


def test_once_ends_when_the_queue_refuses(queue: EmbeddedQueue) -> None:
    """A script wants to know."""
    queue.publish([b"a:1"])
    queue.receive = Scripted(QueueRefusedError("gone"))  # type: ignore[method-assign,assignment]
    runner, _ = runner_for(queue)
    with pytest.raises(QueueRefusedError):
        runner.run(once=True)


def test_once_waits_for_an_outage_to_end_but_not_for_ever(
    queue: EmbeddedQueue, caplog: pytest.LogCaptureFixture
) -> None:
    """Within `max_wait`, as for delayed redeliveries; then the messages go back, at no price."""
    over = threading.Event()
    threading.Timer(0.5, over.set).start()
    queue.publish([b"a:1"])
    runner, pipeline = runner_for(queue, holding(CircuitOpen("down", retry_after=0.1), over))
    runner.run(once=True, max_wait=60)
    assert handled(pipeline) == [b"a:1"]
    queue = EmbeddedQueue(queue._path)
    queue.publish([b"a:2"])
    runner, _ = runner_for(queue, holding(CircuitOpen("down", retry_after=0.1), threading.Event()))
    runner.run(once=True, max_wait=0.3)
    assert "wait_timed_out" in [record.message for record in caplog.records]
    (again,) = EmbeddedQueue(queue._path).receive(9, 0)
    assert (again.body, again.attempt) == (b"a:2", 1)


def test_the_heartbeat_tells_a_loop_that_hangs(
    queue: EmbeddedQueue, running: Callable[[Runner], threading.Thread], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A restart helps then; not in an outage, nor while parked, nor at the end."""
    monkeypatch.setattr("worker.runtime.runner.STALL_TIMEOUT", 1.5)
    queue.publish([b"a:1"])
    runner, _ = runner_for(queue, holding(CircuitOpen("down", retry_after=60), threading.Event()))
    thread = running(runner)
    wait_for(lambda: runner.held() == 1)
    time.sleep(2)
    assert runner.is_alive()
    assert not runner.is_stopping()
    release = threading.Event()
    runner._in_flight.wait_for_change = lambda _: release.wait(10)  # type: ignore[method-assign,assignment]
    wait_for(lambda: not runner.is_alive())
    release.set()
    runner.stop()
    thread.join(5)
    assert runner.is_alive()
    assert runner.is_stopping()


def test_once_does_not_wait_for_credentials(queue: EmbeddedQueue) -> None:
    """A script gets the error, and the messages stay in the queue."""
    queue.publish([b"a:1"])
    runner, _ = runner_for(queue, parking(1))
    with pytest.raises(KlaviyoMisconfigured):
        runner.run(once=True)
    assert len(EmbeddedQueue(queue._path).receive(1, 0)) == 1


def test_stopping_returns_what_was_not_begun_at_once(queue: EmbeddedQueue) -> None:
    """What waits behind a batch goes back while the lane still works on it; the batch is finished."""
    begun, release = threading.Event(), threading.Event()

    def slow(messages: Sequence[Message]) -> list[Message]:
        del messages
        begun.set()
        release.wait(10)
        return []

    queue.publish(f"a:{n}".encode() for n in range(20))
    runner, pipeline = runner_for(queue, slow, lanes=1, max_batch=5)
    thread = threading.Thread(target=runner.run, daemon=True)
    thread.start()
    begun.wait(5)
    runner.stop()
    left = {delivery.body for delivery in EmbeddedQueue(queue._path).receive(100, 5)}
    assert thread.is_alive()
    release.set()
    thread.join(5)
    assert not thread.is_alive()
    done = set(handled(pipeline))
    assert done | left == {f"a:{n}".encode() for n in range(20)}
    assert not done & left
    assert left


def test_nothing_goes_back_before_pulling_has_ended(queue: EmbeddedQueue) -> None:
    """A queue that streams would hand it to this very worker again, at the price of an attempt."""
    begun = threading.Event()
    calls: list[str] = []

    def ending() -> None:
        time.sleep(0.5)
        calls.append("stop")

    def slow(messages: Sequence[Message]) -> list[Message]:
        begun.set()
        time.sleep(0.1)
        return list(messages)

    give_back = queue.nack
    queue.stop = ending  # type: ignore[method-assign]
    queue.nack = lambda *given: (calls.append("nack"), give_back(*given))  # type: ignore[method-assign,assignment,func-returns-value]
    queue.publish([b"a:1", b"b:1"])
    runner, _ = runner_for(queue, slow, park_retry_interval=60)
    thread = threading.Thread(target=runner.run, daemon=True)
    thread.start()
    begun.wait(5)
    runner.stop()
    thread.join(5)
    assert calls[0] == "stop"
    assert "nack" in calls


@pytest.mark.parametrize(("begun", "attempt"), [(False, 1), (True, 2)])
def test_what_was_begun_is_no_first_delivery_again(begun: bool, attempt: int, queue: EmbeddedQueue) -> None:
    """Its events may be in Klaviyo; only what was never begun goes back as if it had not been received."""
    working = threading.Event()

    def parking(messages: Sequence[Message]) -> list[Message]:
        for message in messages:
            message.events_may_be_sent = begun
        working.set()
        return list(messages)

    queue.publish([b"a:1"])
    runner, _ = runner_for(queue, parking, park_retry_interval=60)
    thread = threading.Thread(target=runner.run, daemon=True)
    thread.start()
    working.wait(5)
    runner.stop()
    thread.join(5)
    assert [delivery.attempt for delivery in EmbeddedQueue(queue._path).receive(1, 1)] == [attempt]


def test_the_grace_period_ends_the_waiting(queue: EmbeddedQueue) -> None:
    """What hangs goes back to the queue, and the caller is told."""
    release = threading.Event()

    def hanging(messages: Sequence[Message]) -> list[Message]:
        release.wait(10)
        return list(messages)

    queue.publish([b"a:1"])
    runner, _ = runner_for(queue, hanging, shutdown_grace_period=0.1)
    threading.Timer(0.3, runner.stop).start()
    with pytest.raises(ShutdownTimeoutError, match="1 messages"):
        runner.run()
    assert len(EmbeddedQueue(queue._path).receive(1, 0)) == 1
    release.set()


def slowly(messages: Sequence[Message]) -> list[Message]:
    del messages
    time.sleep(0.5)
    return []


@pytest.mark.parametrize("method", ["receive", "ack", "extend"])
def test_a_queue_that_breaks_ends_the_run(method: str, queue: EmbeddedQueue) -> None:
    """The supervisor restarts the worker; the leases bring the messages back. A lease not extended is no end."""
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
def test_whatever_ends_the_pulling_what_is_held_goes_back(method: str, queue: EmbeddedQueue) -> None:
    """A defect of a client is no reason to keep messages until their leases end."""
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
    assert sorted([*handled(pipeline), *left]) == [b"a:1", b"a:2"]
    assert b"a:2" in left


def test_once_gives_up_waiting_for_redeliveries(queue: EmbeddedQueue, caplog: pytest.LogCaptureFixture) -> None:
    """`max_wait` bounds the idle time, and what still waits is said."""
    queue.publish([b"a:1"])
    queue.nack(queue.receive(1, 0), delay=60)
    runner, _ = runner_for(queue)
    runner.run(once=True, max_wait=0.1)
    assert [record.message for record in caplog.records] == ["wait_timed_out"]


def test_once_does_not_take_a_queue_out_of_reach_for_empty(
    queue: EmbeddedQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit 3, not 0 with messages left."""
    monkeypatch.setattr("worker.runtime.runner.IDLE_TIMEOUT", 0.1)

    def unreachable() -> list[QueueWarning]:
        raise QueueError("cannot reach")

    queue.backlog = lambda: None  # type: ignore[method-assign,assignment,return-value]
    queue.check = unreachable  # type: ignore[method-assign]
    runner, _ = runner_for(queue)
    with pytest.raises(QueueError, match="cannot reach"):
        runner.run(once=True)


def test_once_on_a_queue_that_cannot_count_ends_when_it_was_quiet_for_a_while(
    queue: EmbeddedQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pub/Sub tells no backlog: a pause shorter than IDLE_TIMEOUT is not the end, nor are many short ones."""
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
    assert handled(pipeline) == [b"a:0", b"a:1", b"a:2", b"a:3"]


def test_lanes_tell_what_they_have_at_work(queue: EmbeddedQueue) -> None:
    """By what they are for; nothing once it is done."""
    go_on = threading.Event()

    def work(messages: Sequence[Message]) -> list[Message]:
        go_on.wait(10)
        return nothing_special(messages)

    runner, _ = runner_for(queue, work, lanes=2)
    assert runner.batch_sizes() == {"events": [0, 0], "profiles": [0, 0], "catalog": [0, 0]}
    queue.publish([b"customer:1", b"product:1"])
    thread = threading.Thread(target=runner.run)
    thread.start()
    try:
        wait_for(lambda: sum(map(sum, runner.batch_sizes().values())) == 2)
        assert {name: sum(lanes) for name, lanes in runner.batch_sizes().items()} == {
            "events": 0,
            "profiles": 1,
            "catalog": 1,
        }
        go_on.set()
        wait_for(lambda: not sum(map(sum, runner.batch_sizes().values())))
    finally:
        go_on.set()
        runner.stop()
        thread.join()
