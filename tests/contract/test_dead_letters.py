"""The contract of adapters/base.py for queues with dead letters."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest

from adapters import DeadLetter, DeadLetterQueue, Failure, QueueAdapter, SupportsDeadLetters
from tests.contract.test_contract import FAILURE, HOSTILE, SOON, numbered
from tests.support.waiting import receive

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from tests.rigs.base import Rig


@pytest.fixture
def queue(rig: Rig) -> Iterator[QueueAdapter]:
    opened = rig.opener(direct_dead_letter=True)()
    if not isinstance(opened, SupportsDeadLetters):
        opened.close()
        pytest.skip("the dead letters of this queue cannot be read")
    opened.check()
    yield opened
    opened.close()


@pytest.fixture
def dead_letters(queue: QueueAdapter) -> Iterator[DeadLetterQueue]:
    assert isinstance(queue, SupportsDeadLetters)
    opened = queue.dead_letters()
    yield opened
    opened.close()


def make_dead_letters(rig: Rig, queue: QueueAdapter, bodies: Sequence[bytes], failure: Failure = FAILURE) -> None:
    """Publish messages and dead-letter them."""
    rig.publish(bodies)
    remaining = set(bodies)
    while remaining:  # an emulator can deliver one twice at the same moment
        for delivery in receive(queue, 1):
            if delivery.body in remaining:
                assert queue.dead_letter(delivery, failure)
                remaining.remove(delivery.body)
            else:
                queue.ack([delivery])


def bodies_of(dead_letters: Sequence[DeadLetter]) -> list[bytes]:
    return sorted(dead_letter.delivery.body for dead_letter in dead_letters)


def test_dead_letter_has_body_failure_attempt_and_time(
    rig: Rig, queue: QueueAdapter, dead_letters: DeadLetterQueue
) -> None:
    """The `repr` of a dead letter omits the body."""
    sent = [text.encode() for text in HOSTILE]
    make_dead_letters(
        rig, queue, sent, Failure(FAILURE.reason, FAILURE.stage, FAILURE.error, message_type="OrderCreated")
    )
    found = receive(dead_letters, len(sent), poll=1.0)
    assert bodies_of(found) == sorted(sent)
    for dead_letter in found:
        assert (dead_letter.failure.reason, dead_letter.failure.stage) == (FAILURE.reason, FAILURE.stage)
        assert dead_letter.failure.error == FAILURE.error
        assert dead_letter.delivery.attempt == 1
        assert dead_letter.delivery.attributes == {}
        assert dead_letter.dead_lettered_at is not None
        assert abs(time.time() - dead_letter.dead_lettered_at.timestamp()) < 60
    assert "torn" not in repr(found)


def test_dead_letter_of_the_policy_has_the_number_of_deliveries(
    rig: Rig, queue: QueueAdapter, dead_letters: DeadLetterQueue
) -> None:
    """If the queue keeps the last reason, the dead letter has it. Otherwise it says that the log has the reason."""
    rig.publish([b"poison"])
    for _ in range(rig.attempts):
        (delivery,) = receive(queue, 1, SOON * 2)
        queue.nack([delivery], 0.0, FAILURE)
    receive(queue, 1, wait=0.5)  # SQS moves a message only at the next receive
    (dead_letter,) = receive(dead_letters, 1, poll=1.0)
    assert dead_letter.delivery.attempt == rig.attempts
    assert dead_letter.delivery.attributes == {}
    reason = FAILURE.reason if rig.guarantees.keeps_last_reason else "the worker's log has the reason"
    assert dead_letter.failure.reason.endswith(reason)
    assert f"after {rig.attempts} " in dead_letter.failure.reason
    assert dead_letter.delivery.published_at is not None
    assert abs(time.time() - dead_letter.delivery.published_at.timestamp()) < 60


def test_pass_returns_each_dead_letter_once_and_close_releases_all(
    rig: Rig, queue: QueueAdapter, dead_letters: DeadLetterQueue
) -> None:
    """`close` releases the dead letters immediately, not when their leases end. It is idempotent."""
    assert isinstance(queue, SupportsDeadLetters)
    make_dead_letters(rig, queue, numbered(300))
    for _ in range(2):
        found: list[DeadLetter] = []
        while len(found) < 300:
            batch = dead_letters.receive(max_messages := 70 if found else 7, 1.0)
            assert 0 < len(batch) <= max_messages
            found += batch
        assert bodies_of(found) == numbered(300)
        assert dead_letters.receive(500, 1.0) == []
        dead_letters.close()
        dead_letters.close()
        dead_letters = queue.dead_letters()
    dead_letters.close()


def test_removed_dead_letter_is_gone_and_the_others_stay(
    rig: Rig, queue: QueueAdapter, dead_letters: DeadLetterQueue
) -> None:
    """The next pass and the service itself do not have it. Removing it twice is not an error."""
    assert isinstance(queue, SupportsDeadLetters)
    make_dead_letters(rig, queue, numbered(25))
    removed = [dead_letter for dead_letter in receive(dead_letters, 25, poll=1.0) if dead_letter.delivery.body < b"020"]
    assert len(removed) == 20
    dead_letters.remove(removed)
    dead_letters.remove(removed)
    dead_letters.close()
    again = queue.dead_letters()
    assert bodies_of(receive(again, 5, poll=1.0)) == numbered(25)[20:]
    assert again.receive(500, 1.0) == []
    again.close()
    assert len(rig.dead_letters()) == 5


def test_receive_without_dead_letters_returns_in_time(dead_letters: DeadLetterQueue) -> None:
    """An operator waits for the result."""
    started_at = time.monotonic()
    assert dead_letters.receive(10, 1.0) == []
    assert time.monotonic() - started_at < SOON
