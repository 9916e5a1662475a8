"""Dead letters as a queue: the order of deliveries and the effect of settling them."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.dead_letters import REFUSED, make_dead_letters
from tests.unit.runtime.test_runner import settings_for
from worker.commands.dlq.dead_letters import DeadLetterFilter, iter_dead_letters, iter_unseen
from worker.commands.dlq.replay import (
    Replay,
    ReplayDelivery,
    ReplayOptions,
    ReplayQueue,
    ReplayRateLimiter,
    ReplayStats,
)
from worker.errors import Disposition, Ignored, Rejected
from worker.model import Ended, Ending, Message, Operation, OperationKind, Outcome
from worker.telemetry.message_log import Telemetry
from worker.telemetry.metrics import Metrics

if TYPE_CHECKING:
    from collections.abc import Sequence

    from adapters import DeadLetter
    from adapters.embedded.queue import EmbeddedQueue

SENT = Outcome(Disposition.ACK, "send")
IGNORED = Outcome(Disposition.ACK, "transform", Ignored("no effect"))
REJECTED = Outcome(Disposition.DEAD_LETTER, "send", Rejected("Klaviyo answered 400"))
RETRIED = Outcome(Disposition.NACK, "send", Rejected("a defect"))
ENDINGS = {
    SENT: Ending.SENT,
    IGNORED: Ending.IGNORED,
    REJECTED: Ending.DEAD_LETTERED,
    RETRIED: Ending.RETRIED,
}


class FakeClock:
    """A clock that advances only during waits."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def wait(self, seconds: float) -> None:
        self.now += seconds


def start_replay(queue: EmbeddedQueue, **options: Any) -> tuple[ReplayQueue, ReplayStats]:
    """Return a replay of the queue's dead letters. By default it replays all, without a rate limit and a canary."""
    stats = ReplayStats(Telemetry(Metrics("embedded")))
    dead_letters = queue.dead_letters()
    options = {"rate_limiter": None, "canary": False, "remove_on_ack": True, "filters": DeadLetterFilter()} | options
    selected = options.pop("filters").select(iter_unseen(dead_letters))
    return ReplayQueue(dead_letters, selected, stats, **options), stats


def settle(stats: ReplayStats, replay: ReplayQueue, outcome: Outcome, deliveries: Sequence[ReplayDelivery]) -> None:
    """Settle deliveries as the pipeline does."""
    operations = [Operation(OperationKind.CREATE_EVENT, "k")] if outcome is not IGNORED else []
    messages = [Message(delivery, 0.0, outcome=outcome, operations=operations) for delivery in deliveries]
    if outcome.disposition is Disposition.ACK:
        replay.ack(deliveries)
    stats.on_endings([Ended(message, ENDINGS[outcome]) for message in messages])


def remaining_ids(queue: EmbeddedQueue) -> list[str]:
    return [dead_letter.delivery.id for dead_letter in iter_dead_letters(queue)]


def test_ack_removes_a_dead_letter_and_other_outcomes_leave_it(queue: EmbeddedQueue) -> None:
    """A dead letter stays if it fails again, is nacked, or is not reached."""
    ids = make_dead_letters(queue, *(b"%d" % number for number in range(5)))
    replay, _ = start_replay(queue)
    first, second, third, fourth = replay.receive(4, 0)
    replay.ack([first])
    replay.nack([second], 5.0, REFUSED)
    replay.nack([third])
    assert replay.dead_letter(fourth, REFUSED)
    replay.close()
    assert remaining_ids(queue) == ids[1:]


def test_replay_delivery_has_no_attempt(queue: EmbeddedQueue) -> None:
    """Its events have possibly been sent before, so none is treated as new."""
    make_dead_letters(queue, b"1")
    replay, _ = start_replay(queue)
    (delivery,) = replay.receive(10, 0)
    assert delivery.attempt is None
    assert (delivery.body, delivery.id, delivery.attributes) == (b"1", "1", {})
    assert delivery.published_at is not None


def test_backlog_is_zero_after_the_last_dead_letter(queue: EmbeddedQueue) -> None:
    """`once` ends the run when the backlog is zero."""
    make_dead_letters(queue, b"1", b"2", b"3")
    replay, _ = start_replay(queue)
    assert len(replay.receive(2, 0)) == 2
    assert replay.backlog() == 1
    assert len(replay.receive(2, 0)) == 1
    assert replay.backlog() == 0
    assert replay.receive(2, 0) == ()


def test_only_selected_dead_letters_are_delivered(queue: EmbeddedQueue) -> None:
    """The others are read and left unchanged."""
    ids = make_dead_letters(queue, *(b"%d" % number for number in range(300)))
    wanted = frozenset(ids[250:253])
    replay, _ = start_replay(queue, filters=DeadLetterFilter(wanted))
    assert {delivery.id for delivery in replay.receive(10, 0)} == wanted == replay.delivered_ids
    assert replay.backlog() == 0


def test_dry_run_removes_nothing(queue: EmbeddedQueue) -> None:
    """An ack in a dry run leaves the dead letter."""
    ids = make_dead_letters(queue, b"1", b"2")
    replay, _ = start_replay(queue, remove_on_ack=False)
    replay.ack(replay.receive(10, 0))
    assert remaining_ids(queue) == ids


def test_canary_is_delivered_alone(queue: EmbeddedQueue) -> None:
    """No other dead letter is delivered until the canary is sent. Then all can be delivered."""
    make_dead_letters(queue, *(b"%d" % number for number in range(5)))
    replay, stats = start_replay(queue, canary=True)
    canary = replay.receive(10, 0)
    assert len(canary) == 1
    assert replay.receive(10, 0) == ()
    assert replay.backlog() == 1
    settle(stats, replay, SENT, canary)
    assert len(replay.receive(10, 0)) == 4


def test_ignored_canary_is_followed_by_another(queue: EmbeddedQueue) -> None:
    """An ignored dead letter sends nothing, so it does not show whether others can be sent."""
    make_dead_letters(queue, *(b"%d" % number for number in range(5)))
    replay, stats = start_replay(queue, canary=True)
    settle(stats, replay, IGNORED, replay.receive(10, 0))
    assert not replay.canary_failed
    settle(stats, replay, SENT, replay.receive(1, 0))
    assert len(replay.receive(10, 0)) == 3


@pytest.mark.parametrize("outcome", [REJECTED, RETRIED])
def test_failed_canary_ends_the_replay(outcome: Outcome, queue: EmbeddedQueue) -> None:
    """No other dead letter is processed. The stats contain the canary and its reason."""
    ids = make_dead_letters(queue, *(b"%d" % number for number in range(5)))
    replay, stats = start_replay(queue, canary=True)
    settle(stats, replay, outcome, replay.receive(10, 0))
    assert replay.canary_failed
    assert (replay.receive(10, 0), replay.backlog()) == ((), 0)
    assert stats.last_failed
    assert stats.last_failed.delivery.id == ids[0]
    assert list(stats.reasons) == [(outcome.stage, outcome.reason)]
    assert remaining_ids(queue) == ids


def test_failures_after_the_canary_do_not_stop_the_replay(queue: EmbeddedQueue) -> None:
    """They are counted by stage and reason."""
    make_dead_letters(queue, *(b"%d" % number for number in range(6)))
    replay, stats = start_replay(queue, canary=True)
    settle(stats, replay, SENT, replay.receive(10, 0))
    rest = replay.receive(3, 0)
    settle(stats, replay, REJECTED, rest[:2])
    settle(stats, replay, RETRIED, rest[2:])
    assert not replay.canary_failed
    assert len(replay.receive(10, 0)) == 2
    assert dict(stats.reasons) == {("send", "Klaviyo answered 400"): 2, ("send", "a defect"): 1}
    assert (stats.failed, stats.count()) == (3, 4)


def test_failures_without_a_canary_do_not_stop_the_replay(queue: EmbeddedQueue) -> None:
    """All dead letters are processed."""
    make_dead_letters(queue, *(b"%d" % number for number in range(3)))
    replay, stats = start_replay(queue)
    settle(stats, replay, REJECTED, replay.receive(1, 0))
    assert len(replay.receive(10, 0)) == 2


def test_rate_limits_deliveries_evenly(queue: EmbeddedQueue) -> None:
    """Idle time is not caught up."""
    make_dead_letters(queue, *(b"%d" % number for number in range(8)))
    clock = FakeClock()
    replay, _ = start_replay(queue, rate_limiter=ReplayRateLimiter(4.0, clock.wait, clock))
    at = []
    for number in range(8):
        clock.now += 3.0 if number == 4 else 0.0
        assert len(replay.receive(10, 0)) == 1
        at.append(clock.now)
    assert [after - before for before, after in pairwise(at)] == [0.25, 0.25, 0.25, 3.0, 0.25, 0.25, 0.25]
    assert not replay.receive(10, 0)
    assert clock.now == at[-1]


class EndlessDeadLetters:
    """Returns the same dead letters at each `receive`. The third `receive` stops the replay."""

    def __init__(self, *dead_letters: DeadLetter) -> None:
        self._dead_letters = dead_letters
        self.requests = 0
        self.replay: Replay | None = None

    def dead_letters(self) -> EndlessDeadLetters:
        return self

    def receive(self, max_messages: int, wait: float) -> Sequence[DeadLetter]:
        self.requests += 1
        if self.requests == 3 and self.replay:
            self.replay.stop()
        return self._dead_letters

    def remove(self, dead_letters: Sequence[DeadLetter]) -> None:
        raise AssertionError

    def close(self) -> None:
        """Do nothing."""


def test_stop_ends_a_replay_that_finds_no_match(queue: EmbeddedQueue) -> None:
    """Reading fifty thousand other dead letters can take long."""
    make_dead_letters(queue, b"1")
    endless = EndlessDeadLetters(*iter_dead_letters(queue))
    filters = DeadLetterFilter(message_type="OrderCreated")
    endless.replay = Replay(endless, settings_for(), filters, ReplayOptions())
    endless.replay.run()
    assert endless.requests == 3
    assert endless.replay.stats.count() == 0


def test_replay_queue_has_no_lease(queue: EmbeddedQueue) -> None:
    """The dead-letter queue extends its own leases."""
    replay, _ = start_replay(queue)
    replay.extend([], 5.0)
    replay.stop()
    assert (replay.lease_seconds, replay.check()) == (None, ())
