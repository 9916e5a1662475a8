"""Dead letters as a queue: what is handed out, when, and what becomes of it."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.dead_letters import REFUSED, bury
from tests.unit.runtime.test_runner import settings_for
from worker.commands.dlq.dead_letters import Choice, each, through
from worker.commands.dlq.replay import Again, Options, Replay, ReplayQueue, Tally, Throttle
from worker.errors import Disposition, Ignored, Rejected
from worker.model import Message, Operation, OperationKind, Outcome
from worker.telemetry.metrics import Metrics

if TYPE_CHECKING:
    from collections.abc import Sequence

    from adapters import DeadLetter
    from adapters.embedded import EmbeddedQueue

SENT = Outcome(Disposition.ACK, "send")
IGNORED = Outcome(Disposition.ACK, "transform", Ignored("nothing to do"))
FAILED = Outcome(Disposition.DEAD_LETTER, "send", Rejected("Klaviyo answered 400"))
AGAIN = Outcome(Disposition.NACK, "send", Rejected("a defect"))


class Clock:
    """A time that passes only while it is waited."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def wait(self, seconds: float) -> None:
        self.now += seconds


def replay_of(queue: EmbeddedQueue, **options: Any) -> tuple[ReplayQueue, Tally]:
    """Return the queue's dead letters to be replayed; all at once, unless told otherwise."""
    tally = Tally(Metrics("embedded"))
    letters = queue.dead_letters()
    options = {"pace": None, "canary": False, "removes": True, "choice": Choice()} | options
    return ReplayQueue(letters, options.pop("choice").of(through(letters)), tally, **options), tally


def settle(tally: Tally, replay: ReplayQueue, outcome: Outcome, deliveries: Sequence[Again]) -> None:
    """Do what the pipeline does when deliveries have ended."""
    operations = [Operation(OperationKind.CREATE_EVENT, "k")] if outcome is not IGNORED else []
    jobs = [Message(delivery, 0.0, outcome=outcome, operations=operations) for delivery in deliveries]
    if outcome.disposition is Disposition.ACK:
        replay.ack(deliveries)
    tally.settled(jobs)


def left(queue: EmbeddedQueue) -> list[str]:
    return [letter.delivery.id for letter in each(queue)]


def test_what_has_its_effect_is_removed_and_nothing_else(queue: EmbeddedQueue) -> None:
    """A letter that fails again, goes back or is not reached stays as it is."""
    made = bury(queue, *(b"%d" % number for number in range(5)))
    replay, _ = replay_of(queue)
    first, second, third, fourth = replay.receive(4, 0)
    replay.ack([first])
    replay.nack([second], 5.0, REFUSED)
    replay.nack([third])
    assert replay.dead_letter(fourth, REFUSED)
    replay.close()
    assert left(queue) == made[1:]


def test_a_replayed_letter_is_no_first_delivery(queue: EmbeddedQueue) -> None:
    """Its events may have been sent before: nothing may take them for new."""
    bury(queue, b"1")
    replay, _ = replay_of(queue)
    (again,) = replay.receive(10, 0)
    assert again.attempt is None
    assert (again.body, again.id, again.attributes) == (b"1", "1", {})
    assert again.published_at is not None


def test_the_replay_ends_with_the_letters(queue: EmbeddedQueue) -> None:
    """And not before: `once` asks how much is left."""
    bury(queue, b"1", b"2", b"3")
    replay, _ = replay_of(queue)
    assert len(replay.receive(2, 0)) == 2
    assert replay.backlog() == 1
    assert len(replay.receive(2, 0)) == 1
    assert replay.backlog() == 0
    assert replay.receive(2, 0) == ()


def test_only_chosen_letters_are_handed_out(queue: EmbeddedQueue) -> None:
    """The others are looked at, and left."""
    made = bury(queue, *(b"%d" % number for number in range(300)))
    wanted = frozenset(made[250:253])
    replay, _ = replay_of(queue, choice=Choice(wanted))
    assert {again.id for again in replay.receive(10, 0)} == wanted == replay.handed_out
    assert replay.backlog() == 0


def test_a_dry_run_removes_nothing(queue: EmbeddedQueue) -> None:
    """Not even what would have had its effect."""
    made = bury(queue, b"1", b"2")
    replay, _ = replay_of(queue, removes=False)
    replay.ack(replay.receive(10, 0))
    assert left(queue) == made


def test_the_canary_goes_alone(queue: EmbeddedQueue) -> None:
    """No other is handed out before it has its effect; then all may go."""
    bury(queue, *(b"%d" % number for number in range(5)))
    replay, tally = replay_of(queue, canary=True)
    canary = replay.receive(10, 0)
    assert len(canary) == 1
    assert replay.receive(10, 0) == ()
    assert replay.backlog() == 1
    settle(tally, replay, SENT, canary)
    assert len(replay.receive(10, 0)) == 4


def test_a_canary_with_nothing_to_do_proves_nothing(queue: EmbeddedQueue) -> None:
    """The next one goes alone too."""
    bury(queue, *(b"%d" % number for number in range(5)))
    replay, tally = replay_of(queue, canary=True)
    settle(tally, replay, IGNORED, replay.receive(10, 0))
    assert not replay.has_stopped
    settle(tally, replay, SENT, replay.receive(1, 0))
    assert len(replay.receive(10, 0)) == 3


@pytest.mark.parametrize("outcome", [FAILED, AGAIN])
def test_a_canary_that_fails_ends_the_replay(outcome: Outcome, queue: EmbeddedQueue) -> None:
    """No other is tried, and it is told which it was and why."""
    made = bury(queue, *(b"%d" % number for number in range(5)))
    replay, tally = replay_of(queue, canary=True)
    settle(tally, replay, outcome, replay.receive(10, 0))
    assert replay.has_stopped
    assert (replay.receive(10, 0), replay.backlog()) == ((), 0)
    assert tally.last_failed
    assert tally.last_failed.delivery.id == made[0]
    assert list(tally.reasons) == [(outcome.stage, outcome.reason)]
    assert left(queue) == made


def test_failures_after_the_canary_stop_nothing(queue: EmbeddedQueue) -> None:
    """They are counted by what is wrong."""
    bury(queue, *(b"%d" % number for number in range(6)))
    replay, tally = replay_of(queue, canary=True)
    settle(tally, replay, SENT, replay.receive(10, 0))
    rest = replay.receive(3, 0)
    settle(tally, replay, FAILED, rest[:2])
    settle(tally, replay, AGAIN, rest[2:])
    assert not replay.has_stopped
    assert len(replay.receive(10, 0)) == 2
    assert dict(tally.reasons) == {("send", "Klaviyo answered 400"): 2, ("send", "a defect"): 1}
    assert (tally.failed, tally.ended) == (3, 4)


def test_without_a_canary_failures_stop_nothing(queue: EmbeddedQueue) -> None:
    """As asked for."""
    bury(queue, *(b"%d" % number for number in range(3)))
    replay, tally = replay_of(queue)
    settle(tally, replay, FAILED, replay.receive(1, 0))
    assert len(replay.receive(10, 0)) == 2


def test_letters_go_no_faster_than_the_rate(queue: EmbeddedQueue) -> None:
    """Evenly: time that passed without letters is not made up for."""
    bury(queue, *(b"%d" % number for number in range(8)))
    clock = Clock()
    replay, _ = replay_of(queue, pace=Throttle(4.0, clock.wait, clock))
    at = []
    for number in range(8):
        clock.now += 3.0 if number == 4 else 0.0
        assert len(replay.receive(10, 0)) == 1
        at.append(clock.now)
    assert [after - before for before, after in pairwise(at)] == [0.25, 0.25, 0.25, 3.0, 0.25, 0.25, 0.25]
    assert not replay.receive(10, 0)
    assert clock.now == at[-1]


class Endless:
    """Dead letters that nobody asked for, without end; the replay is told to stop after some."""

    def __init__(self, *letters: DeadLetter) -> None:
        self._letters = letters
        self.looks = 0
        self.replay: Replay | None = None

    def dead_letters(self) -> Endless:
        return self

    def receive(self, max_messages: int, wait: float) -> Sequence[DeadLetter]:
        self.looks += 1
        if self.looks == 3 and self.replay:
            self.replay.stop()
        return self._letters

    def remove(self, letters: Sequence[DeadLetter]) -> None:
        raise AssertionError

    def close(self) -> None:
        """Do nothing."""


def test_a_replay_that_only_looks_can_be_stopped(queue: EmbeddedQueue) -> None:
    """Among fifty thousand others, what was asked for may be long in coming."""
    bury(queue, b"1")
    endless = Endless(*each(queue))
    chosen = Choice(message_type="OrderCreated")
    endless.replay = Replay(endless, settings_for(), chosen, Options())
    endless.replay.run()
    assert endless.looks == 3
    assert endless.replay.tally.ended == 0


def test_the_replay_has_nothing_of_a_queue_that_leases(queue: EmbeddedQueue) -> None:
    """The dead letters keep their leases themselves."""
    replay, _ = replay_of(queue)
    replay.extend([], 5.0)
    replay.stop()
    assert (replay.lease_seconds, replay.check()) == (None, ())
