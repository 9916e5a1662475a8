"""A lane holds and retries messages without delaying those of other resources."""

from __future__ import annotations

import threading
import time
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest

from tests.conftest import FakeDelivery
from tests.support.waiting import wait_for
from tests.unit.runtime.test_runner import settings_for
from worker.errors import EndpointRefused, KlaviyoMisconfigured, NotShownYet, Throttled, Transient
from worker.model import Message, Notification, Outcome
from worker.runtime.in_flight import InFlight
from worker.runtime.lane import SUSPECT_ATTEMPT, Lane, LaneCallbacks

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from worker.errors import WorkerError

SOON = Transient("503", retry_after=0.05)


class Pipeline:
    """A fake pipeline that fails with the given error for each message id, and records its calls."""

    def __init__(self) -> None:
        self.errors: dict[str, WorkerError | None] = {}
        self.batches: list[list[str]] = []
        self.nacked: list[tuple[str, float]] = []  # with the delay

    def process(self, messages: Sequence[Message]) -> list[Message]:
        self.batches.append([message.delivery.id for message in messages])
        for message in messages:
            error = self.errors.get(message.delivery.id)
            message.outcome = Outcome(error.disposition, "send", error) if error else None
        return [message for message in messages if message.is_held]

    def nack_held(self, messages: Sequence[Message], delay: float) -> None:
        self.nacked += [(message.delivery.id, delay) for message in messages]

    @property
    def processed(self) -> list[str]:
        return [name for batch in self.batches for name in batch]


class Rig:
    """A running lane and its callbacks."""

    def __init__(self, **values: Any) -> None:
        self.pipeline = Pipeline()
        self.in_flight = InFlight(100, 10**6, 600.0)
        self.stopping = threading.Event()
        self.returned_unprocessed: list[str] = []
        self.refusals: list[str] = []
        self.failures: list[Exception] = []
        callbacks = LaneCallbacks(
            lambda messages: self.returned_unprocessed.extend(message.delivery.id for message in messages),
            self.failures.append,
            lambda error: self.refusals.append(str(error)),
        )
        settings = settings_for(**{"outage_hold": 60, "park_retry_interval": 0.05} | values)
        self.lane = Lane("events-1", self.pipeline, self.in_flight, settings, self.stopping, callbacks)  # type: ignore[arg-type]

    def put(self, *names: str, attempt: int | None = 1) -> None:
        """Put messages into the lane; `a1` and `a2` belong to the same resource."""
        for name in names:
            message = Message(
                FakeDelivery(b"x", id=name, attempt=attempt),
                time.monotonic(),
                Notification("T", "thing", name[0], None, {}),
            )
            self.in_flight.add(message)
            self.lane.put(message)

    def stop(self) -> None:
        self.stopping.set()
        self.lane.end()
        self.lane.join(60)
        assert not self.lane.is_alive()


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = Rig()
    yield rig
    if rig.lane.is_alive():
        rig.stop()


def test_transient_error_is_retried_without_nack(rig: Rig) -> None:
    """A retry in memory uses up no delivery attempt."""
    rig.pipeline.errors["a1"] = SOON
    rig.put("a1")
    rig.lane.start()
    wait_for(lambda: rig.pipeline.processed.count("a1") > 2)
    assert rig.in_flight.held() == len(rig.in_flight) == 1
    rig.pipeline.errors.clear()
    wait_for(lambda: not rig.in_flight)
    assert rig.in_flight.held() == 0
    assert (rig.pipeline.nacked, rig.returned_unprocessed, rig.failures) == ([], [], [])


def test_later_messages_of_the_resource_wait_in_order(rig: Rig) -> None:
    """Messages of other resources are processed in the meantime."""
    rig.pipeline.errors["a1"] = Transient("503", retry_after=2.0)
    rig.put("a1")
    rig.lane.start()
    wait_for(rig.in_flight.held)
    rig.pipeline.errors.clear()
    rig.put("a2", "b1", "a3")
    wait_for(lambda: not rig.in_flight)
    assert rig.pipeline.batches == [["a1"], ["b1"], ["a1", "a2", "a3"]]


@pytest.mark.parametrize("hold", [0, 60])
def test_wait_for_a_new_resource_has_its_own_limit(hold: float) -> None:
    """It is no outage, so it ends without a nack even if the worker does not hold messages during outages."""
    rig = Rig(outage_hold=hold)
    rig.pipeline.errors["a1"] = NotShownYet("not shown yet", retry_after=0.05)
    rig.put("a1")
    rig.lane.start()
    wait_for(lambda: rig.pipeline.processed.count("a1") > 3)
    assert rig.pipeline.nacked == []
    rig.pipeline.errors.clear()
    wait_for(lambda: not rig.in_flight)
    rig.stop()


def test_backoff_grows_with_every_retry(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The backoff applies if Klaviyo's response has no Retry-After."""
    retries: list[int] = []

    def short_backoff(number: int, _: float) -> float:
        retries.append(number)
        return 0.01

    monkeypatch.setattr("worker.runtime.lane.backoff", short_backoff)
    rig.pipeline.errors["a1"] = Transient("500")
    rig.put("a1")
    rig.lane.start()
    wait_for(lambda: len(retries) >= 4)
    assert retries[:4] == [0, 1, 2, 3]


def test_message_is_nacked_when_its_hold_expires() -> None:
    """The last retry is at the end of the hold. The delay of the nack is a share of the hold."""
    rig = Rig(outage_hold=0.6)
    rig.pipeline.errors["a1"] = Transient("503", retry_after=0.61)
    started_at = time.monotonic()
    rig.put("a1")
    rig.lane.start()
    wait_for(lambda: rig.pipeline.nacked)
    assert time.monotonic() - started_at >= 1.2
    ((name, delay),) = rig.pipeline.nacked
    assert name == "a1"
    assert delay == pytest.approx(0.02)
    assert rig.pipeline.processed == ["a1"] * 3
    assert not rig.in_flight
    rig.stop()
    assert rig.returned_unprocessed == []


def test_without_a_hold_a_message_is_nacked_immediately() -> None:
    """`outage_hold` = 0 suits queues without a maximum number of attempts."""
    rig = Rig(outage_hold=0)
    rig.pipeline.errors["a1"] = SOON
    rig.put("a1")
    rig.lane.start()
    wait_for(lambda: rig.pipeline.nacked)
    assert rig.pipeline.processed == ["a1"]
    rig.stop()


@pytest.mark.parametrize("error", [Throttled("429", 0.02), EndpointRefused("403", 0.02)])
def test_message_that_waits_for_a_rate_limit_is_held_without_a_time_limit(error: WorkerError) -> None:
    """This is no outage, so it uses up no attempt. The same holds for a refused endpoint."""
    rig = Rig(outage_hold=0)
    rig.pipeline.errors["a1"] = error
    rig.put("a1")
    rig.lane.start()
    wait_for(lambda: rig.pipeline.processed.count("a1") > 3)
    assert (rig.pipeline.nacked, rig.refusals) == ([], [])
    rig.stop()
    assert rig.returned_unprocessed == ["a1"]


def test_parked_message_is_held_without_a_time_limit() -> None:
    """The lane reports the refusal to the runner."""
    rig = Rig(outage_hold=0)
    rig.pipeline.errors["a1"] = KlaviyoMisconfigured("401")
    rig.put("a1")
    rig.lane.start()
    wait_for(lambda: rig.pipeline.processed.count("a1") > 3)
    assert rig.refusals[0] == "401"
    rig.pipeline.errors.clear()
    wait_for(lambda: not rig.in_flight)
    assert rig.pipeline.nacked == []
    rig.stop()


def test_parked_time_does_not_count_as_hold() -> None:
    """Otherwise the first transient error after the key is fixed would use up an attempt of every message."""
    rig = Rig(outage_hold=0.2)
    rig.pipeline.errors["a1"] = KlaviyoMisconfigured("401")
    rig.put("a1")
    rig.lane.start()
    time.sleep(0.5)  # longer than the hold and the backoff added to it
    rig.pipeline.errors["a1"] = SOON
    while_parked = rig.pipeline.processed.count("a1")
    wait_for(lambda: rig.pipeline.nacked)
    assert rig.pipeline.processed.count("a1") > while_parked + 2
    rig.stop()


def test_held_messages_are_returned_when_the_lane_ends(rig: Rig) -> None:
    """They are returned immediately, even if their next retry is not due yet."""
    rig.pipeline.errors |= {"a1": Transient("503", retry_after=3600), "b1": KlaviyoMisconfigured("401", 3600)}
    rig.put("a1", "b1")
    rig.lane.start()
    wait_for(lambda: rig.in_flight.held() == 2)
    rig.put("a2")
    wait_for(lambda: rig.in_flight.held() == 3)
    rig.stop()
    assert rig.returned_unprocessed == ["a1", "b1", "a2"]
    assert rig.pipeline.processed == ["a1", "b1"]


def test_hold_that_expires_during_shutdown_uses_up_no_attempt() -> None:
    """The message is returned like any other message at shutdown, not nacked as a failure."""
    rig = Rig(outage_hold=0)
    process = rig.pipeline.process

    def stop_during_processing(messages: Sequence[Message]) -> list[Message]:
        rig.stopping.set()
        return process(messages)

    rig.pipeline.process = stop_during_processing  # type: ignore[method-assign]
    rig.pipeline.errors["a1"] = SOON
    rig.put("a1")
    rig.lane.start()
    rig.lane.join(60)
    assert rig.returned_unprocessed == ["a1"]
    assert rig.pipeline.nacked == []


def test_batch_of_held_messages_is_limited() -> None:
    """Held messages beyond `max_batch` follow in the next batch."""
    rig = Rig(max_batch=3)
    rig.pipeline.errors |= {f"{name}1": SOON for name in "abcdefg"}
    rig.put(*(f"{name}1" for name in "abcdefg"))
    rig.lane.start()
    wait_for(lambda: rig.in_flight.held() == 7)
    rig.pipeline.errors.clear()
    wait_for(lambda: not rig.in_flight)
    assert max(map(len, rig.pipeline.batches)) == 3
    rig.stop()


def test_suspect_is_processed_alone_after_the_others(rig: Rig) -> None:
    """If it ends the worker, the others are done. Messages of its resource stay in order."""
    rig.put("a1")
    rig.put("b1", attempt=2)
    rig.put("c1", "d1", attempt=SUSPECT_ATTEMPT)
    rig.put("a2", "d2")
    rig.put("e1", attempt=None)
    rig.lane.start()
    wait_for(lambda: not rig.in_flight)
    assert rig.pipeline.batches == [["a1", "b1", "a2", "e1"], ["c1"], ["d1", "d2"]]


def test_suspects_are_returned_if_the_worker_stops_before_their_turn() -> None:
    """Processing them one by one can take longer than the grace period."""
    rig = Rig()
    process = rig.pipeline.process

    def stop_during_processing(messages: Sequence[Message]) -> list[Message]:
        rig.stopping.set()
        return process(messages)

    rig.pipeline.process = stop_during_processing  # type: ignore[method-assign]
    rig.put("a1", "b1", attempt=SUSPECT_ATTEMPT)
    rig.put("c1")
    rig.lane.start()
    rig.lane.join(60)
    assert rig.pipeline.batches == [["c1"]]
    assert rig.returned_unprocessed == ["a1", "b1"]


def test_age_of_the_oldest_message_starts_at_its_publication() -> None:
    """It covers messages that are not settled, so an outage is visible before any message succeeds."""
    in_flight, now = InFlight(10, 1000, 600.0), datetime.now(UTC)
    assert in_flight.oldest_age() == 0
    young, old, ahead = (
        Message(FakeDelivery(b"x", str(age), published_at=now - timedelta(seconds=age)), 0.0) for age in (60, 3600, -60)
    )
    in_flight.add(Message(FakeDelivery(b"x"), 0.0))
    assert in_flight.oldest_age() is None
    in_flight.add(ahead)
    assert in_flight.oldest_age() == 0
    for message in (young, old):
        in_flight.add(message)
    assert in_flight.oldest_age() == pytest.approx(3600, abs=30)
    in_flight.remove([old])
    assert in_flight.oldest_age() == pytest.approx(60, abs=30)


@pytest.mark.parametrize(("first", "second", "max_batch"), [(0.2, 0.05, 100), (0.1, 0.1, 1)])
def test_held_messages_of_a_resource_stay_in_order(first: float, second: float, max_batch: int) -> None:
    """Neither their retry times nor the limits of batches affect the order."""
    rig = Rig(max_batch=max_batch)
    rig.pipeline.errors |= {"a1": Transient("503", retry_after=first), "a2": Transient("503", retry_after=second)}
    rig.put("a1", "a2")
    rig.lane.start()
    wait_for(lambda: rig.pipeline.processed.count("a1") > 3)
    rig.put("a3")
    rig.pipeline.errors.clear()
    wait_for(lambda: not rig.in_flight)
    processed = rig.pipeline.processed
    assert processed[processed.index("a3") - 2 :] == ["a1", "a2", "a3"]
    assert {batch[0] for batch in rig.pipeline.batches[:4]} == {"a1"}
    rig.stop()


def test_lane_sleeps_while_a_later_message_waits_for_an_earlier_one(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lane sleeps until the first message of a resource is due, even if later ones are due before."""
    calls: list[list[Message]] = []
    take_due = rig.lane._take_due

    def counted() -> list[Message]:
        calls.append(take_due())
        return calls[-1]

    monkeypatch.setattr(rig.lane, "_take_due", counted)
    rig.pipeline.errors |= {"a1": Transient("503", retry_after=60), "a2": SOON}
    rig.put("a1", "a2")
    rig.lane.start()
    wait_for(lambda: rig.in_flight.held() == 2)
    time.sleep(0.3)
    assert len(calls) <= 3


def test_error_while_held_messages_are_returned_is_reported(rig: Rig) -> None:
    """The runner returns the messages that are still in flight, and raises the error."""

    class Broken(list[str]):
        def extend(self, _: object) -> None:
            raise OSError("disk full")

    rig.returned_unprocessed = Broken()
    rig.pipeline.errors["a1"] = Transient("503", retry_after=600)
    rig.put("a1")
    rig.lane.start()
    wait_for(rig.in_flight.held)
    rig.stop()
    assert [str(error) for error in rig.failures] == ["disk full"]
