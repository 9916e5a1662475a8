"""The dead letters of Service Bus with Azure's SDK, on the broker of tests/support."""

from __future__ import annotations

import time
from functools import partial
from threading import Thread
from typing import TYPE_CHECKING

import pytest
from azure.servicebus import ServiceBusReceiver

from adapters import Failure, QueueError, QueueOptions, open_queue
from adapters.servicebus import dead_letters as servicebus_dead_letters
from adapters.servicebus.queue import ServiceBusQueue
from tests.support.servicebus_broker.broker import Broker, Queue
from tests.support.waiting import receive, wait_for
from worker.commands.dlq.dead_letters import iter_dead_letters

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from adapters import DeadLetter
    from adapters.servicebus.dead_letters import ServiceBusDeadLetters

    OpenDeadLetters = Callable[[Queue], ServiceBusDeadLetters]


@pytest.fixture
def open_queues() -> Iterator[Callable[[Queue], ServiceBusQueue]]:
    """Open queues; close them at the end."""
    closing: list[Callable[[], None]] = []

    def open_one(queue: Queue) -> ServiceBusQueue:
        adapter = open_queue(queue.url, QueueOptions(connection_string=queue.broker.connection_string))
        assert isinstance(adapter, ServiceBusQueue)
        closing.append(adapter.close)
        return adapter

    yield open_one
    run_concurrently([partial(close) for close in closing])


@pytest.fixture
def open_dead_letters(open_queues: Callable[[Queue], ServiceBusQueue]) -> Iterator[OpenDeadLetters]:
    """Open dead letters; close them at the end."""
    opened: list[ServiceBusDeadLetters] = []

    def open_one(queue: Queue) -> ServiceBusDeadLetters:
        opened.append(open_queues(queue).dead_letters())
        return opened[-1]

    yield open_one
    run_concurrently([each.close for each in opened])


def run_concurrently(calls: list[Callable[[], None]]) -> None:
    threads = [Thread(target=call) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def make_dead_letters(queue: Queue, *bodies: bytes) -> None:
    """Make dead letters, in this order, without the adapter."""
    queue.publish(*bodies)
    queue.broker("dead_letter_ready", name=queue.address, reason="parse: Rejected", description="no JSON")


def count_dead_letters(queue: Queue) -> tuple[int, int]:
    """Count the dead letters that are ready, and those that are locked."""
    counts = queue.broker("counts", name=f"{queue.address}/$DeadLetterQueue")
    return counts["ready"], counts["locked"]


def bodies(dead_letters: list[DeadLetter]) -> list[bytes]:
    return [dead_letter.delivery.body for dead_letter in dead_letters]


def test_pass_returns_all_dead_letters_without_locks(broker: Broker, open_dead_letters: OpenDeadLetters) -> None:
    """Each is returned once, the oldest first, in as many calls as necessary. Killing the process has no effect."""
    queue = Queue(broker)
    sent = [b"%d" % number for number in range(260)]
    make_dead_letters(queue, *sent)
    dead_letters = open_dead_letters(queue)
    found = dead_letters.receive(3, 0)
    assert bodies(found) == sent[:3]
    while more := dead_letters.receive(500, 0):
        found += more
    assert bodies(found) == sent
    assert found[0].failure == Failure("no JSON", "parse", "Rejected")
    assert {(dead_letter.delivery.attempt, dead_letter.dead_lettered_at) for dead_letter in found} == {(None, None)}
    assert found[0].delivery.published_at is not None
    assert 0 <= time.time() - found[0].delivery.published_at.timestamp() < 300
    assert count_dead_letters(queue) == (260, 0)
    assert {dead_letter.delivery_count or 0 for dead_letter in queue.read(dead=True)} == {0}


def test_later_dead_letter_is_returned(broker: Broker, open_dead_letters: OpenDeadLetters) -> None:
    """After an empty result, `receive` can return dead letters that were added later."""
    queue = Queue(broker)
    dead_letters = open_dead_letters(queue)
    assert dead_letters.receive(10, 0) == []
    make_dead_letters(queue, b"1")
    assert bodies(dead_letters.receive(10, 0)) == [b"1"]
    assert dead_letters.receive(10, 0) == dead_letters.receive(10, 0) == []


def test_dead_letter_has_the_details_of_the_worker(
    broker: Broker, open_dead_letters: OpenDeadLetters, open_queues: Callable[[Queue], ServiceBusQueue]
) -> None:
    """It has the failure, the number of deliveries and the time. Its attributes are only those of the publisher."""
    queue = Queue(broker)
    queue.publish(b"poison", colour="blue")
    adapter = open_queues(queue)
    adapter.nack(receive(adapter, 1))
    (delivery,) = receive(adapter, 1)
    reason = "Klaviyo refused (it) " + "\u00e9" * 5000
    assert adapter.dead_letter(delivery, Failure(reason, "send", "Rejected", "OrderCreated", "order", "o-1"))
    (dead_letter,) = open_dead_letters(queue).receive(10, 0)
    assert len(dead_letter.failure.reason) > 4000
    assert reason.startswith(dead_letter.failure.reason)
    assert (dead_letter.failure.stage, dead_letter.failure.error) == ("send", "Rejected")
    assert dead_letter.delivery.attempt == 2
    assert dead_letter.dead_lettered_at is not None
    assert abs(time.time() - dead_letter.dead_lettered_at.timestamp()) < 60
    assert (dead_letter.delivery.body, dead_letter.delivery.attributes) == (b"poison", {"colour": "blue"})
    assert "poison" not in repr(dead_letter)


def test_dead_letter_of_the_policy_is_marked(
    broker: Broker, open_dead_letters: OpenDeadLetters, open_queues: Callable[[Queue], ServiceBusQueue]
) -> None:
    """It has the number of deliveries. The worker's log has the reasons."""
    queue = Queue(broker, attempts=1)
    queue.publish(b"1")
    adapter = open_queues(queue)
    adapter.nack(receive(adapter, 1))
    queue.wait_for(dead=1)
    (dead_letter,) = open_dead_letters(queue).receive(10, 0)
    reason = "dead-lettered by the queue after 1 deliveries: the worker's log has the reason"
    assert dead_letter.failure == Failure(reason, "queue", "MaxDeliveryCountExceeded")
    assert dead_letter.delivery.attempt == 1


def test_removed_dead_letters_are_gone_and_the_other_released(
    broker: Broker, open_dead_letters: OpenDeadLetters
) -> None:
    """Any dead letter can be removed. `close` releases the locks of those ahead."""
    queue = Queue(broker)
    sent = [b"%d" % number for number in range(150)]
    make_dead_letters(queue, *sent)
    dead_letters = open_dead_letters(queue)
    found = dead_letters.receive(500, 0)
    dead_letters.remove(found[100:])
    assert count_dead_letters(queue) == (0, 100)
    dead_letters.remove(found[50:90])
    assert count_dead_letters(queue) == (0, 60)
    assert dead_letters.receive(500, 0) == []
    dead_letters.close()
    dead_letters.close()
    assert count_dead_letters(queue) == (60, 0)
    assert sorted(bodies(open_dead_letters(queue).receive(500, 0)), key=int) == [*sent[:50], *sent[90:100]]


def test_oldest_dead_letters_are_removed_without_affecting_other(
    broker: Broker, open_dead_letters: OpenDeadLetters
) -> None:
    """Prefetched dead letters are used for the next removal, and released without counting a delivery."""
    queue = Queue(broker)
    make_dead_letters(queue, b"1", b"2", b"3", b"4")
    dead_letters = open_dead_letters(queue)
    for _ in range(2):
        dead_letters.remove(dead_letters.receive(1, 0))
    dead_letters.close()
    wait_for(lambda: count_dead_letters(queue) == (2, 0))
    remaining = queue.read(dead=True)
    assert [(b"".join(dead_letter.body), dead_letter.delivery_count or 0) for dead_letter in remaining] == [
        (b"3", 0),
        (b"4", 0),
    ]


def test_dead_letter_with_expired_lock_can_be_removed(broker: Broker, open_dead_letters: OpenDeadLetters) -> None:
    """It is not returned a second time."""
    queue = Queue(broker)
    make_dead_letters(queue, b"1", b"2", b"3")
    dead_letters = open_dead_letters(queue)
    found = dead_letters.receive(500, 0)
    dead_letters.remove(found[2:])
    broker("expire", name=queue.name)
    dead_letters.remove(found[1:2])
    assert dead_letters.receive(500, 0) == []
    broker("expire", name=queue.name)
    dead_letters.remove(found[:1])
    assert count_dead_letters(queue) == (0, 0)


def test_dead_letter_locked_by_another_process_is_reported(
    broker: Broker, open_dead_letters: OpenDeadLetters, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the other process removes it, the removal succeeds."""
    monkeypatch.setattr(servicebus_dead_letters, "IDLE_TIMEOUT", 0.5)
    queue = Queue(broker)
    make_dead_letters(queue, b"1", b"2", b"3")
    dead_letters, other = open_dead_letters(queue), open_dead_letters(queue)
    found = dead_letters.receive(500, 0)
    other.remove(found[2:])
    assert count_dead_letters(queue) == (0, 2)
    with pytest.raises(QueueError, match="QUEUE_URL: 2 of 3 dead letters still exist: another process"):
        dead_letters.remove(found)
    other.remove(found[1:2])
    other.close()
    dead_letters.remove(found)
    assert count_dead_letters(queue) == (0, 0)


def test_each_subscription_has_its_own_dead_letters(broker: Broker, open_dead_letters: OpenDeadLetters) -> None:
    """A topic has none."""
    first, second = (Queue(broker, topic="orders", name=name) for name in ("first", "second"))
    make_dead_letters(first, b"1")
    dead_letters = open_dead_letters(first)
    dead_letters.remove(dead_letters.receive(500, 0))
    assert count_dead_letters(first) == (0, 0)
    assert open_dead_letters(second).receive(500, 0) == []
    assert second.counts() == (1, 0, 0)


def test_closed_connection_is_reopened(broker: Broker, open_dead_letters: OpenDeadLetters) -> None:
    """Service Bus closes connections that are idle for some minutes."""
    queue = Queue(broker)
    make_dead_letters(queue, b"1", b"2", b"3")
    dead_letters = open_dead_letters(queue)
    found = dead_letters.receive(2, 0)
    dead_letters.remove(found[:1])
    broker("drop")
    broker("expire", name=queue.name)
    found += dead_letters.receive(1, 0)
    assert bodies(found) == [b"1", b"2", b"3"]
    dead_letters.remove(found[1:])
    assert count_dead_letters(queue) == (0, 0)


@pytest.mark.parametrize(
    ("condition", "expected"),
    [
        ("amqp:not-found", "does not exist: create it, or correct the name"),
        ("amqp:unauthorized-access", "not permitted to use .*: grant the role Azure Service Bus Data Receiver on "),
    ],
)
def test_refusal_is_reported_with_what_to_do(
    broker: Broker, open_dead_letters: OpenDeadLetters, condition: str, expected: str
) -> None:
    """It is reported when dead letters are opened, and in later calls."""
    queue = Queue(broker)
    make_dead_letters(queue, b"1")
    dead_letters = open_dead_letters(queue)
    found = dead_letters.receive(1, 0)
    broker("refuse", name=f"{queue.name}/$DeadLetterQueue", condition=condition)
    for call in (
        partial(open_dead_letters, queue),
        partial(dead_letters.receive, 1, 0),
        partial(dead_letters.remove, found),
    ):
        with pytest.raises(QueueError, match=f"^QUEUE_URL: .*{expected}") as caught:
            call()
        assert "\n" not in str(caught.value)
    broker("refuse", name=f"{queue.name}/$DeadLetterQueue", condition="")
    assert count_dead_letters(queue) == (1, 0)


def test_outage_during_removal_is_reported(
    broker: Broker, open_dead_letters: OpenDeadLetters, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is lost."""
    queue = Queue(broker)
    make_dead_letters(queue, b"1")
    dead_letters = open_dead_letters(queue)
    found = dead_letters.receive(1, 0)

    def receive_messages(*_: object) -> None:
        raise ConnectionError("reset")

    monkeypatch.setattr(ServiceBusReceiver, "receive_messages", receive_messages)
    with pytest.raises(QueueError, match=f"^QUEUE_URL: cannot reach {queue.broker.host}/{queue.name}: reset$"):
        dead_letters.remove(found)
    assert count_dead_letters(queue) == (1, 0)


def test_dlq_reads_all_dead_letters(broker: Broker, open_queues: Callable[[Queue], ServiceBusQueue]) -> None:
    """`klaviyo-worker dlq list` does not wait when no dead letters are left."""
    queue = Queue(broker)
    make_dead_letters(queue, *(b"%d" % number for number in range(20)))
    assert bodies(list(iter_dead_letters(open_queues(queue)))) == [b"%d" % number for number in range(20)]
    assert count_dead_letters(queue) == (20, 0)
