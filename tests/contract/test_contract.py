"""The contract of adapters/base.py, and the further guarantees of each queue: see tests/rigs."""

from __future__ import annotations

import multiprocessing
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from threading import Event
from typing import TYPE_CHECKING, Any

import pytest

from adapters import Delivery, Failure, QueueAdapter, QueueError, SupportsPublish, open_queue
from tests.rigs import MORE
from tests.support.waiting import receive

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from multiprocessing.synchronize import Event as SharedEvent

    from tests.rigs.base import Rig

    Open = Callable[..., QueueAdapter]

FAILURE = Failure("Klaviyo answered 422: the email is malformed", "send", "Rejected")
SOON = 20.0  # seconds, much less than a lease of a minute
HOSTILE = ("é☃ \u202e\\u0000 ]]> &amp; %s {{x}}", "\t\r\n", '{"torn', "null", " " * 1000, "\ufeff{}")
pytestmark = pytest.mark.also_on(*MORE)
with_short_leases = pytest.mark.short_leases


@pytest.fixture
def open_queues(rig: Rig) -> Iterator[Callable[..., QueueAdapter]]:
    """Open the queue any number of times; close all at the end."""
    with ExitStack() as closing:

        def open_one(**options: Any) -> QueueAdapter:
            queue = rig.opener(**options)()
            closing.callback(queue.close)
            return queue

        yield open_one


def bodies(deliveries: Iterable[Delivery]) -> list[bytes]:
    return sorted(delivery.body for delivery in deliveries)


def numbered(count: int) -> list[bytes]:
    return [b"%03d" % number for number in range(count)]


def test_messages_arrive_unchanged_and_are_removed_by_ack(rig: Rig, open_queues: Open) -> None:
    """A delivery has an attempt and a time of publishing. Its `repr`, which can be logged, has no body."""
    sent = [text.encode() for text in HOSTILE]
    rig.publish(sent)
    queue = open_queues()
    got = receive(queue, len(sent))
    assert bodies(got) == sorted(sent)
    assert {delivery.attempt for delivery in got} == {1}
    assert all(d.published_at and abs(time.time() - d.published_at.timestamp()) < 60 for d in got)
    assert len({delivery.id for delivery in got}) == len(sent)
    assert "torn" not in repr(got)
    queue.ack(got)
    assert receive(queue, 1, wait=1) == []
    queue.close()
    assert rig.unsettled() == []
    assert rig.dead_letters() == []


def test_bytes_arrive_unchanged(rig: Rig, open_queues: Open) -> None:
    """A queue of bytes delivers a body that is not text."""
    if not rig.guarantees.any_bytes:
        pytest.skip("this queue accepts text only")
    sent = [b"\xff\xfe\x00 no text", bytes(range(256)), b"\x80" * 1000]
    rig.publish(sent)
    assert bodies(receive(open_queues(), len(sent))) == sorted(sent)


def test_largest_message_arrives(rig: Rig, open_queues: Open) -> None:
    """A message of the maximum size arrives."""
    body = b"x" * (rig.guarantees.max_message_bytes - 1000)
    rig.publish([body])
    (delivery,) = receive(open_queues(max_bytes=rig.guarantees.max_message_bytes * 2), 1)
    assert delivery.body == body


def test_messages_arrive_in_order(rig: Rig, open_queues: Open) -> None:
    """An ordered queue delivers the oldest message first."""
    if not rig.guarantees.in_order:
        pytest.skip("this queue guarantees no order")
    rig.publish(numbered(50))
    assert [delivery.body for delivery in receive(open_queues(), 50)] == numbered(50)


def test_receive_returns_at_most_max_messages(rig: Rig, open_queues: Open) -> None:
    """The worker's flow control relies on this limit."""
    rig.publish(numbered(30))
    queue = open_queues()
    sizes: list[int] = []
    while sum(sizes) < 30:
        sizes.append(len(queue.receive(7, SOON)))
    assert 0 < max(sizes) <= 7


def test_receive_from_empty_queue_returns_in_time(open_queues: Open) -> None:
    """An idle worker notices within `wait` seconds that it must stop."""
    queue = open_queues()
    queue.receive(1, 0)  # connects
    started_at = time.monotonic()
    assert queue.receive(10, 0.5) == []
    assert 0.4 < time.monotonic() - started_at < 4


def test_arriving_message_ends_the_wait(rig: Rig, open_queues: Open) -> None:
    """`receive` returns a message as soon as it arrives."""
    queue = open_queues()
    queue.receive(1, 0)
    with ThreadPoolExecutor(1) as pool:
        received = pool.submit(queue.receive, 1, SOON * 3)
        time.sleep(0.3)
        rig.publish([b"x"])
        started_at = time.monotonic()
        assert bodies(received.result()) == [b"x"]
        assert time.monotonic() - started_at < SOON


def test_nacked_message_is_redelivered_after_its_delay(rig: Rig, open_queues: Open) -> None:
    """A nacked message is redelivered immediately or after its delay, with the next attempt number."""
    rig.publish([b"now", b"later"])
    queue = open_queues()
    first = {delivery.body: delivery for delivery in receive(queue, 2)}
    nacked = time.monotonic()
    queue.nack([first[b"later"]], 3.0, FAILURE)
    queue.nack([first[b"now"]], failure=FAILURE)
    (now,) = receive(queue, 1)
    (later,) = receive(queue, 1)
    assert time.monotonic() - nacked > 2.9
    assert [(delivery.body, delivery.attempt) for delivery in (now, later)] == [(b"now", 2), (b"later", 2)]
    queue.ack([now, later])
    queue.close()
    assert rig.unsettled() == []


def test_nack_without_failure_counts_as_attempt_only_if_unavoidable(rig: Rig, open_queues: Open) -> None:
    """Shutdowns, dry runs and rejected credentials are not the message's fault."""
    rig.publish([b"x"])
    queue = open_queues()
    queue.nack(receive(queue, 1))
    (again,) = receive(queue, 1)
    assert again.attempt == (2 if rig.guarantees.unhandled_counts_as_attempt else 1)


def test_excessive_delay_is_reduced(rig: Rig, open_queues: Open) -> None:
    """The queue reduces a delay to its maximum."""
    rig.publish([b"x"])
    queue = open_queues()
    queue.nack(receive(queue, 1), 10_000_000.0, FAILURE)
    assert receive(queue, 1, wait=1.0) == []


@with_short_leases
def test_messages_of_killed_consumer_are_redelivered(rig: Rig, open_queues: Open) -> None:
    """After the lease has ended, the message is redelivered with the next attempt number."""
    rig.publish([b"x"])
    spawn = multiprocessing.get_context("spawn")
    held = spawn.Event()
    consumer = spawn.Process(target=_hold, args=(rig.environment, rig.opener(), held))
    consumer.start()
    assert held.wait(30)
    consumer.kill()
    consumer.join()
    rig.expire_leases_of_killed()
    (again,) = receive(open_queues(), 1)
    assert (again.body, again.attempt) == (b"x", 2)


def _hold(environment: dict[str, str], opener: Callable[[], QueueAdapter], held: SharedEvent) -> None:
    """Receive a message and keep it, in another process."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        queue = opener()
        assert receive(queue, 1)
        held.set()
        time.sleep(60)


def test_lease_lasts_as_long_as_guaranteed(rig: Rig, open_queues: Open) -> None:
    """`lease_seconds` is known before the first message, or derived from it."""
    rig.publish([b"x"])
    queue = open_queues()
    assert queue.lease_seconds == rig.guarantees.lease_seconds or rig.guarantees.lease_seconds is None
    receive(queue, 1)
    assert queue.lease_seconds is not None
    assert rig.lease_seconds * 0.8 < queue.lease_seconds <= rig.lease_seconds


@with_short_leases
def test_extended_lease_lasts(rig: Rig, open_queues: Open) -> None:
    """`extend` extends the leases of the given deliveries, and of messages that wait in the adapter."""
    rig.publish([b"held"])
    queue, other = open_queues(), open_queues()
    held = receive(queue, 1)
    until = time.monotonic() + 2.5 * rig.lease_seconds
    while time.monotonic() < until:
        assert queue.lease_seconds is not None
        queue.extend(held, queue.lease_seconds)
        assert other.receive(1, queue.lease_seconds / 4) == []
    queue.ack(held)
    queue.close()
    assert rig.unsettled() == []


@with_short_leases
def test_settling_after_lost_lease_has_no_effect(rig: Rig, open_queues: Open) -> None:
    """Settling the old delivery neither fails nor affects the new one."""
    rig.publish([b"x"])
    queue = open_queues()
    held = receive(queue, 1)
    rig.expire_leases(held)
    again = receive(queue, 1)
    assert [(delivery.body, delivery.attempt) for delivery in again] == [(b"x", 2)]
    queue.extend(held, rig.lease_seconds)
    queue.nack(held, 0.0, FAILURE)
    queue.ack(again)
    queue.ack(held)
    assert not queue.backlog()
    queue.close()
    assert rig.unsettled() == []


def test_dead_letter_moves_message_immediately_with_its_reason(rig: Rig, open_queues: Open) -> None:
    """Some queues always do so, others only in direct mode."""
    rig.publish([b"poison", b"good"])
    queue = open_queues(direct_dead_letter=True)
    queue.check()
    by_body = {delivery.body: delivery for delivery in receive(queue, 2)}
    assert queue.dead_letter(by_body[b"poison"], FAILURE)
    queue.ack([by_body[b"good"]])
    (dead_letter,) = rig.dead_letters(1)
    assert dead_letter.body == b"poison"
    details = " ".join(dead_letter.details.values())
    assert [word for word in (FAILURE.reason, FAILURE.stage, FAILURE.error) if word not in details] == []
    queue.close()
    assert rig.unsettled() == []


def test_dead_letter_without_direct_mode_uses_the_policy(rig: Rig, open_queues: Open) -> None:
    """`dead_letter` returns False until the policy moves the message; until then the message is redelivered."""
    rig.publish([b"poison"])
    queue = open_queues()
    queue.check()
    results: list[bool] = []
    while not (results and results[-1]):
        (delivery,) = receive(queue, 1)
        results.append(queue.dead_letter(delivery, FAILURE))
    attempts = 1 if rig.guarantees.dead_letter == "always" else rig.attempts
    assert results == [False] * (attempts - 1) + [True]
    assert receive(queue, 1, wait=1) == []
    assert [dead_letter.body for dead_letter in rig.dead_letters(1)] == [b"poison"]
    queue.close()
    assert rig.unsettled() == []


def test_policy_dead_letters_message_after_max_attempts(rig: Rig, open_queues: Open) -> None:
    """If the queue stores failures, the dead letter has the reason of the last one."""
    rig.publish([b"poison"])
    queue = open_queues()
    queue.check()
    for attempt in range(1, rig.attempts + 1):
        (delivery,) = receive(queue, 1)
        assert delivery.attempt == attempt
        queue.nack([delivery], 0.0, FAILURE)
    assert receive(queue, 1, wait=1) == []
    (dead_letter,) = rig.dead_letters(1)
    assert dead_letter.body == b"poison"
    assert (FAILURE.reason in " ".join(dead_letter.details.values())) is rig.guarantees.keeps_last_reason


def test_stop_nacks_pending_messages_and_settling_continues(rig: Rig, open_queues: Open) -> None:
    """They are redelivered immediately, not when their leases end. `close` is idempotent."""
    rig.publish(numbered(40))
    queue = open_queues(max_messages=30)
    held = receive(queue, 10)
    time.sleep(0.5)  # the adapter prefetches more
    queue.stop()
    queue.ack(held[:5])
    queue.nack(held[5:])
    queue.close()
    queue.close()
    assert bodies(receive(open_queues(), 35)) == sorted(set(numbered(40)) - {delivery.body for delivery in held[:5]})


def test_two_consumers_share_the_messages(rig: Rig, open_queues: Open) -> None:
    """Each message is delivered to one of the consumers."""
    rig.publish(numbered(40))
    one, other = open_queues(max_messages=10), open_queues(max_messages=10)
    got: list[Delivery] = []
    deadline = time.monotonic() + SOON
    while len(got) < 40 and time.monotonic() < deadline:
        for queue in (one, other):
            batch = queue.receive(10, 0.1)
            queue.ack(batch)
            got += batch
    assert bodies(got) == numbered(40)


def test_messages_are_settled_from_many_threads(rig: Rig, open_queues: Open) -> None:
    """The worker's lanes settle concurrently."""
    rig.publish(numbered(200))
    queue = open_queues()
    got = receive(queue, 200)
    while len(set(bodies(got))) < 200:  # an emulator can deliver one twice at the same moment
        got += receive(queue, 1)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(queue.ack, [got[start : start + 10] for start in range(0, len(got), 10)]))
    queue.close()
    assert rig.unsettled() == []


@with_short_leases
def test_concurrent_extension_does_not_undo_ack(rig: Rig, open_queues: Open) -> None:
    """The worker extends all leases on one thread while lanes settle on others."""
    rig.publish(numbered(100))
    queue = open_queues()
    got = receive(queue, 100)
    extended, acked = Event(), Event()

    def extend() -> None:
        while not acked.is_set():
            queue.extend(got, rig.lease_seconds)
            extended.set()

    with ThreadPoolExecutor(1) as pool:
        extension = pool.submit(extend)
        assert extended.wait(60)
        for delivery in got:
            queue.ack([delivery])
        acked.set()
        extension.result()
    again = receive(queue, 1, wait=1.5 * rig.lease_seconds)  # an emulator can deliver another one twice
    assert set(bodies(again)).isdisjoint(bodies(got))


def test_backlog_is_as_exact_as_guaranteed(rig: Rig, open_queues: Open) -> None:
    """It counts ready, delayed and leased messages, or only those that this worker nacked. It is never 0 by mistake."""
    rig.publish(numbered(6))
    queue = open_queues()
    held = receive(queue, 3)
    expected = 6 if rig.guarantees.backlog != "returned" else None
    assert queue.backlog() == expected
    queue.nack(held[:1], 30.0, FAILURE)
    assert queue.backlog() == (expected or 1)
    queue.ack(held[1:])
    assert queue.backlog() in {4, 1}
    assert (queue.backlog() == 4) is (expected is not None)


def test_backlog_of_emptied_queue_is_zero_only_if_exact(rig: Rig, open_queues: Open) -> None:
    """If the backlog is None, `run --once` waits for ten idle seconds."""
    rig.publish([b"x"])
    queue = open_queues()
    queue.ack(receive(queue, 1))
    assert queue.backlog() == (0 if rig.guarantees.backlog == "exact" else None)


def test_check_passes_and_fails_for_missing_queue(rig: Rig, open_queues: Open) -> None:
    """The error names QUEUE_URL."""
    open_queues().check()
    with pytest.raises(QueueError, match="QUEUE_URL"):
        open_queue(rig.missing_url).check()


def test_publish_fills_the_queue(rig: Rig, open_queues: Open) -> None:
    """`klaviyo-worker publish` makes as many calls as the service requires."""
    queue = open_queues()
    assert isinstance(queue, SupportsPublish)
    assert queue.publish(iter(numbered(25))) == 25
    assert bodies(receive(queue, 25)) == numbered(25)
