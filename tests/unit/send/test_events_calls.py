"""Bulk calls that several lanes share: the waits of the lanes, and the events that get an error."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from threading import Event, Semaphore
from typing import TYPE_CHECKING, Any

import orjson
import pytest

from tests.support.sender import Sender
from tests.support.waiting import wait_for
from worker.errors import CircuitOpen, Rejected, Transient
from worker.send import events
from worker.transform.order_events import event_operation

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from worker.klaviyo.client import Body
    from worker.model import Json, Operation

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
        self.throttled = False  # True: every call needs two requests

    def requests_sent(self) -> int:
        return 0

    def call(self, method: str, path: str, body: Body = None, *, idempotent: bool = True) -> Json:
        if not callable(body):
            assert isinstance(body, dict)
            self.single.append(body["data"]["attributes"]["unique_id"])
            return {}
        self.waiting.release()
        assert self.grants.acquire(timeout=WAIT)
        if self.before:
            raise self.before
        for _ in range(1 + self.throttled):
            ids = _ids(body())
            self.calls.append(ids)
        self.after(ids)
        return {}


def _ids(body: bytes) -> set[str]:
    entries = orjson.loads(body)["data"]["attributes"]["events-bulk-create"]["data"]
    return {each["attributes"]["unique_id"] for entry in entries for each in entry["attributes"]["events"]["data"]}


def event(name: str) -> Operation:
    return event_operation(
        metric="Placed Order",
        unique_id=name,
        time="2026-11-01T10:00:00Z",
        value=None,
        profile={"email": f"{name}@example.com"},
        properties={},
    )


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
    """The lane that made the call sends its events individually. Those of the other lanes get a transient error."""

    def fail(_: set[str]) -> None:
        raise ZeroDivisionError

    klaviyo.after = fail
    first, second = sent_by(lanes, "a", "b")
    klaviyo.grants.release()
    assert first.result(WAIT) == [None] * 5
    assert sorted(klaviyo.single) == names("a")
    assert [type(error) for error in second.result(WAIT)] == [Transient] * 5


def test_events_of_a_lane_that_failed_unexpectedly_do_not_stop_the_other_lanes(
    lanes: Lanes, klaviyo: Klaviyo, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next bulk calls can contain events of that lane, which Klaviyo ignores as repeats."""
    monkeypatch.setattr(events, "MAX_EVENTS", 3)

    def fail(_: set[str]) -> None:
        raise ZeroDivisionError

    klaviyo.after = fail
    (first,) = sent_by(lanes, "a")
    klaviyo.grants.release()
    assert first.result(WAIT) == [None] * 5
    klaviyo.after = lambda _: None
    klaviyo.grants.release(3)
    assert lanes.send(*map(event, names("b"))).result(WAIT) == [None] * 5
    assert set(names("b")) <= set().union(*klaviyo.calls[1:])


def test_id_of_two_lanes_is_in_two_calls(lanes: Lanes, klaviyo: Klaviyo) -> None:
    """Klaviyo rejects a call with a repeated id: https://developers.klaviyo.com/en/reference/bulk_create_events."""
    first, second = sent_by(lanes, "a", "a")
    klaviyo.grants.release(2)
    assert [first.result(WAIT), second.result(WAIT)] == [[None] * 5] * 2
    assert klaviyo.calls == [set(names("a"))] * 2


def test_throttled_call_is_repeated_with_the_same_events(lanes: Lanes, klaviyo: Klaviyo) -> None:
    """The client asks for the body before each request."""
    klaviyo.throttled = True
    klaviyo.grants.release()
    assert lanes.send(*map(event, names("a"))).result(WAIT) == [None] * 5
    assert klaviyo.calls == [set(names("a"))] * 2
