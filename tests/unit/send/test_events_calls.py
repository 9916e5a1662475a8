"""Bulk calls that several lanes share: the waits of the lanes, and the events that get an error."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from threading import Event, Lock, Semaphore, get_ident
from typing import TYPE_CHECKING, Any

import orjson
import pytest

from tests.support.sender import Sender
from tests.unit.runtime.test_runner import wait_for
from worker.errors import CircuitOpen, Rejected, Transient, WorkerError
from worker.model import Json, Operation, OperationKind
from worker.send import events
from worker.transform.order_events import event_operation

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from worker.klaviyo.client import Body

WAIT = 30.0


class Klaviyo:
    """A fake that grants bulk calls when the test allows it and records their events."""

    def __init__(self) -> None:
        self.grants = Semaphore(0)
        self.waiting = Semaphore(0)  # released when a call waits for its grant
        self.calls: list[set[str]] = []
        self.single: list[str] = []
        self.before: Exception | None = None  # raised before the call is granted
        self.after: Callable[[set[str]], None] = lambda _: None
        self.body_errors: list[Exception] = []  # raised while a body was prepared
        self.throttled: Callable[[], None] | None = None  # called when the first request is throttled
        self._sent: dict[int, int] = {}
        self._lock = Lock()

    def requests_sent(self) -> int:
        return self._sent.get(get_ident(), 0)

    def call(self, method: str, path: str, body: Body = None, *, idempotent: bool = True) -> Json:
        if not callable(body):
            assert isinstance(body, dict)
            self.single.append(body["data"]["attributes"]["unique_id"])
            return {}
        self.waiting.release()
        assert self.grants.acquire(timeout=WAIT)
        if self.before:
            raise self.before
        if self.throttled:
            body()
            self.throttled()
        try:
            document = orjson.loads(body())
        except Exception as reason:
            self.body_errors.append(reason)
            raise
        ids = {
            each["attributes"]["unique_id"]
            for entry in document["data"]["attributes"]["events-bulk-create"]["data"]
            for each in entry["attributes"]["events"]["data"]
        }
        with self._lock:
            self._sent[get_ident()] = self.requests_sent() + 1
            self.calls.append(ids)
        self.after(ids)
        return {}


def always() -> bool:
    return True


def event(name: str, first_delivery: Callable[[], bool] = always) -> Operation:
    made = event_operation(
        metric="Placed Order",
        unique_id=name,
        time="2026-11-01T10:00:00Z",
        value=None,
        profile={"email": f"{name}@example.com"},
        properties={},
    )
    return Operation(OperationKind.CREATE_EVENT, made.key, made.resource, is_first_delivery=first_delivery)


def names(lane: str, number: int = 5) -> list[str]:
    return [f"{lane}{each}" for each in range(number)]


class Lanes:
    """Lanes that send concurrently."""

    def __init__(self, klaviyo: Klaviyo) -> None:
        self.klaviyo = klaviyo
        self.sender = Sender(klaviyo, 4, bulk_threshold=0)
        self.threads = ThreadPoolExecutor(8)

    def send(self, *operations: Operation) -> Future[list[Any]]:
        return self.threads.submit(self.sender.send, operations)

    def first_waits(self) -> None:
        assert self.klaviyo.waiting.acquire(timeout=WAIT)

    def all_wait(self, number: int) -> None:
        """Return when this number of events waits for a call."""
        batcher = self.sender._bulk_senders[0]._batcher  # type: ignore[attr-defined]
        wait_for(lambda: len(batcher._waiting) == number)  # no event signals this


@pytest.fixture
def klaviyo() -> Klaviyo:
    return Klaviyo()


@pytest.fixture
def lanes(klaviyo: Klaviyo) -> Iterator[Lanes]:
    running = Lanes(klaviyo)
    yield running
    klaviyo.grants.release(100)
    running.threads.shutdown()


def sent_by(lanes: Lanes, *lane_names: str, number: int = 5) -> list[Future[list[Any]]]:
    """Start lanes in sequence while the rate limiter grants no bulk call."""
    futures = []
    for index, lane in enumerate(lane_names, 1):
        futures.append(lanes.send(*map(event, names(lane, number))))
        if index == 1:
            lanes.first_waits()
        lanes.all_wait(index * number)
    return futures


def test_waiting_call_takes_the_events_of_all_lanes(lanes: Lanes, klaviyo: Klaviyo) -> None:
    """While the rate limiter delays a bulk call, other lanes add events to it."""
    futures = sent_by(lanes, "a", "b", "c")
    klaviyo.grants.release()
    assert [future.result(WAIT) for future in futures] == [[None] * 5] * 3
    assert klaviyo.calls == [{*names("a"), *names("b"), *names("c")}]


def test_single_lane_sends_immediately(lanes: Lanes, klaviyo: Klaviyo) -> None:
    """If no other lane has events, a bulk call does not wait for them."""
    klaviyo.grants.release()
    assert lanes.send(*map(event, names("a"))).result(WAIT) == [None] * 5
    assert klaviyo.calls == [set(names("a"))]


def test_slow_response_does_not_delay_the_next_call(lanes: Lanes, klaviyo: Klaviyo) -> None:
    """Only the lanes with events in the slow call wait for its response."""
    answer = Event()
    klaviyo.after = lambda ids: None if "b0" in ids else assert_(answer.wait(WAIT))
    (first,) = sent_by(lanes, "a")
    klaviyo.grants.release()
    lanes.all_wait(0)
    second = lanes.send(*map(event, names("b")))
    klaviyo.grants.release()
    assert second.result(WAIT) == [None] * 5
    assert not first.done()
    answer.set()
    assert first.result(WAIT) == [None] * 5


def assert_(condition: bool) -> None:
    assert condition


def test_call_without_a_response_fails_all_its_events(lanes: Lanes, klaviyo: Klaviyo) -> None:
    """The events of the lanes that did not make the bulk call fail, too."""
    error = Transient("no answer")

    def fail(_: set[str]) -> None:
        raise error

    klaviyo.after = fail
    futures = sent_by(lanes, "a", "b")
    klaviyo.grants.release()
    assert [future.result(WAIT) for future in futures] == [[error] * 5] * 2
    assert klaviyo.single == []


def test_open_circuit_fails_the_events_of_one_lane_only(lanes: Lanes, klaviyo: Klaviyo) -> None:
    """The other lanes make their own calls, which can succeed."""
    klaviyo.before = CircuitOpen("down")
    first, second = sent_by(lanes, "a", "b")
    klaviyo.grants.release()
    assert first.result(WAIT) == [klaviyo.before] * 5
    lanes.first_waits()
    klaviyo.before = None
    klaviyo.grants.release()
    assert second.result(WAIT) == [None] * 5
    assert klaviyo.calls == [set(names("b"))]


def test_rejected_event_of_one_lane_does_not_affect_the_others(lanes: Lanes, klaviyo: Klaviyo) -> None:
    """The rejected bulk call is split. The lane of the rejected event sends it individually."""

    def refuse(ids: set[str]) -> None:
        if "b3" in ids:
            raise Rejected("bad", 400)

    klaviyo.after = refuse
    futures = sent_by(lanes, "a", "b")
    klaviyo.grants.release(50)
    assert [future.result(WAIT) for future in futures] == [[None] * 5] * 2
    assert "b3" in klaviyo.single
    accepted = [name for ids in klaviyo.calls if "b3" not in ids for name in ids]
    assert sorted(accepted + klaviyo.single) == sorted([*names("a"), *names("b")])


def test_unexpected_error_ends_the_wait_of_all_lanes(lanes: Lanes, klaviyo: Klaviyo) -> None:
    """The lane that made the call raises the error. The events of the other lanes get a transient error."""

    def fail(_: set[str]) -> None:
        raise ZeroDivisionError

    klaviyo.after = fail
    first, second = sent_by(lanes, "a", "b")
    klaviyo.grants.release()
    assert isinstance(first.exception(WAIT), ZeroDivisionError)
    assert [type(error) for error in second.result(WAIT)] == [Transient] * 5


def test_events_of_a_lane_that_failed_unexpectedly_are_not_sent(
    lanes: Lanes, klaviyo: Klaviyo, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their messages are redelivered, so a later bulk call must not send these events."""
    monkeypatch.setattr(events, "MAX_EVENTS", 3)

    def fail(_: set[str]) -> None:
        raise ZeroDivisionError

    klaviyo.after = fail
    (first,) = sent_by(lanes, "a")
    klaviyo.grants.release()
    assert isinstance(first.exception(WAIT), ZeroDivisionError)
    klaviyo.after = lambda _: None
    klaviyo.grants.release(2)
    assert lanes.send(*map(event, names("b"))).result(WAIT) == [None] * 5
    assert set().union(*klaviyo.calls[1:]) == set(names("b"))


def test_event_whose_lease_expired_before_the_call_is_sent_individually(lanes: Lanes, klaviyo: Klaviyo) -> None:
    """A lease can expire while a bulk call waits for the rate limiter, for example if the machine sleeps."""
    leased = Event()
    leased.set()
    future = lanes.send(*(event(name, leased.is_set) for name in names("a")), *map(event, names("b")))
    lanes.first_waits()
    leased.clear()
    klaviyo.grants.release()
    assert future.result(WAIT) == [None] * 10
    assert klaviyo.calls == [set(names("b"))]
    assert sorted(klaviyo.single) == names("a")


def test_leases_are_checked_before_every_request(lanes: Lanes, klaviyo: Klaviyo) -> None:
    """A throttled bulk call is retried for up to a minute."""
    leased = Event()
    leased.set()
    klaviyo.throttled = leased.clear
    klaviyo.grants.release()
    sent = lanes.send(*(event(name, leased.is_set) for name in names("a")), *map(event, names("b"))).result(WAIT)
    assert sent == [None] * 10
    assert klaviyo.calls == [set(names("b"))]
    assert sorted(klaviyo.single) == names("a")


def test_call_without_events_is_not_made(lanes: Lanes, klaviyo: Klaviyo) -> None:
    """The exception is not a WorkerError, so the circuit breaker does not count it."""
    leased = Event()
    leased.set()
    future = lanes.send(*(event(name, leased.is_set) for name in names("a")))
    lanes.first_waits()
    leased.clear()
    klaviyo.grants.release()
    assert future.result(WAIT) == [None] * 5
    assert klaviyo.calls == []
    assert [isinstance(reason, WorkerError) for reason in klaviyo.body_errors] == [False]
    assert sorted(klaviyo.single) == names("a")
