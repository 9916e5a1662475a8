"""The budget of an effect: pulling waits for a fast effect, and does not wait for a slow one."""

from __future__ import annotations

import math

import pytest

from worker.runtime.budget import BATCH_TIMEOUT, FULL_TIMEOUT, MEMORY, Budget

MAX_DELAY = 1800.0


def full_budget(messages: int = 100) -> Budget:
    """Return a budget that was full at time 0."""
    budget = Budget(messages, 10**6, MAX_DELAY)
    for _ in range(messages):
        budget.add(10, 0.0)
    return budget


def test_room_is_limited_by_messages_and_by_bytes() -> None:
    """The message that exceeds the bytes is accepted, because a message can be larger than the limit."""
    budget = Budget(3, 100, MAX_DELAY)
    budget.add(10, 0.0)
    assert budget.room == 2
    budget.add(500, 0.0)
    assert budget.room == 0
    budget.remove(500, 0.0)
    budget.add(10, 0.0)
    budget.add(10, 0.0)
    assert budget.room == 0


def test_effect_is_slow_if_its_budget_stays_full() -> None:
    """Before that, pulling waits for longer than a batch takes, so that no message goes back."""
    budget = full_budget()
    assert not budget.is_slow(BATCH_TIMEOUT - 0.1)
    assert budget.is_slow(BATCH_TIMEOUT)


@pytest.mark.parametrize(
    ("settled", "seconds", "timeout"),
    [
        pytest.param(100, 2.0, BATCH_TIMEOUT, id="short batches"),
        pytest.param(600, 25.0, 50.0, id="long batches"),
        pytest.param(6_000, 300.0, 60.0, id="very long batches"),
        pytest.param(11, 11.0, FULL_TIMEOUT, id="slow"),
    ],
)
def test_pulling_waits_for_batches_as_long_as_the_last_ones(settled: int, seconds: float, timeout: float) -> None:
    """An effect settles nothing while its batches are under way. It is not slow, if it settles many at their end."""
    budget = full_budget(messages=settled)
    for number in range(settled):
        budget.remove(10, seconds)
        if number >= settled // 10:
            budget.add(10, seconds)
    while budget.room:
        budget.add(10, seconds)
    assert not budget.is_slow(seconds + timeout - 0.1)
    assert budget.is_slow(seconds + timeout)


def test_rate_of_long_ago_is_forgotten() -> None:
    """The budget was full again because of a new backlog."""
    budget = full_budget()
    for _ in range(11):
        budget.remove(10, 11.0)
    for _ in range(11):
        budget.add(10, 11.0 + MEMORY + 0.1)
    assert not budget.is_slow(11.0 + MEMORY + FULL_TIMEOUT + 1)


def test_effect_that_settles_many_messages_is_not_slow() -> None:
    """Its budget is full because there is a backlog, and pulling waits until it has room."""
    budget = full_budget()
    for _ in range(300):
        budget.remove(10, 1.0)
        budget.add(10, 1.0)
    assert not budget.is_slow(BATCH_TIMEOUT)
    assert budget.is_slow(BATCH_TIMEOUT * 10)


def test_effect_can_be_slow_at_any_rate() -> None:
    """Carts give way to orders."""
    budget = Budget(100, 10**6, MAX_DELAY, slow=math.inf)
    for _ in range(100):
        budget.add(10, 0.0)
    for _ in range(10_000):
        budget.remove(10, 1.0)
        budget.add(10, 1.0)
    assert not budget.is_slow(FULL_TIMEOUT - 0.1)
    assert budget.is_slow(FULL_TIMEOUT)


def test_single_settled_message_does_not_end_slowness() -> None:
    """With 60 deletions a minute, the budget has room once a second. Pulling must still not wait for it."""
    budget = full_budget()
    budget.remove(10, 1.0)
    assert (budget.room, budget.is_slow(BATCH_TIMEOUT)) == (1, True)
    for _ in range(10):
        budget.remove(10, 2.0)
    assert not budget.is_slow(BATCH_TIMEOUT)


def test_messages_beyond_the_budget_come_back_when_it_is_their_turn() -> None:
    """The delay follows from the rate of the effect and from the messages that were returned before."""
    budget = full_budget()
    now = 9.0  # a message per second
    for _ in range(9):
        budget.remove(10, now)
    assert budget.return_delay(50, now) == pytest.approx(50)
    assert budget.return_delay(50, now) == pytest.approx(100)
    assert budget.return_delay(1, 900.0) == pytest.approx(100)  # the others have come back; the rate is 1/100


@pytest.mark.parametrize(
    ("settled", "now", "delay"),
    [(0, 0.1, 1.0), (0, 5.0, 45.0), (8, 5.0, 45.0), (0, 10_000.0, MAX_DELAY), (9, 0.1, 1.0), (9, 90_000.0, MAX_DELAY)],
)
def test_delay_without_a_known_rate_grows_with_the_time_and_is_limited(settled: int, now: float, delay: float) -> None:
    """After a few seconds without an effect, the messages come back within a minute."""
    budget = full_budget()
    for _ in range(settled):
        budget.remove(10, now)
    assert budget.return_delay(1, now) == delay
