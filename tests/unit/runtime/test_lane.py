"""A lane: what has to wait is kept and tried again, and nothing else waits for it."""

from __future__ import annotations

import threading
import time
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest

from tests.conftest import FakeDelivery
from tests.unit.runtime.test_runner import settings_for, wait_for
from worker.errors import CircuitOpen, KlaviyoMisconfigured, Transient
from worker.model import Message, Notification, Outcome
from worker.runtime.in_flight import InFlight
from worker.runtime.lane import Lane, LaneCallbacks

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from worker.errors import WorkerError

SOON = Transient("503", retry_after=0.05)


class Pipeline:
    """Fails as it is told, message by message; notes each batch, and what was given up with which delay."""

    def __init__(self) -> None:
        self.errors: dict[str, WorkerError | None] = {}
        self.batches: list[list[str]] = []
        self.given_up: list[tuple[str, float]] = []

    def process(self, messages: Sequence[Message]) -> list[Message]:
        self.batches.append([message.delivery.id for message in messages])
        for message in messages:
            error = self.errors.get(message.delivery.id)
            message.outcome = Outcome(error.disposition, "send", error) if error else None
        return [message for message in messages if message.is_held]

    def return_to_queue(self, messages: Sequence[Message], delay: float) -> None:
        self.given_up += [(message.delivery.id, delay) for message in messages]

    @property
    def tried(self) -> list[str]:
        return [name for batch in self.batches for name in batch]


class Rig:
    """A lane at work, and what it tells."""

    def __init__(self, **values: Any) -> None:
        self.pipeline = Pipeline()
        self.in_flight = InFlight(100, 10**6)
        self.stopping = threading.Event()
        self.given_back: list[str] = []
        self.refusals: list[tuple[str, str]] = []  # and what the worker shows to be parked for at that time
        self.failures: list[Exception] = []
        ends = LaneCallbacks(
            lambda messages: self.given_back.extend(message.delivery.id for message in messages),
            self.failures.append,
            lambda error: self.refusals.append((str(error), self.in_flight.parked_reason())),
        )
        settings = settings_for(**{"outage_hold": 60, "park_retry_interval": 0.05} | values)
        self.lane = Lane(self.pipeline, self.in_flight, settings, self.stopping, ends)  # type: ignore[arg-type]

    def put(self, *names: str) -> None:
        """Have messages handled; `a1` and `a2` are about the same resource."""
        for name in names:
            message = Message(
                FakeDelivery(b"x", id=name), time.monotonic(), Notification("T", "thing", name[0], None, {})
            )
            self.in_flight.add(message)
            self.lane.put(message)

    def stop(self) -> None:
        self.stopping.set()
        self.lane.end()
        self.lane.join(5)
        assert not self.lane.is_alive()


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = Rig()
    yield rig
    if rig.lane.is_alive():
        rig.stop()


def test_what_has_to_wait_is_tried_again_until_it_succeeds(rig: Rig) -> None:
    """In place, so that it costs no delivery attempt."""
    rig.pipeline.errors["a1"] = SOON
    rig.put("a1")
    rig.lane.start()
    wait_for(lambda: rig.pipeline.tried.count("a1") > 2)
    assert rig.in_flight.held == len(rig.in_flight) == 1
    rig.pipeline.errors.clear()
    wait_for(lambda: not rig.in_flight)
    assert rig.in_flight.held == 0
    assert (rig.pipeline.given_up, rig.given_back, rig.failures) == ([], [], [])


def test_others_of_the_same_resource_wait_behind_it_in_their_order(rig: Rig) -> None:
    """And those of other resources pass."""
    rig.pipeline.errors["a1"] = Transient("503", retry_after=0.5)
    rig.put("a1")
    rig.lane.start()
    wait_for(lambda: rig.in_flight.held)
    rig.pipeline.errors.clear()
    rig.put("a2", "b1", "a3")
    wait_for(lambda: not rig.in_flight)
    assert rig.pipeline.batches == [["a1"], ["b1"], ["a1", "a2", "a3"]]


def test_without_word_from_the_other_side_the_waits_grow(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A record that Klaviyo never answers must not be sent all the time."""
    tries: list[int] = []

    def short(number: int, _: float) -> float:
        tries.append(number)
        return 0.01

    monkeypatch.setattr("worker.runtime.lane.backoff", short)
    rig.pipeline.errors["a1"] = Transient("500")
    rig.put("a1")
    rig.lane.start()
    wait_for(lambda: len(tries) >= 4)
    assert tries[:4] == [0, 1, 2, 3]


def test_a_message_kept_too_long_goes_back_to_the_queue() -> None:
    """After a last try when the hold ends; what it waits there is a share of the hold."""
    rig = Rig(outage_hold=0.6)
    rig.pipeline.errors["a1"] = Transient("503", retry_after=0.61)
    began = time.monotonic()
    rig.put("a1")
    rig.lane.start()
    wait_for(lambda: rig.pipeline.given_up)
    assert time.monotonic() - began >= 1.2
    ((name, delay),) = rig.pipeline.given_up
    assert name == "a1"
    assert delay == pytest.approx(0.02)
    assert rig.pipeline.tried == ["a1"] * 3
    assert not rig.in_flight
    rig.stop()
    assert rig.given_back == []


def test_without_a_hold_a_message_goes_back_at_once() -> None:
    """For queues whose attempts are cheap."""
    rig = Rig(outage_hold=0)
    rig.pipeline.errors["a1"] = SOON
    rig.put("a1")
    rig.lane.start()
    wait_for(lambda: rig.pipeline.given_up)
    assert rig.pipeline.tried == ["a1"]
    rig.stop()


def test_a_parked_message_is_kept_for_as_long_as_it_takes() -> None:
    """No hold ends while nobody's message is at fault; the runner hears of it."""
    rig = Rig(outage_hold=0)
    rig.pipeline.errors["a1"] = KlaviyoMisconfigured("401")
    rig.put("a1")
    rig.lane.start()
    wait_for(lambda: rig.pipeline.tried.count("a1") > 3)
    assert rig.in_flight.parked_reason() == "401"
    assert rig.refusals[0] == ("401", "401")
    rig.pipeline.errors.clear()
    wait_for(lambda: not rig.in_flight)
    assert rig.in_flight.parked_reason() == ""
    assert rig.pipeline.given_up == []
    rig.stop()


def test_the_time_parked_is_no_part_of_the_hold() -> None:
    """Or the first failure once the key is accepted again would cost every message an attempt."""
    rig = Rig(outage_hold=0.2)
    rig.pipeline.errors["a1"] = KlaviyoMisconfigured("401")
    rig.put("a1")
    rig.lane.start()
    time.sleep(0.5)  # longer than the hold and the pause added to it
    rig.pipeline.errors["a1"] = SOON
    parked = rig.pipeline.tried.count("a1")
    wait_for(lambda: rig.pipeline.given_up)
    assert rig.pipeline.tried.count("a1") > parked + 2
    rig.stop()


def test_what_waits_at_the_end_goes_back(rig: Rig) -> None:
    """At once, however long it was to wait."""
    rig.pipeline.errors |= {"a1": Transient("503", retry_after=3600), "b1": KlaviyoMisconfigured("401", 3600)}
    rig.put("a1", "b1")
    rig.lane.start()
    wait_for(lambda: rig.in_flight.held == 2)
    rig.put("a2")
    wait_for(lambda: rig.in_flight.held == 3)
    rig.stop()
    assert rig.given_back == ["a1", "b1", "a2"]
    assert rig.pipeline.tried == ["a1", "b1"]


def test_a_hold_that_ends_while_the_worker_stops_costs_nothing() -> None:
    """What would go back at the price of an attempt goes back for nothing then."""
    rig = Rig(outage_hold=0)
    process = rig.pipeline.process

    def stopped_meanwhile(messages: Sequence[Message]) -> list[Message]:
        rig.stopping.set()
        return process(messages)

    rig.pipeline.process = stopped_meanwhile  # type: ignore[method-assign]
    rig.pipeline.errors["a1"] = SOON
    rig.put("a1")
    rig.lane.start()
    rig.lane.join(5)
    assert rig.given_back == ["a1"]
    assert rig.pipeline.given_up == []


def test_batches_of_what_waited_have_their_limit() -> None:
    """As all batches; what does not fit is next."""
    rig = Rig(max_batch=3)
    rig.pipeline.errors |= {f"{name}1": SOON for name in "abcdefg"}
    rig.put(*(f"{name}1" for name in "abcdefg"))
    rig.lane.start()
    wait_for(lambda: rig.in_flight.held == 7)
    rig.pipeline.errors.clear()
    wait_for(lambda: not rig.in_flight)
    assert max(map(len, rig.pipeline.batches)) == 3
    rig.stop()


def test_the_worker_is_stuck_when_all_it_holds_waits_for_an_outage_to_end() -> None:
    """Not when a record waits for a reason of its own, nor when anything can be worked on."""
    in_flight = InFlight(10, 1000)
    a, b = (Message(FakeDelivery(b"x", id=name), 0.0) for name in "ab")
    in_flight.add(a)
    in_flight.add(b)
    a.outcome = Outcome(CircuitOpen.disposition, "send", CircuitOpen("down"))
    b.outcome = Outcome(Transient.disposition, "enrich", Transient("not readable yet"))
    in_flight.hold([a])
    assert (in_flight.is_idle, in_flight.is_blocked) == (False, False)
    in_flight.hold([b])
    assert (in_flight.is_idle, in_flight.is_blocked) == (True, True)
    in_flight.remove([a])
    assert (in_flight.is_idle, in_flight.is_blocked) == (True, False)
    in_flight.remove([b])
    assert (in_flight.is_idle, in_flight.is_blocked, len(in_flight)) == (True, False, 0)


def test_the_age_of_the_oldest_message_counts_from_its_publishing() -> None:
    """Settled or not, whatever the order: an outage shows long before anything succeeds."""
    in_flight, now = InFlight(10, 1000), datetime.now(UTC)
    assert in_flight.oldest_age() == 0
    young, old, ahead = (
        Message(FakeDelivery(b"x", published_at=now - timedelta(seconds=age)), 0.0) for age in (60, 3600, -60)
    )
    untold = Message(FakeDelivery(b"x"), 0.0)
    in_flight.add(untold)
    assert in_flight.oldest_age() is None
    in_flight.add(ahead)
    assert in_flight.oldest_age() == 0
    for message in (young, old):
        in_flight.add(message)
    assert in_flight.oldest_age() == pytest.approx(3600, abs=30)
    in_flight.remove([old])
    assert in_flight.oldest_age() == pytest.approx(60, abs=30)


@pytest.mark.parametrize(("first", "second", "max_batch"), [(0.2, 0.05, 100), (0.1, 0.1, 1)])
def test_kept_messages_of_a_resource_stay_in_their_order(first: float, second: float, max_batch: int) -> None:
    """However long each was to wait, and wherever a batch ends: what came later is never tried before."""
    rig = Rig(max_batch=max_batch)
    rig.pipeline.errors |= {"a1": Transient("503", retry_after=first), "a2": Transient("503", retry_after=second)}
    rig.put("a1", "a2")
    rig.lane.start()
    wait_for(lambda: rig.pipeline.tried.count("a1") > 3)
    rig.put("a3")
    rig.pipeline.errors.clear()
    wait_for(lambda: not rig.in_flight)
    tried = rig.pipeline.tried
    assert tried[tried.index("a3") - 2 :] == ["a1", "a2", "a3"]
    assert {batch[0] for batch in rig.pipeline.batches[:4]} == {"a1"}
    rig.stop()


def test_waiting_for_an_earlier_message_is_no_work(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lane sleeps until the first message of a resource is due, however early the others would be."""
    looks: list[list[Message]] = []
    look = rig.lane._take_due

    def counted() -> list[Message]:
        looks.append(look())
        return looks[-1]

    monkeypatch.setattr(rig.lane, "_take_due", counted)
    rig.pipeline.errors |= {"a1": Transient("503", retry_after=60), "a2": SOON}
    rig.put("a1", "a2")
    rig.lane.start()
    wait_for(lambda: rig.in_flight.held == 2)
    time.sleep(0.3)
    assert len(looks) <= 3
