"""What adapters/base.py asks of every queue, and what each promises beyond: tests/rigs."""

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

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from multiprocessing.synchronize import Event as SharedEvent

    from tests.rigs.base import Rig

    Open = Callable[..., QueueAdapter]

FAILURE = Failure("Klaviyo answered 422: the email is malformed", "send", "Rejected")
SOON = 20.0  # seconds, long before any lease of a minute ends
HOSTILE = ("é☃ \u202e\\u0000 ]]> &amp; %s {{x}}", "\t\r\n", '{"torn', "null", " " * 1000, "\ufeff{}")
pytestmark = pytest.mark.also_on(*MORE)
with_short_leases = pytest.mark.short_leases


@pytest.fixture
def opened(rig: Rig) -> Iterator[Callable[..., QueueAdapter]]:
    """Open the queue, as often as wanted; all are closed in the end."""
    with ExitStack() as closing:

        def open_(**options: Any) -> QueueAdapter:
            queue = rig.opener(**options)()
            closing.callback(queue.close)
            return queue

        yield open_


def receive(queue: QueueAdapter, number: int, wait: float = SOON) -> list[Delivery]:
    """Receive so many messages, or what came in time."""
    deadline = time.monotonic() + wait
    got: list[Delivery] = []
    while len(got) < number and time.monotonic() < deadline:
        got += queue.receive(number - len(got), 0.2)
    return got


def bodies(deliveries: Iterable[Delivery]) -> list[bytes]:
    return sorted(delivery.body for delivery in deliveries)


def numbered(count: int) -> list[bytes]:
    return [b"%03d" % number for number in range(count)]


def test_messages_arrive_whole_and_are_gone_once_acked(rig: Rig, opened: Open) -> None:
    """With the attempt and the time of publishing; a representation, which a log may hold, shows no body."""
    sent = [text.encode() for text in HOSTILE]
    rig.publish(sent)
    queue = opened()
    got = receive(queue, len(sent))
    assert bodies(got) == sorted(sent)
    assert {delivery.attempt for delivery in got} == {1}
    assert all(d.published_at and abs(time.time() - d.published_at.timestamp()) < 60 for d in got)
    assert len({delivery.id for delivery in got}) == len(sent)
    assert "torn" not in repr(got)
    queue.ack(got)
    assert receive(queue, 1, wait=1) == []
    queue.close()
    assert rig.left() == []
    assert rig.dead_letters() == []


def test_any_bytes_arrive_where_the_queue_takes_any(rig: Rig, opened: Open) -> None:
    """What is no text reaches the worker as it was sent, and ends there."""
    if not rig.guarantees.any_bytes:
        pytest.skip("this queue takes text only")
    sent = [b"\xff\xfe\x00 no text", bytes(range(256)), b"\x80" * 1000]
    rig.publish(sent)
    assert bodies(receive(opened(), len(sent))) == sorted(sent)


def test_the_largest_message_arrives(rig: Rig, opened: Open) -> None:
    """Whole, even where it is larger than all that may be held: flow control stops before the next."""
    body = b"x" * (rig.guarantees.largest - 1000)
    rig.publish([body])
    (delivery,) = receive(opened(max_bytes=rig.guarantees.largest * 2), 1)
    assert delivery.body == body


def test_messages_come_in_order_where_the_queue_keeps_it(rig: Rig, opened: Open) -> None:
    """Oldest first."""
    if not rig.guarantees.in_order:
        pytest.skip("this queue promises no order")
    rig.publish(numbered(50))
    assert [delivery.body for delivery in receive(opened(), 50)] == numbered(50)


def test_no_more_is_received_than_asked_for(rig: Rig, opened: Open) -> None:
    """The worker's flow control counts on it."""
    rig.publish(numbered(30))
    queue = opened()
    sizes: list[int] = []
    while sum(sizes) < 30:
        sizes.append(len(queue.receive(7, SOON)))
    assert 0 < max(sizes) <= 7


def test_an_empty_queue_answers_in_time(opened: Open) -> None:
    """Idle: nothing, after the time it was told to wait, which is how soon the worker notices that it is to stop."""
    queue = opened()
    queue.receive(1, 0)  # connects
    began = time.monotonic()
    assert queue.receive(10, 0.5) == []
    assert 0.4 < time.monotonic() - began < 4


def test_a_message_wakes_who_waits(rig: Rig, opened: Open) -> None:
    """It is not left for the next look."""
    queue = opened()
    queue.receive(1, 0)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(queue.receive, 1, SOON * 3)
        time.sleep(0.3)
        rig.publish([b"x"])
        began = time.monotonic()
        assert bodies(waiting.result()) == [b"x"]
        assert time.monotonic() - began < SOON


def test_a_nacked_message_comes_again_no_sooner_than_asked(rig: Rig, opened: Open) -> None:
    """At once, or after the delay, as another attempt."""
    rig.publish([b"now", b"later"])
    queue = opened()
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
    assert rig.left() == []


def test_a_message_returned_unhandled_spends_an_attempt_only_where_it_must(rig: Rig, opened: Open) -> None:
    """Shutdowns, dry runs and refused credentials are not the message's fault."""
    rig.publish([b"x"])
    queue = opened()
    queue.nack(receive(queue, 1))
    (again,) = receive(queue, 1)
    assert again.attempt == (1 if rig.guarantees.unhandled_is_free else 2)


def test_a_delay_beyond_what_the_queue_can_is_no_error(rig: Rig, opened: Open) -> None:
    """It is a hint."""
    rig.publish([b"x"])
    queue = opened()
    queue.nack(receive(queue, 1), 10_000_000.0, FAILURE)
    assert receive(queue, 1, wait=1.0) == []


@with_short_leases
def test_what_a_killed_consumer_held_comes_again(rig: Rig, opened: Open) -> None:
    """As another attempt, once the lease has ended."""
    rig.publish([b"x"])
    spawn = multiprocessing.get_context("spawn")
    held = spawn.Event()
    consumer = spawn.Process(target=_hold, args=(rig.environment, rig.opener(), held))
    consumer.start()
    assert held.wait(30)
    consumer.kill()
    consumer.join()
    rig.worker_died()
    (again,) = receive(opened(), 1)
    assert (again.body, again.attempt) == (b"x", 2)


def _hold(environment: dict[str, str], opener: Callable[[], QueueAdapter], held: SharedEvent) -> None:
    """Receive a message and do nothing about it, in a process of its own."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        queue = opener()
        assert receive(queue, 1)
        held.set()
        time.sleep(60)


def test_leases_last_as_long_as_promised(rig: Rig, opened: Open) -> None:
    """Known before anything is received, or learnt from what is."""
    rig.publish([b"x"])
    queue = opened()
    assert queue.lease_seconds == rig.guarantees.lease_seconds or rig.guarantees.lease_seconds is None
    receive(queue, 1)
    assert queue.lease_seconds is not None
    assert rig.lease_seconds * 0.8 < queue.lease_seconds <= rig.lease_seconds


@with_short_leases
def test_an_extended_lease_holds(rig: Rig, opened: Open) -> None:
    """Work that takes longer than the lease keeps its messages, those too that wait inside the adapter."""
    rig.publish([b"held"])
    queue, other = opened(), opened()
    held = receive(queue, 1)
    until = time.monotonic() + 2.5 * rig.lease_seconds
    while time.monotonic() < until:
        assert queue.lease_seconds is not None
        queue.extend(held, queue.lease_seconds)
        assert other.receive(1, queue.lease_seconds / 4) == []
    queue.ack(held)
    queue.close()
    assert rig.left() == []


@with_short_leases
def test_a_lost_lease_is_no_error(rig: Rig, opened: Open) -> None:
    """The message comes again, and what is done about the old delivery changes nothing of the new one."""
    rig.publish([b"x"])
    queue = opened()
    held = receive(queue, 1)
    rig.lose(held)
    again = receive(queue, 1)
    assert [(delivery.body, delivery.attempt) for delivery in again] == [(b"x", 2)]
    queue.extend(held, rig.lease_seconds)
    queue.nack(held, 0.0, FAILURE)
    queue.ack(again)
    queue.ack(held)
    assert not queue.backlog()
    queue.close()
    assert rig.left() == []


def test_a_dead_letter_is_there_at_once_with_its_reason(rig: Rig, opened: Open) -> None:
    """Where that has to be asked for, it was."""
    rig.publish([b"poison", b"good"])
    queue = opened(direct_dead_letter=True)
    queue.check()
    by_body = {delivery.body: delivery for delivery in receive(queue, 2)}
    assert queue.dead_letter(by_body[b"poison"], FAILURE)
    queue.ack([by_body[b"good"]])
    (letter,) = rig.dead_letters(1)
    assert letter.body == b"poison"
    told = " ".join(letter.about.values())
    assert [word for word in (FAILURE.reason, FAILURE.stage, FAILURE.error) if word not in told] == []
    queue.close()
    assert rig.left() == []


def test_unasked_the_policy_makes_dead_letters_where_the_queue_has_no_way(rig: Rig, opened: Open) -> None:
    """`dead_letter` tells whether the message is one now; until then it comes again."""
    rig.publish([b"poison"])
    queue = opened()
    queue.check()
    endings: list[bool] = []
    while not (endings and endings[-1]):
        (delivery,) = receive(queue, 1)
        endings.append(queue.dead_letter(delivery, FAILURE))
    tries = 1 if rig.guarantees.dead_letter == "always" else rig.attempts
    assert endings == [False] * (tries - 1) + [True]
    assert receive(queue, 1, wait=1) == []
    assert [letter.body for letter in rig.dead_letters(1)] == [b"poison"]
    queue.close()
    assert rig.left() == []


def test_the_queue_gives_up_on_what_fails_again_and_again(rig: Rig, opened: Open) -> None:
    """After as many deliveries as its policy says; the reason of the last is kept where the queue can keep it."""
    rig.publish([b"poison"])
    queue = opened()
    queue.check()
    for attempt in range(1, rig.attempts + 1):
        (delivery,) = receive(queue, 1)
        assert delivery.attempt == attempt
        queue.nack([delivery], 0.0, FAILURE)
    assert receive(queue, 1, wait=1) == []
    (letter,) = rig.dead_letters(1)
    assert letter.body == b"poison"
    assert (FAILURE.reason in " ".join(letter.about.values())) is rig.guarantees.gave_up


def test_stopping_returns_what_was_not_received_and_settles_the_rest(rig: Rig, opened: Open) -> None:
    """At once, not when the leases end; acks after the stop count; closing twice is no error."""
    rig.publish(numbered(40))
    queue = opened(max_messages=30)
    held = receive(queue, 10)
    time.sleep(0.5)  # more are on their way
    queue.stop()
    queue.ack(held[:5])
    queue.nack(held[5:])
    queue.close()
    queue.close()
    assert bodies(receive(opened(), 35)) == sorted(set(numbered(40)) - {delivery.body for delivery in held[:5]})


def test_two_consumers_share(rig: Rig, opened: Open) -> None:
    """Each message goes to one of them."""
    rig.publish(numbered(40))
    one, other = opened(max_messages=10), opened(max_messages=10)
    got: list[Delivery] = []
    deadline = time.monotonic() + SOON
    while len(got) < 40 and time.monotonic() < deadline:
        for queue in (one, other):
            batch = queue.receive(10, 0.1)
            queue.ack(batch)
            got += batch
    assert bodies(got) == numbered(40)


def test_any_thread_may_settle(rig: Rig, opened: Open) -> None:
    """The worker's lanes do, all at once."""
    rig.publish(numbered(200))
    queue = opened()
    got = receive(queue, 200)
    while len(set(bodies(got))) < 200:  # a stand-in may hand one out twice at the same moment
        got += receive(queue, 1)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(queue.ack, [got[start : start + 10] for start in range(0, len(got), 10)]))
    queue.close()
    assert rig.left() == []


@with_short_leases
def test_an_extension_under_way_undoes_no_ack(rig: Rig, opened: Open) -> None:
    """The worker extends all leases from a thread of its own, whatever the lanes settle meanwhile."""
    rig.publish(numbered(100))
    queue = opened()
    got = receive(queue, 100)
    extended, acked = Event(), Event()

    def extend() -> None:
        while not acked.is_set():
            queue.extend(got, rig.lease_seconds)
            extended.set()

    with ThreadPoolExecutor(1) as pool:
        extending = pool.submit(extend)
        assert extended.wait(SOON)
        for delivery in got:
            queue.ack([delivery])
        acked.set()
        extending.result()
    again = receive(queue, 1, wait=1.5 * rig.lease_seconds)  # a stand-in may have handed another one out twice
    assert set(bodies(again)).isdisjoint(bodies(got))


def test_the_backlog_is_as_exact_as_promised(rig: Rig, opened: Open) -> None:
    """Held, delayed, ready: all of it, or what this worker sent back and expects again. Never 0 by mistake."""
    rig.publish(numbered(6))
    queue = opened()
    held = receive(queue, 3)
    expected = 6 if rig.guarantees.backlog != "sent back" else None
    assert queue.backlog() == expected
    queue.nack(held[:1], 30.0, FAILURE)
    assert queue.backlog() == (expected or 1)
    queue.ack(held[1:])
    assert queue.backlog() in {4, 1}
    assert (queue.backlog() == 4) is (expected is not None)


def test_an_emptied_queue_is_known_to_be_empty_only_where_that_is_exact(rig: Rig, opened: Open) -> None:
    """`run --once` waits ten quiet seconds elsewhere."""
    rig.publish([b"x"])
    queue = opened()
    queue.ack(receive(queue, 1))
    assert queue.backlog() == (0 if rig.guarantees.backlog == "exact" else None)


def test_a_good_queue_checks_well_and_one_that_is_not_there_is_an_error(rig: Rig, opened: Open) -> None:
    """The error names QUEUE_URL."""
    opened().check()
    with pytest.raises(QueueError, match="QUEUE_URL"):
        open_queue(rig.missing_url).check()


def test_the_queue_can_be_published_to(rig: Rig, opened: Open) -> None:
    """`klaviyo-worker publish` fills it, in as many calls as the service wants."""
    queue = opened()
    assert isinstance(queue, SupportsPublish)
    assert queue.publish(iter(numbered(25))) == 25
    assert bodies(receive(queue, 25)) == numbered(25)
