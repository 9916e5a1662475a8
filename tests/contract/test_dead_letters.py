"""What adapters/base.py asks of a queue whose dead letters can be looked through."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest

from adapters import DeadLetter, DeadLetterQueue, Failure, QueueAdapter, SupportsDeadLetters
from tests.contract.test_contract import FAILURE, HOSTILE, SOON, numbered, receive

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from tests.rigs.base import Rig


@pytest.fixture
def queue(rig: Rig) -> Iterator[QueueAdapter]:
    opened = rig.opener(direct_dead_letter=True)()
    if not isinstance(opened, SupportsDeadLetters):
        opened.close()
        pytest.skip("the dead letters of this queue cannot be looked through")
    opened.check()
    yield opened
    opened.close()


@pytest.fixture
def letters(queue: QueueAdapter) -> Iterator[DeadLetterQueue]:
    assert isinstance(queue, SupportsDeadLetters)
    opened = queue.dead_letters()
    yield opened
    opened.close()


def bury(rig: Rig, queue: QueueAdapter, bodies: Sequence[bytes], failure: Failure = FAILURE) -> None:
    """Have messages given up on at once."""
    rig.publish(bodies)
    left = set(bodies)
    while left:  # a stand-in may hand one out twice at the same moment
        for delivery in receive(queue, 1):
            if delivery.body in left:
                assert queue.dead_letter(delivery, failure)
                left.remove(delivery.body)
            else:
                queue.ack([delivery])


def look(letters: DeadLetterQueue, number: int) -> list[DeadLetter]:
    """Receive so many letters, or what came in time."""
    deadline = time.monotonic() + SOON
    found: list[DeadLetter] = []
    while len(found) < number and time.monotonic() < deadline:
        found += letters.receive(number - len(found), 1.0)
    return found


def bodies_of(letters: Sequence[DeadLetter]) -> list[bytes]:
    return sorted(letter.delivery.body for letter in letters)


def test_a_letter_tells_all_that_is_known(rig: Rig, queue: QueueAdapter, letters: DeadLetterQueue) -> None:
    """Its body as it was, why it was given up on, after how many deliveries; a representation shows no body."""
    sent = [text.encode() for text in HOSTILE]
    bury(rig, queue, sent, Failure(FAILURE.reason, FAILURE.stage, FAILURE.error, message_type="OrderCreated"))
    found = look(letters, len(sent))
    assert bodies_of(found) == sorted(sent)
    for letter in found:
        assert (letter.failure.reason, letter.failure.stage) == (FAILURE.reason, FAILURE.stage)
        assert letter.failure.error == FAILURE.error
        assert letter.delivery.attempt == 1
        assert letter.delivery.attributes == {}
        assert letter.dead_lettered_at is not None
        assert abs(time.time() - letter.dead_lettered_at.timestamp()) < 60
    assert "torn" not in repr(found)


def test_what_the_queue_gave_up_on_says_after_how_many_deliveries(
    rig: Rig, queue: QueueAdapter, letters: DeadLetterQueue
) -> None:
    """The last reason too, where it is kept; else where to find it."""
    rig.publish([b"poison"])
    for _ in range(rig.attempts):
        (delivery,) = receive(queue, 1, SOON * 2)
        queue.nack([delivery], 0.0, FAILURE)
    receive(queue, 1, wait=0.5)  # SQS moves a message only when it is asked for once more
    (letter,) = look(letters, 1)
    assert letter.delivery.attempt == rig.attempts
    assert letter.delivery.attributes == {}
    told = FAILURE.reason if rig.guarantees.gave_up else "the worker's log has the reason"
    assert letter.failure.reason.endswith(told)
    assert f"after {rig.attempts} " in letter.failure.reason
    assert letter.delivery.published_at is not None
    assert abs(time.time() - letter.delivery.published_at.timestamp()) < 60


def test_each_of_hundreds_is_handed_out_once_and_all_are_there_for_who_looks_next(
    rig: Rig, queue: QueueAdapter, letters: DeadLetterQueue
) -> None:
    """No more at a time than asked for. Closing gives them back at once, not when their leases end, and so again."""
    assert isinstance(queue, SupportsDeadLetters)
    bury(rig, queue, numbered(300))
    for _ in range(2):
        found: list[DeadLetter] = []
        while len(found) < 300:
            some = letters.receive(at_most := 70 if found else 7, 1.0)
            assert 0 < len(some) <= at_most
            found += some
        assert bodies_of(found) == numbered(300)
        assert letters.receive(500, 1.0) == []
        letters.close()
        letters.close()
        letters = queue.dead_letters()
    letters.close()


def test_a_removed_letter_is_gone_for_good_and_all_others_stay(
    rig: Rig, queue: QueueAdapter, letters: DeadLetterQueue
) -> None:
    """Whoever looks next, and for the service itself. Removing twice is no error."""
    assert isinstance(queue, SupportsDeadLetters)
    bury(rig, queue, numbered(25))
    removed = [letter for letter in look(letters, 25) if letter.delivery.body < b"020"]
    assert len(removed) == 20
    letters.remove(removed)
    letters.remove(removed)
    letters.close()
    again = queue.dead_letters()
    assert bodies_of(look(again, 5)) == numbered(25)[20:]
    assert again.receive(500, 1.0) == []
    again.close()
    assert len(rig.dead_letters()) == 5


def test_an_empty_queue_of_dead_letters_answers_in_time(letters: DeadLetterQueue) -> None:
    """With nothing, and soon: a person waits."""
    began = time.monotonic()
    assert letters.receive(10, 1.0) == []
    assert time.monotonic() - began < SOON
