"""The Service Bus adapter and Azure's SDK, on the broker of tests/support."""

from __future__ import annotations

import json
import threading
import time
from threading import Thread
from typing import TYPE_CHECKING, Any

import pytest
from azure.servicebus.amqp import AmqpAnnotatedMessage

from adapters import QueueError, QueueOptions, QueueRefusedError, open_queue
from adapters.base import Interruption
from adapters.servicebus import connections
from adapters.servicebus import receiver as servicebus_receiver
from adapters.servicebus.queue import ServiceBusQueue
from adapters.shared import reconnect
from tests.integration.conftest import FAILURE
from tests.support.servicebus_broker.broker import Broker, Queue, bodies
from tests.support.waiting import receive, wait_for

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from adapters.servicebus.message import ServiceBusDelivery

    Open = Callable[..., ServiceBusQueue]


@pytest.fixture
def open_queues() -> Iterator[Open]:
    """Open queues; close them at the end."""
    queues: list[ServiceBusQueue] = []

    def open_one(queue: Queue, url: str = "", **options: Any) -> ServiceBusQueue:
        options.setdefault("connection_string", queue.broker.connection_string)
        adapter = open_queue(url or queue.url, QueueOptions(**options))
        assert isinstance(adapter, ServiceBusQueue)
        queues.append(adapter)
        return adapter

    yield open_one
    closing = [Thread(target=queue.close) for queue in queues]
    for thread in closing:
        thread.start()
    for thread in closing:
        thread.join()


def test_messages_arrive_unchanged_and_are_removed_by_ack(broker: Broker, open_queues: Open) -> None:
    """Any body, the attributes, attempt and publishing time arrive. A queue's name can contain a slash."""
    queue = Queue(broker, name="orders/eu")
    sent = [b"\xff\x00 no text", "é".encode(), b"", b"x" * 900_000, *(b"%d" % number for number in range(200))]
    queue.publish(*sent[:3], colour="blue", size=3)
    queue.publish(sent[3])
    queue.publish(*sent[4:])
    adapter = open_queues(queue)
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


def test_all_types_of_bodies_are_read(broker: Broker, open_queues: Open) -> None:
    """AMQP has several ways to encode the same body, and the publisher chooses one."""
    queue = Queue(broker)
    queue.publish(
        AmqpAnnotatedMessage(data_body=[b'{"a":', b" 1}"]),
        AmqpAnnotatedMessage(value_body="é"),
        AmqpAnnotatedMessage(value_body=b"\xff"),
        AmqpAnnotatedMessage(value_body={"a": [1, None, True, "b"]}),
        AmqpAnnotatedMessage(sequence_body=[[1, 2], ["x"]]),
    )
    adapter = open_queues(queue)
    got = [delivery.body for delivery in receive(adapter, 5)]
    assert got[:3] == [b'{"a": 1}', "é".encode(), b"\xff"]
    assert [json.loads(body) for body in got[3:]] == [{"a": [1, None, True, "b"]}, [1, 2, "x"]]


def test_prefetched_messages_are_released_without_room(broker: Broker, open_queues: Open) -> None:
    """Releasing them does not count as a delivery."""
    queue = Queue(broker)
    queue.publish(*(b"%d" % number for number in range(80)))
    adapter, other = open_queues(queue), open_queues(queue)
    held = receive(adapter, 10)
    got = receive(other, 70)
    assert {delivery.attempt for delivery in (*held, *got)} == {1}
    assert len({delivery.body for delivery in (*held, *got)}) == 80


def test_pending_bytes_are_limited(broker: Broker, open_queues: Open) -> None:
    """Messages without room are released."""
    queue = Queue(broker)
    queue.publish(*[b"x" * 10_000] * 60)
    adapter = open_queues(queue, max_bytes=25_000)
    adapter.receive(60, 0)

    def most_are_released() -> bool:
        ready, locked, _ = queue.counts()
        return ready >= 40 and locked > 0

    wait_for(most_are_released)


def test_sdk_starts_no_thread_that_reads(broker: Broker, open_queues: Open) -> None:
    """With two reading threads, the SDK mixes up messages and lock tokens: an ack removes another message."""
    queue = Queue(broker)
    adapter = open_queues(queue)
    deadline = time.monotonic() + 60
    while adapter._receiver._receiver is None and time.monotonic() < deadline:
        adapter.receive(1, 0.2)
    receiver: Any = adapter._receiver._receiver
    assert receiver._handler._keep_alive_thread is None


def test_nacked_message_is_redelivered_after_its_delay(broker: Broker, open_queues: Open) -> None:
    """The delay can be longer than a lock. Attempts are counted. Until redelivery, the backlog counts the message."""
    queue = Queue(broker, lock=4.0)
    queue.publish(b"now", b"later")
    adapter = open_queues(queue)
    first = {delivery.body: delivery for delivery in receive(adapter, 2)}
    assert adapter.backlog() is None
    nacked = time.monotonic()
    adapter.nack([first[b"later"]], 5.0, FAILURE)
    adapter.nack([first[b"now"]])
    assert adapter.backlog() == 2
    got: list[ServiceBusDelivery] = []
    while len(got) < 2 and time.monotonic() - nacked < 30:
        got += adapter.receive(1, 0.2)
        adapter.extend(got, 4.0)
    assert time.monotonic() - nacked > 5.0
    assert [(delivery.body, delivery.attempt) for delivery in got] == [(b"now", 2), (b"later", 2)]
    assert adapter.backlog() is None


def test_delayed_messages_are_limited(broker: Broker, open_queues: Open) -> None:
    """Beyond the limit, the message that is due first is released immediately."""
    queue = Queue(broker)
    queue.publish(b"1", b"2", b"3")
    adapter = open_queues(queue, max_messages=2)
    for delivery, delay in zip(receive(adapter, 3), (60.0, 50.0, 70.0), strict=True):
        adapter.nack([delivery], delay)
    assert [delivery.body for delivery in receive(adapter, 1)] == [b"2"]
    assert queue.counts() == (0, 3, 0)


def test_dead_letter_has_its_reason(broker: Broker, open_queues: Open) -> None:
    """It is truncated to Service Bus's limit; the message's own properties are kept."""
    queue = Queue(broker)
    queue.publish(b"poison", colour="blue")
    adapter = open_queues(queue)
    (delivery,) = receive(adapter, 1)
    failure = FAILURE.__class__("Klaviyo refused the record: " + "é" * 5000, "send", "Rejected", "OrderCreated")
    assert adapter.dead_letter(delivery, failure)
    (dead_letter,) = queue.dead_letters(1)
    assert bodies([dead_letter]) == [b"poison"]
    assert dead_letter.dead_letter_reason == "send: Rejected"
    assert dead_letter.dead_letter_error_description is not None
    assert dead_letter.dead_letter_error_description.startswith("Klaviyo refused the record: é")
    assert len(dead_letter.dead_letter_error_description) == 4096
    assert (dead_letter.application_properties or {})[b"colour"] == b"blue"
    assert queue.counts() == (0, 0, 0)


def test_description_of_dead_letter_names_the_resource(broker: Broker, open_queues: Open) -> None:
    """Operators can read it on the queue, without the worker's log."""
    queue = Queue(broker)
    queue.publish(b"poison")
    adapter = open_queues(queue)
    failure = FAILURE.__class__("Refused", "send", "Rejected", "OrderCreated", "order", "o-1")
    (delivery,) = receive(adapter, 1)
    assert adapter.dead_letter(delivery, failure)
    (dead_letter,) = queue.dead_letters(1)
    description = dead_letter.dead_letter_error_description or ""
    assert description.startswith("Refused (message_type OrderCreated, order o-1, attempt 1, 20")


def test_settling_after_lost_lock_has_no_effect(
    broker: Broker, open_queues: Open, caplog: pytest.LogCaptureFixture
) -> None:
    """The message is redelivered; settling the old delivery does not affect the new one."""
    queue = Queue(broker)
    queue.publish(b"1", b"2", b"3")
    adapter = open_queues(queue)
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


def test_acked_message_is_no_longer_expected(broker: Broker, open_queues: Open) -> None:
    """This holds even if an old delivery was nacked after its lock had ended."""
    queue = Queue(broker)
    queue.publish(b"1")
    adapter = open_queues(queue)
    stale = receive(adapter, 1)
    broker("expire", name=queue.name)
    again = receive(adapter, 1)
    adapter.nack(stale)
    assert adapter.backlog() == 1
    adapter.ack(again)
    assert adapter.backlog() is None


def test_locks_of_held_pending_and_delayed_messages_are_renewed(broker: Broker, open_queues: Open) -> None:
    """`extend` renews all locks of the adapter, not only those of the given deliveries."""
    queue = Queue(broker, lock=6.0)  # longer than a busy machine stops a process
    queue.publish(*(b"%d" % number for number in range(30)))
    adapter = open_queues(queue)
    held = receive(adapter, 1)
    adapter.nack(held, 60.0)
    held = receive(adapter, 10)
    adapter.receive(19, 0)  # more are prefetched and pending
    for _ in range(20):
        time.sleep(0.4)
        adapter.extend(held, adapter.lease_seconds)
    rest = receive(adapter, 29 - len(held), wait=5.0)
    assert {delivery.attempt for delivery in rest} <= {1}
    assert queue.counts() == (0, 30, 0)


@pytest.mark.parametrize("ahead", [600.0, 100.0, -600.0, -20.0])
def test_wrong_clock_loses_no_messages(
    broker: Broker, open_queues: Open, ahead: float, caplog: pytest.LogCaptureFixture
) -> None:
    """The lock duration is never overestimated. Only Service Bus decides whether a lock is still valid."""
    queue = Queue(broker, lock=30.0)
    broker("clock", name=queue.name, ahead=ahead)
    queue.publish(b"1", b"2", b"3")
    adapter = open_queues(queue)
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


def test_message_settled_during_extension_is_not_reported_as_lost(
    broker: Broker, open_queues: Open, caplog: pytest.LogCaptureFixture
) -> None:
    """Leases are extended while lanes settle."""
    queue = Queue(broker)
    queue.publish(*(b"%d" % number for number in range(300)))
    adapter = open_queues(queue)
    held = receive(adapter, 300)
    acking = Thread(target=adapter.ack, args=(held,))
    acking.start()
    while acking.is_alive():
        adapter.extend(held, 30.0)
    acking.join()
    assert queue.counts() == (0, 0, 0)
    assert [(record.message, vars(record).get("action")) for record in caplog.records] == []


def test_busy_service_is_retried(broker: Broker, open_queues: Open) -> None:
    """Acks and nacks are retried when the service throttles."""
    queue = Queue(broker)
    queue.publish(b"1", b"2")
    adapter = open_queues(queue)
    done, failed = receive(adapter, 2)
    broker("busy", name=queue.name, requests=2)
    adapter.ack([done])
    broker("busy", name=queue.name, requests=2)
    adapter.nack([failed])
    assert [delivery.body for delivery in receive(adapter, 1)] == [failed.body]
    assert queue.counts() == (0, 1, 0)


def test_call_on_closed_connection_is_retried_on_a_new_one(broker: Broker, open_queues: Open) -> None:
    """Service Bus closes idle connections after some minutes."""
    queue = Queue(broker)
    queue.publish(b"1")
    adapter = open_queues(queue)
    held = receive(adapter, 1)
    adapter.extend(held, 30.0)
    broker("drop")
    adapter.extend(held, 30.0)
    adapter.ack(held)
    assert queue.counts() == (0, 0, 0)


def test_idle_receiver_is_reopened(
    broker: Broker, open_queues: Open, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An idle receiver can hang, and the service closes idle connections."""
    monkeypatch.setattr(servicebus_receiver, "IDLE_TIMEOUT", 0.1)
    queue = Queue(broker)
    adapter = open_queues(queue)
    deadline = time.monotonic() + 60
    with caplog.at_level("INFO"):
        while "receiver_restarted" not in [record.message for record in caplog.records] and time.monotonic() < deadline:
            adapter.receive(1, 0.2)
    monkeypatch.undo()
    queue.publish(b"1")
    assert len(receive(adapter, 1)) == 1


def test_stop_abandons_pending_and_delayed_messages(broker: Broker, open_queues: Open) -> None:
    """They are redelivered immediately, not when the locks end. Settling continues.

    Only messages that a bulk job of this worker can still overwrite stay locked.
    """
    queue = Queue(broker)
    queue.publish(*(b"%d" % number for number in range(100)))
    adapter = open_queues(queue)
    held, job, first_of_job = receive(adapter, 10), receive(adapter, 1), receive(adapter, 1)
    adapter.receive(50, 0)
    adapter.nack(held[:2], 60.0)
    adapter.stop()
    adapter.ack(held[2:8])
    adapter.nack(held[8:], 60.0, FAILURE)
    adapter.nack(job, 60.0)
    adapter.nack(first_of_job, 60.0, Interruption("stopped", "send", "JobUnfinished"))
    adapter.close()
    queue.wait_for(ready=92, locked=2)
    assert adapter.receive(10, 0.1) == []


def test_each_subscription_of_a_topic_receives_all_messages(broker: Broker, open_queues: Open) -> None:
    """The adapter publishes to the topic."""
    first, second = Queue(broker, topic="news"), Queue(broker, topic="news")
    adapter = open_queues(first)
    assert adapter.check() == []
    assert adapter.publish([b"1", b"2"]) == 2
    got = receive(adapter, 2)
    assert [delivery.body for delivery in got] == [b"1", b"2"]
    adapter.ack(got)
    assert first.counts() == (0, 0, 0)
    assert bodies(second.read()) == [b"1", b"2"]


def test_publish_fills_the_queue(broker: Broker, open_queues: Open) -> None:
    """The batches have the size that the queue accepts. An error has the number of messages published before it."""
    queue = Queue(broker)
    adapter = open_queues(queue)
    assert adapter.publish(b"%d" % number for number in range(1500)) == 1500
    assert adapter.publish([b"x" * 600_000] * 3) == 3
    assert queue.counts() == (1503, 0, 0)
    assert adapter.publish([]) == 0
    with pytest.raises(QueueError, match="QUEUE_URL: 2 messages were published, then one was too large"):
        adapter.publish([b"fine", b"fine", b"x" * 2_000_000])
    with pytest.raises(QueueError, match="QUEUE_URL: 0 messages were published, then one was too large"):
        adapter.publish([b"x" * 2_000_000])


def test_credentials_of_azure_are_used_without_connection_string() -> None:
    """The SDK's default chain: managed identity, environment, command line."""
    adapter = open_queue("servicebus://127.0.0.1:1/orders")
    with pytest.raises(QueueError, match=r"QUEUE_URL: cannot reach 127.0.0.1:1/orders"):
        adapter.check()
    adapter.close()


def test_check_reports_the_cause_and_what_to_do(own_broker: Broker, open_queues: Open) -> None:
    """The queue is missing, access is refused, or the queue is disabled or unreachable."""
    queue = Queue(own_broker)
    with pytest.raises(QueueError, match=r"QUEUE_URL: 127.*/nowhere does not exist: create it"):
        open_queues(queue, f"servicebus://{own_broker.host}/nowhere").check()
    adapter = open_queues(queue)
    own_broker("refuse", name=queue.name, condition="amqp:unauthorized-access")
    with pytest.raises(
        QueueError, match=f"not permitted .* grant the role Azure Service Bus Data Receiver on .*/{queue.name}, or"
    ):
        adapter.check()
    own_broker("refuse", name=queue.name, condition="com.microsoft:entity-disabled")
    with pytest.raises(QueueError, match=r"is disabled: set its status to Active"):
        adapter.check()
    own_broker.kill()
    with pytest.raises(QueueError, match=rf"cannot reach {own_broker.host}/{queue.name}"):
        adapter.check()
    with pytest.raises(QueueError, match=r"QUEUE_URL: 0 messages were published, then: cannot reach"):
        adapter.publish([b"1"])


def test_lasting_refusal_raises_until_it_ends(
    broker: Broker, open_queues: Open, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """New permissions take effect with a delay, so the error is raised only after a minute."""
    monkeypatch.setattr(reconnect, "REFUSAL_TIMEOUT", 1.0)
    queue = Queue(broker)
    adapter = open_queues(queue)
    broker("refuse", name=queue.name, condition="amqp:unauthorized-access")
    with pytest.raises(QueueRefusedError, match="QUEUE_URL: Service Bus refuses the queue"):
        receive(adapter, 1)
    assert "receive_failed" in [record.message for record in caplog.records]
    broker("refuse", name=queue.name, condition="")
    queue.publish(b"back")
    deadline = time.monotonic() + 60
    got: list[ServiceBusDelivery] = []
    while not got and time.monotonic() < deadline:
        try:
            got += adapter.receive(1, 0.2)
        except QueueRefusedError:
            time.sleep(0.1)
    assert [delivery.body for delivery in got] == [b"back"]
    assert adapter.receive(1, 0.2) == []


def test_outage_loses_no_messages(own_broker: Broker, open_queues: Open) -> None:
    """Connections are closed, and later the broker is down for 3 s, while messages are processed."""
    queue = Queue(own_broker, lock=8.0)
    adapter = open_queues(queue)
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


def test_unresponsive_service_times_out(
    own_broker: Broker, open_queues: Open, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It accepts connections and does not respond; the SDK would wait indefinitely."""
    monkeypatch.setattr(connections, "OPEN_TIMEOUT", 0.5)
    queue = Queue(own_broker)
    queue.publish(b"1")
    adapter = open_queues(queue)
    own_broker.freeze()
    with pytest.raises(QueueError, match=r"cannot reach .*: no response within"):
        adapter.check()
    with pytest.raises(QueueError, match=r"QUEUE_URL: 0 messages were published, then: cannot reach"):
        adapter.publish([b"1"])
    deadline = time.monotonic() + 60
    while "receive_failed" not in [record.message for record in caplog.records] and time.monotonic() < deadline:
        adapter.receive(1, 0.2)
    own_broker.thaw()
    monkeypatch.undo()
    assert len(receive(adapter, 1)) == 1


def test_connection_opened_after_the_timeout_is_closed(
    own_broker: Broker, open_queues: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise each reconnect during an outage would leave a connection with a thread of the SDK."""
    monkeypatch.setattr(connections, "OPEN_TIMEOUT", 0.1)
    adapter = open_queues(Queue(own_broker))
    before = set(threading.enumerate())
    own_broker.freeze()
    for _ in range(3):
        with pytest.raises(QueueError, match="no response within"):
            adapter.check()
    assert set(threading.enumerate()) - before
    own_broker.thaw()
    wait_for(lambda: not set(threading.enumerate()) - before)


def test_waiting_connections_are_limited(
    own_broker: Broker, open_queues: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each has a thread and a socket while the service does not respond."""
    monkeypatch.setattr(connections, "OPEN_TIMEOUT", 0.1)
    monkeypatch.setattr(connections, "_opening", threading.Semaphore(1))
    adapter = open_queues(Queue(own_broker))
    own_broker.freeze()
    with pytest.raises(QueueError, match="no response within"):
        adapter.check()
    with pytest.raises(QueueError, match="connections still wait for a response"):
        adapter.check()
    own_broker.thaw()
    monkeypatch.setattr(connections, "OPEN_TIMEOUT", 10.0)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            assert adapter.check() == []
            break
        except QueueError:
            time.sleep(0.05)
    assert adapter.check() == []


def test_failed_extension_raises(own_broker: Broker, open_queues: Open) -> None:
    """The worker must not rely on these leases."""
    queue = Queue(own_broker)
    queue.publish(b"1")
    adapter = open_queues(queue)
    held = receive(adapter, 1)
    own_broker.kill()
    with pytest.raises(QueueError, match="some locks could not be renewed"):
        adapter.extend(held, 30.0)


def test_close_does_not_wait_for_unreachable_broker(own_broker: Broker, open_queues: Open) -> None:
    """Held messages are redelivered when their locks end."""
    queue = Queue(own_broker)
    queue.publish(*(b"%d" % number for number in range(20)))
    adapter = open_queues(queue)
    held = receive(adapter, 10)
    own_broker.kill()
    started_at = time.monotonic()
    adapter.nack(held, 60.0)
    adapter.close()
    adapter.close()
    assert time.monotonic() - started_at < 30
