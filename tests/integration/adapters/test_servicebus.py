"""The Service Bus adapter and the SDK, on a broker of ours."""

from __future__ import annotations

import json
import threading
import time
from threading import Thread
from typing import TYPE_CHECKING, Any

import pytest
from azure.servicebus.amqp import AmqpAnnotatedMessage

from adapters import QueueError, QueueOptions, QueueRefusedError, open_queue
from adapters.servicebus import connections as servicebus_links
from adapters.servicebus import receiver as servicebus_receiver
from adapters.servicebus.queue import ServiceBusQueue
from adapters.shared import reconnect
from tests.integration.conftest import FAILURE
from tests.support.requirements import require
from tests.support.servicebus_broker.broker import Broker, Queue, bodies, missing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from adapters.servicebus.message import ServiceBusDelivery

    Open = Callable[..., ServiceBusQueue]


@pytest.fixture(scope="module")
def broker() -> Iterator[Broker]:
    require(missing())
    running = Broker()
    yield running
    running.kill()


@pytest.fixture
def own_broker() -> Iterator[Broker]:
    """A broker that a test may take down."""
    require(missing())
    running = Broker()
    yield running
    running.kill()


@pytest.fixture
def opened() -> Iterator[Open]:
    """Open queues that are closed in the end."""
    queues: list[ServiceBusQueue] = []

    def open_(queue: Queue, url: str = "", **options: Any) -> ServiceBusQueue:
        options.setdefault("connection_string", queue.broker.connection_string)
        adapter = open_queue(url or queue.url, QueueOptions(**options))
        assert isinstance(adapter, ServiceBusQueue)
        queues.append(adapter)
        return adapter

    yield open_
    closing = [Thread(target=queue.close) for queue in queues]
    for thread in closing:
        thread.start()
    for thread in closing:
        thread.join()


def receive(queue: ServiceBusQueue, number: int, wait: float = 15.0) -> list[ServiceBusDelivery]:
    """Receive so many messages, or what came in time."""
    deadline = time.monotonic() + wait
    got: list[ServiceBusDelivery] = []
    while len(got) < number and time.monotonic() < deadline:
        got += queue.receive(number - len(got), 0.2)
    return got


def test_messages_come_in_batches_and_are_gone_once_acked(broker: Broker, opened: Open) -> None:
    """Any bytes, attributes, the attempt, and the time of publishing arrive; a name may hold a slash."""
    queue = Queue(broker, name="orders/eu")
    sent = [b"\xff\x00 no text", "é".encode(), b"", b"x" * 900_000, *(b"%d" % number for number in range(200))]
    queue.publish(*sent[:3], colour="blue", size=3)
    queue.publish(sent[3])
    queue.publish(*sent[4:])
    adapter = opened(queue)
    assert adapter.check() == []
    got = receive(adapter, len(sent))
    assert sorted(delivery.body for delivery in got) == sorted(sent)
    by_body = {delivery.body: delivery for delivery in got}
    assert by_body[sent[0]].attributes == {"colour": "blue", "size": "3"}
    assert {delivery.attempt for delivery in got} == {1}
    assert 0 <= time.time() - (got[0].published_at.timestamp() if got[0].published_at else 0) < 60
    assert "no text" not in repr(got)
    assert 25 < adapter.lease_seconds <= 30
    adapter.ack(got)
    assert queue.counts() == (0, 0, 0)


def test_bodies_of_all_kinds_are_read(broker: Broker, opened: Open) -> None:
    """AMQP has many ways to say the same, and the publisher chooses."""
    queue = Queue(broker)
    queue.publish(
        AmqpAnnotatedMessage(data_body=[b'{"a":', b" 1}"]),
        AmqpAnnotatedMessage(value_body="é"),
        AmqpAnnotatedMessage(value_body=b"\xff"),
        AmqpAnnotatedMessage(value_body={"a": [1, None, True, "b"]}),
        AmqpAnnotatedMessage(sequence_body=[[1, 2], ["x"]]),
    )
    adapter = opened(queue)
    got = [delivery.body for delivery in receive(adapter, 5)]
    assert got[:3] == [b'{"a": 1}', "é".encode(), b"\xff"]
    assert [json.loads(body) for body in got[3:]] == [{"a": [1, None, True, "b"]}, [1, 2, "x"]]


def test_no_more_is_held_than_was_asked_for(broker: Broker, opened: Open) -> None:
    """What is on its way when nobody has room goes back, and that costs no attempt."""
    queue = Queue(broker)
    queue.publish(*(b"%d" % number for number in range(80)))
    adapter, other = opened(queue), opened(queue)
    held = receive(adapter, 10)
    got = receive(other, 70)
    assert {delivery.attempt for delivery in (*held, *got)} == {1}
    assert len({delivery.body for delivery in (*held, *got)}) == 80


def test_no_more_bytes_wait_than_one_call_brings_beyond_the_limit(broker: Broker, opened: Open) -> None:
    """Nobody takes them: what there is no room for goes back."""
    queue = Queue(broker)
    queue.publish(*[b"x" * 10_000] * 60)
    adapter = opened(queue, max_bytes=25_000)
    adapter.receive(60, 0)
    deadline = time.monotonic() + 15
    while (counts := queue.counts())[0] < 40 or counts[1] == 0:
        assert time.monotonic() < deadline, counts
        time.sleep(0.05)


def test_the_sdk_reads_on_no_thread_of_its_own(broker: Broker, opened: Open) -> None:
    """Two threads at once make it mix up messages and lock tokens: one's ack removes another."""
    queue = Queue(broker)
    adapter = opened(queue)
    deadline = time.monotonic() + 15
    while adapter._receiver._receiver is None and time.monotonic() < deadline:
        adapter.receive(1, 0.2)
    receiver: Any = adapter._receiver._receiver
    assert receiver._handler._keep_alive_thread is None


def test_nacked_messages_come_again_no_sooner_than_asked(broker: Broker, opened: Open) -> None:
    """At once, or after the delay and longer than a lock lasts; attempts counted; known to be under way."""
    queue = Queue(broker, lock=2.0)
    queue.publish(b"now", b"later")
    adapter = opened(queue)
    first = {delivery.body: delivery for delivery in receive(adapter, 2)}
    assert adapter.backlog() is None
    nacked = time.monotonic()
    adapter.nack([first[b"later"]], 2.5, FAILURE)
    adapter.nack([first[b"now"]])
    assert adapter.backlog() == 2
    got: list[ServiceBusDelivery] = []
    while len(got) < 2 and time.monotonic() - nacked < 15:
        got += adapter.receive(1, 0.2)
        adapter.extend(got, 2.0)
    assert time.monotonic() - nacked > 2.5
    assert [(delivery.body, delivery.attempt) for delivery in got] == [(b"now", 2), (b"later", 2)]
    assert adapter.backlog() is None


def test_no_more_is_parked_than_may_be_held(broker: Broker, opened: Open) -> None:
    """Beyond that, what is due first goes back at once."""
    queue = Queue(broker)
    queue.publish(b"1", b"2", b"3")
    adapter = opened(queue, max_messages=2)
    for delivery, delay in zip(receive(adapter, 3), (60.0, 50.0, 70.0), strict=True):
        adapter.nack([delivery], delay)
    assert [delivery.body for delivery in receive(adapter, 1)] == [b"2"]
    assert queue.counts() == (0, 3, 0)


def test_dead_letters_carry_their_reason(broker: Broker, opened: Open) -> None:
    """Cut to what Service Bus takes; the message's own properties are kept."""
    queue = Queue(broker)
    queue.publish(b"poison", colour="blue")
    adapter = opened(queue)
    (delivery,) = receive(adapter, 1)
    failure = FAILURE.__class__("Klaviyo refused the record: " + "é" * 5000, "send", "Rejected", "OrderCreated")
    assert adapter.dead_letter(delivery, failure)
    (letter,) = queue.dead_letters(1)
    assert bodies([letter]) == [b"poison"]
    assert letter.dead_letter_reason == "send: Rejected"
    assert letter.dead_letter_error_description is not None
    assert letter.dead_letter_error_description.startswith("Klaviyo refused the record: é")
    assert len(letter.dead_letter_error_description) == 4096
    assert (letter.application_properties or {})[b"colour"] == b"blue"
    assert queue.counts() == (0, 0, 0)


def test_a_dead_letter_says_what_message_it_is(broker: Broker, opened: Open) -> None:
    """For who looks at the queue and not at our log."""
    queue = Queue(broker)
    queue.publish(b"poison")
    adapter = opened(queue)
    failure = FAILURE.__class__("Refused", "send", "Rejected", "OrderCreated", "order", "o-1")
    (delivery,) = receive(adapter, 1)
    assert adapter.dead_letter(delivery, failure)
    (letter,) = queue.dead_letters(1)
    description = letter.dead_letter_error_description or ""
    assert description.startswith("Refused (message_type OrderCreated, order o-1, attempt 1, 20")


def test_a_lock_that_ended_brings_the_message_again(
    broker: Broker, opened: Open, caplog: pytest.LogCaptureFixture
) -> None:
    """To settle it is no error, and does not touch the next delivery."""
    queue = Queue(broker)
    queue.publish(b"1", b"2", b"3")
    adapter = opened(queue)
    stale = receive(adapter, 3)
    broker("expire", name=queue.name)
    again = receive(adapter, 3)
    assert {delivery.attempt for delivery in again} == {2}
    adapter.ack(stale[:1])
    adapter.nack(stale[1:2])
    assert not adapter.dead_letter(stale[2], FAILURE)
    adapter.extend(stale, 30.0)
    assert queue.counts() == (0, 3, 0)
    lost = [record for record in caplog.records if record.message == "lease_lost"]
    assert [(record.action, record.messages) for record in lost] == [  # type: ignore[attr-defined]
        ("ack", 1),
        ("nack", 1),
        ("dead_letter", 1),
        ("extend", 3),
    ]
    adapter.ack(again)
    assert queue.counts() == (0, 0, 0)


def test_a_message_that_is_done_is_awaited_no_more(broker: Broker, opened: Open) -> None:
    """Even if it was sent back too, by who had it before and noticed late that its lock had ended."""
    queue = Queue(broker)
    queue.publish(b"1")
    adapter = opened(queue)
    stale = receive(adapter, 1)
    broker("expire", name=queue.name)
    again = receive(adapter, 1)
    adapter.nack(stale)
    assert adapter.backlog() == 1
    adapter.ack(again)
    assert adapter.backlog() is None


def test_leases_last_as_long_as_they_are_extended(broker: Broker, opened: Open) -> None:
    """Of what is held, of what waits to be received, and of what waits to go back."""
    queue = Queue(broker, lock=3.0)
    queue.publish(*(b"%d" % number for number in range(30)))
    adapter = opened(queue)
    held = receive(adapter, 1)
    adapter.nack(held, 60.0)
    held = receive(adapter, 10)
    adapter.receive(19, 0)  # more are on their way, and nobody takes them
    for _ in range(12):
        time.sleep(0.4)
        adapter.extend(held, adapter.lease_seconds)
    rest = receive(adapter, 29 - len(held), wait=5.0)
    assert {delivery.attempt for delivery in rest} <= {1}
    assert queue.counts() == (0, 30, 0)


@pytest.mark.parametrize("ahead", [600.0, 100.0, -600.0, -20.0])
def test_a_clock_that_is_wrong_loses_nothing(
    broker: Broker, opened: Open, ahead: float, caplog: pytest.LogCaptureFixture
) -> None:
    """The lease is never taken for longer than it is, and what is done is settled: Service Bus says what is locked."""
    queue = Queue(broker, lock=30.0)
    broker("clock", name=queue.name, ahead=ahead)
    queue.publish(b"1", b"2", b"3")
    adapter = opened(queue)
    held = receive(adapter, 3)
    assert 0 < adapter.lease_seconds < 32
    adapter.extend(held, adapter.lease_seconds)
    assert 0 < adapter.lease_seconds < 32
    adapter.ack(held[:1])
    adapter.nack(held[1:2])
    assert adapter.dead_letter(held[2], FAILURE)
    ready, locked, dead = queue.counts()
    assert (ready + locked, dead) == (1, 1)
    assert {record.message for record in caplog.records} <= {"clock_skew"}


def test_what_is_settled_while_it_is_extended_is_not_lost(
    broker: Broker, opened: Open, caplog: pytest.LogCaptureFixture
) -> None:
    """The keeper of leases works beside the lanes; nobody is to be alarmed."""
    queue = Queue(broker)
    queue.publish(*(b"%d" % number for number in range(300)))
    adapter = opened(queue)
    held = receive(adapter, 300)
    acking = Thread(target=adapter.ack, args=(held,))
    acking.start()
    while acking.is_alive():
        adapter.extend(held, 30.0)
    acking.join()
    assert queue.counts() == (0, 0, 0)
    assert [(record.message, vars(record).get("action")) for record in caplog.records] == []


def test_a_busy_service_is_asked_again(broker: Broker, opened: Open) -> None:
    """Throttled for a moment: acks and nacks insist."""
    queue = Queue(broker)
    queue.publish(b"1", b"2")
    adapter = opened(queue)
    done, failed = receive(adapter, 2)
    broker("busy", name=queue.name, requests=2)
    adapter.ack([done])
    broker("busy", name=queue.name, requests=2)
    adapter.nack([failed])
    assert [delivery.body for delivery in receive(adapter, 1)] == [failed.body]
    assert queue.counts() == (0, 1, 0)


def test_a_connection_that_the_service_ended_costs_nothing(broker: Broker, opened: Open) -> None:
    """Idle ones end after some minutes: what is tried but once has another try on a new one."""
    queue = Queue(broker)
    queue.publish(b"1")
    adapter = opened(queue)
    held = receive(adapter, 1)
    adapter.extend(held, 30.0)
    broker("drop")
    adapter.extend(held, 30.0)
    adapter.ack(held)
    assert queue.counts() == (0, 0, 0)


def test_a_receiver_that_hears_nothing_is_opened_anew(
    broker: Broker, opened: Open, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It may hang, and the service ends what is idle for long."""
    monkeypatch.setattr(servicebus_receiver, "IDLE_TIMEOUT", 0.1)
    queue = Queue(broker)
    adapter = opened(queue)
    deadline = time.monotonic() + 15
    with caplog.at_level("INFO"):
        while "receiver_restarted" not in [record.message for record in caplog.records] and time.monotonic() < deadline:
            adapter.receive(1, 0.2)
    monkeypatch.undo()
    queue.publish(b"1")
    assert len(receive(adapter, 1)) == 1


def test_stopping_returns_what_was_not_received_and_what_is_parked(broker: Broker, opened: Open) -> None:
    """At once, not when the locks end; acks after the stop count."""
    queue = Queue(broker)
    queue.publish(*(b"%d" % number for number in range(100)))
    adapter = opened(queue)
    held = receive(adapter, 10)
    adapter.receive(50, 0)
    adapter.nack(held[:2], 60.0)
    adapter.stop()
    adapter.ack(held[2:8])
    adapter.nack(held[8:], 60.0)
    adapter.close()
    queue.wait_for(ready=94)
    assert adapter.receive(10, 0.1) == []


def test_subscriptions_of_a_topic_each_get_all(broker: Broker, opened: Open) -> None:
    """And the adapter publishes to the topic."""
    first, second = Queue(broker, topic="news"), Queue(broker, topic="news")
    adapter = opened(first)
    assert adapter.check() == []
    assert adapter.publish([b"1", b"2"]) == 2
    got = receive(adapter, 2)
    assert [delivery.body for delivery in got] == [b"1", b"2"]
    adapter.ack(got)
    assert first.counts() == (0, 0, 0)
    assert bodies(second.read()) == [b"1", b"2"]


def test_publish_fills_the_queue(broker: Broker, opened: Open) -> None:
    """In batches of the size that it takes; what it does not take is an error that says how far it came."""
    queue = Queue(broker)
    adapter = opened(queue)
    assert adapter.publish(b"%d" % number for number in range(1500)) == 1500
    assert adapter.publish([b"x" * 600_000] * 3) == 3
    assert queue.counts() == (1503, 0, 0)
    assert adapter.publish([]) == 0
    with pytest.raises(QueueError, match="QUEUE_URL: 2 messages were published, then one was too large"):
        adapter.publish([b"fine", b"fine", b"x" * 2_000_000])
    with pytest.raises(QueueError, match="QUEUE_URL: 0 messages were published, then one was too large"):
        adapter.publish([b"x" * 2_000_000])


def test_without_a_connection_string_azure_says_who_we_are() -> None:
    """By the SDK's own chain: managed identity, environment, command line."""
    adapter = open_queue("servicebus://127.0.0.1:1/orders")
    with pytest.raises(QueueError, match=r"QUEUE_URL: cannot reach 127.0.0.1:1/orders"):
        adapter.check()
    adapter.close()


def test_check_says_what_to_do(own_broker: Broker, opened: Open) -> None:
    """One sentence: the queue is missing, not for us, disabled, or out of reach."""
    queue = Queue(own_broker)
    with pytest.raises(QueueError, match=r"QUEUE_URL: 127.*/nowhere does not exist: create it"):
        opened(queue, f"servicebus://{own_broker.host}/nowhere").check()
    adapter = opened(queue)
    own_broker("refuse", name=queue.name, condition="amqp:unauthorized-access")
    with pytest.raises(QueueError, match=r"not permitted .* grant the role Azure Service Bus Data Receiver on it"):
        adapter.check()
    own_broker("refuse", name=queue.name, condition="com.microsoft:entity-disabled")
    with pytest.raises(QueueError, match=r"is disabled: set its status to Active"):
        adapter.check()
    own_broker.kill()
    with pytest.raises(QueueError, match=rf"cannot reach {own_broker.host}/{queue.name}"):
        adapter.check()
    with pytest.raises(QueueError, match=r"QUEUE_URL: 0 messages were published, then: cannot reach"):
        adapter.publish([b"1"])


def test_a_queue_that_refuses_is_waited_for(
    broker: Broker, opened: Open, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """For a minute, as permissions take a while to spread; then it is said, until it is mended."""
    monkeypatch.setattr(reconnect, "REFUSAL_TIMEOUT", 1.0)
    queue = Queue(broker)
    adapter = opened(queue)
    broker("refuse", name=queue.name, condition="amqp:unauthorized-access")
    with pytest.raises(QueueRefusedError, match="QUEUE_URL: Service Bus refuses the queue"):
        receive(adapter, 1)
    assert "receive_failed" in [record.message for record in caplog.records]
    broker("refuse", name=queue.name, condition="")
    queue.publish(b"back")
    deadline = time.monotonic() + 15
    got: list[ServiceBusDelivery] = []
    while not got and time.monotonic() < deadline:
        try:
            got += adapter.receive(1, 0.2)
        except QueueRefusedError:
            time.sleep(0.1)
    assert [delivery.body for delivery in got] == [b"back"]
    assert adapter.receive(1, 0.2) == []


def test_an_outage_loses_nothing(own_broker: Broker, opened: Open) -> None:
    """Connections are cut, and later the broker is away for 3 s, while messages flow; acks insist."""
    queue = Queue(own_broker, lock=8.0)
    adapter = opened(queue)
    queue.publish(*(b"%d" % number for number in range(300)))
    seen: list[bytes] = []
    faults: list[Callable[[], object]] = [lambda: own_broker("drop"), lambda: _down_for(own_broker, 3.0)]
    deadline = time.monotonic() + 60
    while len(set(seen)) < 300 and time.monotonic() < deadline:
        deliveries = adapter.receive(20, 0.2)
        if faults and len(seen) > 100 * (3 - len(faults)) - 50:
            Thread(target=faults.pop(0)).start()
        adapter.ack(deliveries)
        seen += [delivery.body for delivery in deliveries]
    assert len(set(seen)) == 300
    queue.wait_for()


def _down_for(broker: Broker, seconds: float) -> None:
    broker("down")
    time.sleep(seconds)
    broker("up")


def test_a_service_that_says_nothing_is_not_waited_for(
    own_broker: Broker, opened: Open, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It takes connections, and that is all: the SDK alone would wait for ever."""
    monkeypatch.setattr(servicebus_links, "OPEN_TIMEOUT", 0.5)
    queue = Queue(own_broker)
    queue.publish(b"1")
    adapter = opened(queue)
    own_broker.freeze()
    with pytest.raises(QueueError, match=r"cannot reach .*: no answer within"):
        adapter.check()
    with pytest.raises(QueueError, match=r"QUEUE_URL: 0 messages were published, then: cannot reach"):
        adapter.publish([b"1"])
    deadline = time.monotonic() + 15
    while "receive_failed" not in [record.message for record in caplog.records] and time.monotonic() < deadline:
        adapter.receive(1, 0.2)
    own_broker.thaw()
    monkeypatch.undo()
    assert len(receive(adapter, 1)) == 1


def test_what_is_opened_too_late_is_closed(own_broker: Broker, opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else each try of an outage would leave a connection, which a thread of the SDK keeps for ever."""
    monkeypatch.setattr(servicebus_links, "OPEN_TIMEOUT", 0.1)
    adapter = opened(Queue(own_broker))
    before = set(threading.enumerate())
    own_broker.freeze()
    for _ in range(3):
        with pytest.raises(QueueError, match="no answer within"):
            adapter.check()
    assert set(threading.enumerate()) - before
    own_broker.thaw()
    deadline = time.monotonic() + 15
    while (left := set(threading.enumerate()) - before) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not left


def test_no_end_of_connections_is_opened_in_vain(
    own_broker: Broker, opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each takes a thread and a socket for as long as the service says nothing; the worker needs some itself."""
    monkeypatch.setattr(servicebus_links, "OPEN_TIMEOUT", 0.1)
    monkeypatch.setattr(servicebus_links, "_opening", threading.Semaphore(1))
    adapter = opened(Queue(own_broker))
    own_broker.freeze()
    with pytest.raises(QueueError, match="no answer within"):
        adapter.check()
    with pytest.raises(QueueError, match="connections still wait for an answer"):
        adapter.check()
    own_broker.thaw()
    monkeypatch.setattr(servicebus_links, "OPEN_TIMEOUT", 10.0)
    deadline = time.monotonic() + 15
    while time.monotonic() < deadline:
        try:
            assert adapter.check() == []
            break
        except QueueError:
            time.sleep(0.05)
    assert adapter.check() == []


def test_extend_says_that_leases_may_end(own_broker: Broker, opened: Open) -> None:
    """So that nobody counts on them."""
    queue = Queue(own_broker)
    queue.publish(b"1")
    adapter = opened(queue)
    held = receive(adapter, 1)
    own_broker.kill()
    with pytest.raises(QueueError, match="some locks could not be renewed"):
        adapter.extend(held, 30.0)


def test_closing_does_not_wait_for_a_broker_that_is_gone(own_broker: Broker, opened: Open) -> None:
    """What was held comes again when the locks end."""
    queue = Queue(own_broker)
    queue.publish(*(b"%d" % number for number in range(20)))
    adapter = opened(queue)
    held = receive(adapter, 10)
    own_broker.kill()
    began = time.monotonic()
    adapter.nack(held, 60.0)
    adapter.close()
    adapter.close()
    assert time.monotonic() - began < 30
