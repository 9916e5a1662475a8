"""The dead letters of Service Bus, by the SDK, on a broker of ours."""

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
from tests.support.requirements import require
from tests.support.servicebus_broker.broker import Broker, Queue, missing
from worker.commands.dlq.dead_letters import iter_dead_letters

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from adapters import DeadLetter
    from adapters.servicebus.dead_letters import ServiceBusDeadLetters
    from adapters.servicebus.message import ServiceBusDelivery

    Look = Callable[[Queue], ServiceBusDeadLetters]


@pytest.fixture(scope="module")
def broker() -> Iterator[Broker]:
    require(missing())
    running = Broker()
    yield running
    running.kill()


@pytest.fixture
def opened() -> Iterator[Callable[[Queue], ServiceBusQueue]]:
    """Open queues that are closed in the end."""
    closing: list[Callable[[], None]] = []

    def open_(queue: Queue) -> ServiceBusQueue:
        adapter = open_queue(queue.url, QueueOptions(connection_string=queue.broker.connection_string))
        assert isinstance(adapter, ServiceBusQueue)
        closing.append(adapter.close)
        return adapter

    yield open_
    together([partial(close) for close in closing])


@pytest.fixture
def look(opened: Callable[[Queue], ServiceBusQueue]) -> Iterator[Look]:
    """Look at dead letters; what is left open is closed in the end."""
    looks: list[ServiceBusDeadLetters] = []

    def look_(queue: Queue) -> ServiceBusDeadLetters:
        looks.append(opened(queue).dead_letters())
        return looks[-1]

    yield look_
    together([letters.close for letters in looks])


def together(calls: list[Callable[[], None]]) -> None:
    threads = [Thread(target=call) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def bury(queue: Queue, *bodies: bytes) -> None:
    """Make dead letters, in this order, without the adapter."""
    queue.publish(*bodies)
    queue.broker("dead_letter_ready", name=queue.address, reason="parse: Rejected", description="no JSON")


def dead(queue: Queue) -> tuple[int, int]:
    """Count the dead letters that are free, and those that are locked."""
    counts = queue.broker("counts", name=f"{queue.address}/$DeadLetterQueue")
    return counts["ready"], counts["locked"]


def receive(queue: ServiceBusQueue, number: int) -> list[ServiceBusDelivery]:
    """Receive so many messages, or what came in time."""
    deadline = time.monotonic() + 15
    got: list[ServiceBusDelivery] = []
    while len(got) < number and time.monotonic() < deadline:
        got += queue.receive(number - len(got), 0.2)
    return got


def bodies(letters: list[DeadLetter]) -> list[bytes]:
    return [letter.delivery.body for letter in letters]


def test_all_letters_are_shown_once_oldest_first_and_left_as_they_were(broker: Broker, look: Look) -> None:
    """More than Service Bus gives at a time; nothing is locked, so that nothing is held up and a kill costs nothing."""
    queue = Queue(broker)
    sent = [b"%d" % number for number in range(260)]
    bury(queue, *sent)
    letters = look(queue)
    found = letters.receive(3, 0)
    assert bodies(found) == sent[:3]
    while more := letters.receive(500, 0):
        found += more
    assert bodies(found) == sent
    assert found[0].failure == Failure("no JSON", "parse", "Rejected")
    assert {(letter.delivery.attempt, letter.dead_lettered_at) for letter in found} == {(None, None)}
    assert found[0].delivery.published_at is not None
    assert 0 <= time.time() - found[0].delivery.published_at.timestamp() < 300
    assert dead(queue) == (260, 0)
    assert {letter.delivery_count or 0 for letter in queue.read(dead=True)} == {0}


def test_a_letter_that_comes_later_is_shown_too(broker: Broker, look: Look) -> None:
    """Nothing more is said once, and taken back when there is."""
    queue = Queue(broker)
    letters = look(queue)
    assert letters.receive(10, 0) == []
    bury(queue, b"1")
    assert bodies(letters.receive(10, 0)) == [b"1"]
    assert letters.receive(10, 0) == letters.receive(10, 0) == []


def test_a_letter_tells_all_that_the_worker_knew(
    broker: Broker, look: Look, opened: Callable[[Queue], ServiceBusQueue]
) -> None:
    """Why, after how many deliveries, and when; of its attributes those of the publisher."""
    queue = Queue(broker)
    queue.publish(b"poison", colour="blue")
    adapter = opened(queue)
    adapter.nack(receive(adapter, 1))
    (delivery,) = receive(adapter, 1)
    reason = "Klaviyo refused (it) " + "\u00e9" * 5000
    assert adapter.dead_letter(delivery, Failure(reason, "send", "Rejected", "OrderCreated", "order", "o-1"))
    (letter,) = look(queue).receive(10, 0)
    assert len(letter.failure.reason) > 4000
    assert reason.startswith(letter.failure.reason)
    assert (letter.failure.stage, letter.failure.error) == ("send", "Rejected")
    assert letter.delivery.attempt == 2
    assert letter.dead_lettered_at is not None
    assert abs(time.time() - letter.dead_lettered_at.timestamp()) < 60
    assert (letter.delivery.body, letter.delivery.attributes) == (b"poison", {"colour": "blue"})
    assert "poison" not in repr(letter)


def test_what_the_queue_itself_gave_up_on_says_so(
    broker: Broker, look: Look, opened: Callable[[Queue], ServiceBusQueue]
) -> None:
    """After how many deliveries; why it failed each time is in the worker's log alone."""
    queue = Queue(broker, attempts=1)
    queue.publish(b"1")
    adapter = opened(queue)
    adapter.nack(receive(adapter, 1))
    queue.wait_for(dead=1)
    (letter,) = look(queue).receive(10, 0)
    said = "dead-lettered by the queue after 1 deliveries: the worker's log has the reason"
    assert letter.failure == Failure(said, "queue", "MaxDeliveryCountExceeded")
    assert letter.delivery.attempt == 1


def test_what_is_removed_is_gone_and_the_rest_free(broker: Broker, look: Look) -> None:
    """Any of them, in any number: those ahead of them are locked no longer than the look lasts."""
    queue = Queue(broker)
    sent = [b"%d" % number for number in range(150)]
    bury(queue, *sent)
    letters = look(queue)
    found = letters.receive(500, 0)
    letters.remove(found[100:])
    assert dead(queue) == (0, 100)
    letters.remove(found[50:90])
    assert dead(queue) == (0, 60)
    assert letters.receive(500, 0) == []
    letters.close()
    letters.close()
    assert dead(queue) == (60, 0)
    assert sorted(bodies(look(queue).receive(500, 0)), key=int) == [*sent[:50], *sent[90:100]]


def test_the_oldest_are_removed_without_touching_others(broker: Broker, look: Look) -> None:
    """What is on its way beside them is for the next ones, and goes back at no delivery."""
    queue = Queue(broker)
    bury(queue, b"1", b"2", b"3", b"4")
    letters = look(queue)
    for _ in range(2):
        letters.remove(letters.receive(1, 0))
    letters.close()
    deadline = time.monotonic() + 15
    while dead(queue) != (2, 0):
        assert time.monotonic() < deadline, dead(queue)
        time.sleep(0.02)
    left = queue.read(dead=True)
    assert [(b"".join(letter.body), letter.delivery_count or 0) for letter in left] == [(b"3", 0), (b"4", 0)]


def test_locks_that_end_cost_nothing(broker: Broker, look: Look) -> None:
    """A letter comes again then, and is not handed out a second time; it can be removed all the same."""
    queue = Queue(broker)
    bury(queue, b"1", b"2", b"3")
    letters = look(queue)
    found = letters.receive(500, 0)
    letters.remove(found[2:])
    broker("expire", name=queue.name)
    letters.remove(found[1:2])
    assert letters.receive(500, 0) == []
    broker("expire", name=queue.name)
    letters.remove(found[:1])
    assert dead(queue) == (0, 0)


def test_what_somebody_else_has_locked_is_not_removed(
    broker: Broker, look: Look, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That is told; what they removed is what was wanted."""
    monkeypatch.setattr(servicebus_dead_letters, "IDLE_TIMEOUT", 0.5)
    queue = Queue(broker)
    bury(queue, b"1", b"2", b"3")
    letters, others = look(queue), look(queue)
    found = letters.receive(500, 0)
    others.remove(found[2:])
    assert dead(queue) == (0, 2)
    with pytest.raises(QueueError, match="QUEUE_URL: 2 of 3 dead letters still exist: another process"):
        letters.remove(found)
    others.remove(found[1:2])
    others.close()
    letters.remove(found)
    assert dead(queue) == (0, 0)


def test_the_letters_of_a_subscription_are_its_own(broker: Broker, look: Look) -> None:
    """A topic has none."""
    first, second = (Queue(broker, topic="orders", name=name) for name in ("first", "second"))
    bury(first, b"1")
    letters = look(first)
    letters.remove(letters.receive(500, 0))
    assert dead(first) == (0, 0)
    assert look(second).receive(500, 0) == []
    assert second.counts() == (1, 0, 0)


def test_a_connection_that_ended_is_opened_anew(broker: Broker, look: Look) -> None:
    """Service Bus ends those that are idle for some minutes, while an operator thinks."""
    queue = Queue(broker)
    bury(queue, b"1", b"2", b"3")
    letters = look(queue)
    found = letters.receive(2, 0)
    letters.remove(found[:1])
    broker("drop")
    broker("expire", name=queue.name)
    found += letters.receive(1, 0)
    assert bodies(found) == [b"1", b"2", b"3"]
    letters.remove(found[1:])
    assert dead(queue) == (0, 0)


@pytest.mark.parametrize(
    ("condition", "said"),
    [
        ("amqp:not-found", "does not exist: create it, or correct the name"),
        ("amqp:unauthorized-access", "not permitted to use .*: grant the role Azure Service Bus Data Receiver on it"),
    ],
)
def test_a_queue_that_refuses_says_what_to_do(broker: Broker, look: Look, condition: str, said: str) -> None:
    """When the letters are opened, and later on."""
    queue = Queue(broker)
    bury(queue, b"1")
    letters = look(queue)
    found = letters.receive(1, 0)
    broker("refuse", name=f"{queue.name}/$DeadLetterQueue", condition=condition)
    for call in (partial(look, queue), partial(letters.receive, 1, 0), partial(letters.remove, found)):
        with pytest.raises(QueueError, match=f"^QUEUE_URL: .*{said}") as caught:
            call()
        assert "\n" not in str(caught.value)
    broker("refuse", name=f"{queue.name}/$DeadLetterQueue", condition="")
    assert dead(queue) == (1, 0)


def test_letters_that_could_not_be_locked_in_time_say_so(
    broker: Broker, look: Look, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An outage is told as what it is, and nothing is lost."""
    queue = Queue(broker)
    bury(queue, b"1")
    letters = look(queue)
    found = letters.receive(1, 0)

    def receive_messages(*_: object) -> None:
        raise ConnectionError("reset")

    monkeypatch.setattr(ServiceBusReceiver, "receive_messages", receive_messages)
    with pytest.raises(QueueError, match=f"^QUEUE_URL: cannot reach {queue.broker.host}/{queue.name}: reset$"):
        letters.remove(found)
    assert dead(queue) == (1, 0)


def test_the_worker_reads_them_all(broker: Broker, opened: Callable[[Queue], ServiceBusQueue]) -> None:
    """As `klaviyo-worker dlq list` does: nothing is waited for once there are no more."""
    queue = Queue(broker)
    bury(queue, *(b"%d" % number for number in range(20)))
    assert bodies(list(iter_dead_letters(opened(queue)))) == [b"%d" % number for number in range(20)]
    assert dead(queue) == (20, 0)
