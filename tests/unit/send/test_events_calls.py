"""Bulk calls that lanes fill together: who waits for whom, and whose error is whose."""

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
    """Lets a bulk call have its turn when the test says so, and notes what is in it."""

    def __init__(self) -> None:
        self.turn = Semaphore(0)
        self.waiting = Semaphore(0)  # released when a call waits for its turn
        self.loads: list[set[str]] = []
        self.single: list[str] = []
        self.before: Exception | None = None  # raised instead of having a turn
        self.after: Callable[[set[str]], None] = lambda _: None
        self.not_made: list[Exception] = []  # why calls were not made
        self.throttled: Callable[[], None] | None = None  # called when a first try is refused for the moment
        self._made: dict[int, int] = {}
        self._lock = Lock()

    def requests_sent(self) -> int:
        return self._made.get(get_ident(), 0)

    def call(self, method: str, path: str, body: Body = None, *, idempotent: bool = True) -> Json:
        if not callable(body):
            assert isinstance(body, dict)
            self.single.append(body["data"]["attributes"]["unique_id"])
            return {}
        self.waiting.release()
        assert self.turn.acquire(timeout=WAIT)
        if self.before:
            raise self.before
        if self.throttled:
            body()
            self.throttled()
        try:
            document = orjson.loads(body())
        except Exception as reason:
            self.not_made.append(reason)
            raise
        load = {
            each["attributes"]["unique_id"]
            for entry in document["data"]["attributes"]["events-bulk-create"]["data"]
            for each in entry["attributes"]["events"]["data"]
        }
        with self._lock:
            self._made[get_ident()] = self.requests_sent() + 1
            self.loads.append(load)
        self.after(load)
        return {}


def always() -> bool:
    return True


def event(name: str, fresh: Callable[[], bool] = always) -> Operation:
    made = event_operation(
        metric="Placed Order",
        unique_id=name,
        time="2026-11-01T10:00:00Z",
        value=None,
        profile={"email": f"{name}@example.com"},
        properties={},
    )
    return Operation(OperationKind.CREATE_EVENT, made.key, made.resource, is_first_delivery=fresh)


def names(lane: str, number: int = 5) -> list[str]:
    return [f"{lane}{each}" for each in range(number)]


class Lanes:
    """Lanes that send at the same time."""

    def __init__(self, klaviyo: Klaviyo) -> None:
        self.klaviyo = klaviyo
        self.sender = Sender(klaviyo, 4, bulk_threshold=0)
        self.threads = ThreadPoolExecutor(8)

    def send(self, *operations: Operation) -> Future[list[Any]]:
        return self.threads.submit(self.sender.send, operations)

    def first_waits(self) -> None:
        assert self.klaviyo.waiting.acquire(timeout=WAIT)

    def all_wait(self, number: int) -> None:
        """Return when so many events wait for a call."""
        calls = self.sender._bulk_senders[0]._batcher  # type: ignore[attr-defined]
        wait_for(lambda: len(calls._waiting) == number)  # nobody is notified of that


@pytest.fixture
def klaviyo() -> Klaviyo:
    return Klaviyo()


@pytest.fixture
def lanes(klaviyo: Klaviyo) -> Iterator[Lanes]:
    running = Lanes(klaviyo)
    yield running
    klaviyo.turn.release(100)
    running.threads.shutdown()


def sent_by(lanes: Lanes, *letters: str, number: int = 5) -> list[Future[list[Any]]]:
    """Have lanes send, one after the other, while no call has its turn."""
    futures = []
    for index, lane in enumerate(letters, 1):
        futures.append(lanes.send(*map(event, names(lane, number))))
        if index == 1:
            lanes.first_waits()
        lanes.all_wait(index * number)
    return futures


def test_what_comes_while_a_call_waits_for_its_turn_goes_with_it(lanes: Lanes, klaviyo: Klaviyo) -> None:
    """Three lanes, one call: the longer Klaviyo's limits keep it waiting, the fuller it is."""
    futures = sent_by(lanes, "a", "b", "c")
    klaviyo.turn.release()
    assert [future.result(WAIT) for future in futures] == [[None] * 5] * 3
    assert klaviyo.loads == [{*names("a"), *names("b"), *names("c")}]


def test_a_single_lane_waits_for_nobody(lanes: Lanes, klaviyo: Klaviyo) -> None:
    """No linger: an idle worker's call is made at once."""
    klaviyo.turn.release()
    assert lanes.send(*map(event, names("a"))).result(WAIT) == [None] * 5
    assert klaviyo.loads == [set(names("a"))]


def test_the_next_call_fills_while_one_is_under_way(lanes: Lanes, klaviyo: Klaviyo) -> None:
    """A slow answer keeps only those waiting whose events it is about."""
    answer = Event()
    klaviyo.after = lambda load: None if "b0" in load else assert_(answer.wait(WAIT))
    (first,) = sent_by(lanes, "a")
    klaviyo.turn.release()
    lanes.all_wait(0)
    second = lanes.send(*map(event, names("b")))
    klaviyo.turn.release()
    assert second.result(WAIT) == [None] * 5
    assert not first.done()
    answer.set()
    assert first.result(WAIT) == [None] * 5


def assert_(condition: bool) -> None:
    assert condition


def test_a_call_that_gets_no_answer_is_an_error_for_all_in_it(lanes: Lanes, klaviyo: Klaviyo) -> None:
    """Whichever lane made it."""
    error = Transient("no answer")

    def fail(_: set[str]) -> None:
        raise error

    klaviyo.after = fail
    futures = sent_by(lanes, "a", "b")
    klaviyo.turn.release()
    assert [future.result(WAIT) for future in futures] == [[error] * 5] * 2
    assert klaviyo.single == []


def test_a_call_that_is_held_back_concerns_its_own_lane_only(lanes: Lanes, klaviyo: Klaviyo) -> None:
    """The others try themselves, and may come through."""
    klaviyo.before = CircuitOpen("down")
    first, second = sent_by(lanes, "a", "b")
    klaviyo.turn.release()
    assert first.result(WAIT) == [klaviyo.before] * 5
    lanes.first_waits()
    klaviyo.before = None
    klaviyo.turn.release()
    assert second.result(WAIT) == [None] * 5
    assert klaviyo.loads == [set(names("b"))]


def test_one_lanes_culprit_is_nothing_to_the_others(lanes: Lanes, klaviyo: Klaviyo) -> None:
    """A refused call is narrowed, and the culprit goes alone by the lane it belongs to."""

    def refuse(load: set[str]) -> None:
        if "b3" in load:
            raise Rejected("bad", 400)

    klaviyo.after = refuse
    futures = sent_by(lanes, "a", "b")
    klaviyo.turn.release(50)
    assert [future.result(WAIT) for future in futures] == [[None] * 5] * 2
    assert "b3" in klaviyo.single
    accepted = [name for load in klaviyo.loads if "b3" not in load for name in load]
    assert sorted(accepted + klaviyo.single) == sorted([*names("a"), *names("b")])


def test_a_defect_leaves_nobody_waiting(lanes: Lanes, klaviyo: Klaviyo) -> None:
    """The lane that made the call raises it; the others' events are tried again."""

    def fail(_: set[str]) -> None:
        raise ZeroDivisionError

    klaviyo.after = fail
    first, second = sent_by(lanes, "a", "b")
    klaviyo.turn.release()
    assert isinstance(first.exception(WAIT), ZeroDivisionError)
    assert [type(error) for error in second.result(WAIT)] == [Transient] * 5


def test_what_a_defect_left_over_is_sent_by_nobody(
    lanes: Lanes, klaviyo: Klaviyo, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its messages come again, so a later call must not have it too."""
    monkeypatch.setattr(events, "MAX_EVENTS", 3)

    def fail(_: set[str]) -> None:
        raise ZeroDivisionError

    klaviyo.after = fail
    (first,) = sent_by(lanes, "a")
    klaviyo.turn.release()
    assert isinstance(first.exception(WAIT), ZeroDivisionError)
    klaviyo.after = lambda _: None
    klaviyo.turn.release(2)
    assert lanes.send(*map(event, names("b"))).result(WAIT) == [None] * 5
    assert set().union(*klaviyo.loads[1:]) == set(names("b"))


def test_what_another_worker_may_have_sent_by_now_goes_alone(lanes: Lanes, klaviyo: Klaviyo) -> None:
    """Leases may end while a call waits for its turn: the machine slept, say."""
    leased = Event()
    leased.set()
    future = lanes.send(*(event(name, leased.is_set) for name in names("a")), *map(event, names("b")))
    lanes.first_waits()
    leased.clear()
    klaviyo.turn.release()
    assert future.result(WAIT) == [None] * 10
    assert klaviyo.loads == [set(names("b"))]
    assert sorted(klaviyo.single) == names("a")


def test_each_try_of_a_call_asks_anew_what_may_go(lanes: Lanes, klaviyo: Klaviyo) -> None:
    """A call that was throttled goes again up to a minute later."""
    leased = Event()
    leased.set()
    klaviyo.throttled = leased.clear
    klaviyo.turn.release()
    sent = lanes.send(*(event(name, leased.is_set) for name in names("a")), *map(event, names("b"))).result(WAIT)
    assert sent == [None] * 10
    assert klaviyo.loads == [set(names("b"))]
    assert sorted(klaviyo.single) == names("a")


def test_a_call_of_which_nothing_is_left_is_not_made(lanes: Lanes, klaviyo: Klaviyo) -> None:
    """It tells nobody, a gate least of all, that Klaviyo refused anything."""
    leased = Event()
    leased.set()
    future = lanes.send(*(event(name, leased.is_set) for name in names("a")))
    lanes.first_waits()
    leased.clear()
    klaviyo.turn.release()
    assert future.result(WAIT) == [None] * 5
    assert klaviyo.loads == []
    assert [isinstance(reason, WorkerError) for reason in klaviyo.not_made] == [False]
    assert sorted(klaviyo.single) == names("a")
