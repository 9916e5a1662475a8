"""The SQS adapter on moto, and behind a relay that sends responses that moto cannot."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from adapters import Failure, QueueError, QueueOptions, QueueRefusedError, QueueURLError, open_queue
from adapters.shared import reconnect
from adapters.sqs import client as aws
from adapters.sqs import long_polling as polling
from adapters.sqs import settlement as sqs_settlement
from adapters.sqs.queue import SQSQueue
from tests.integration.conftest import FAILURE
from tests.support import sqs_fakes as sqs
from tests.support.sqs_fakes import (
    BROKEN,
    BUSY,
    DENIED,
    NO_QUEUE,
    Network,
    ProxyResponse,
    Queue,
    Response,
    Server,
    bodies,
)
from tests.support.waiting import receive, wait_for

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from adapters.sqs.long_polling import SQSDelivery

    Open = Callable[..., SQSQueue]


@pytest.fixture(autouse=True)
def on_moto(moto: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in sqs.environment(moto.port).items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def queue(moto: Server) -> Queue:
    return Queue(moto)


@pytest.fixture
def network(moto: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Network]:
    """A relay for all calls of queues that are opened afterwards."""
    relay = Network(moto)
    monkeypatch.setenv("AWS_ENDPOINT_URL_SQS", f"http://127.0.0.1:{relay.port}")
    yield relay
    relay.down()


@pytest.fixture
def open_queues() -> Iterator[Open]:
    """Open queues with short polls, because closing waits for them; close them at the end."""
    queues: list[SQSQueue] = []

    def open_one(queue: Queue, lease_seconds: float = 60.0, **options: Any) -> SQSQueue:
        client = aws.connect()
        queues.append(
            SQSQueue(client, queue.queue_url, QueueOptions(**options), lease_seconds=lease_seconds, poll_seconds=1)
        )
        return queues[-1]

    yield open_one
    for queue in queues:
        queue.close()


def numbered(number: int) -> list[bytes]:
    return [b"%d" % index for index in range(number)]


def logged(caplog: pytest.LogCaptureFixture, *names: str) -> list[tuple[str, Any]]:
    """Return the events of the log, with the number of messages that each concerns."""
    records = [(record.message, vars(record).get("messages")) for record in caplog.records]
    return [record for record in records if not names or record[0] in names]


def test_attributes_arrive_and_receipt_is_not_shown(queue: Queue, open_queues: Open) -> None:
    """The receipt in a log would allow its readers to delete messages."""
    queue.publish("é \U0001f600".encode(), colour="blue", number="7")
    adapter = open_queues(queue)
    (delivery,) = receive(adapter, 1)
    assert (delivery.body, delivery.attributes) == ("é \U0001f600".encode(), {"colour": "blue", "number": "7"})
    assert delivery.receipt not in repr(delivery)


def test_backlog_includes_nacked_messages(queue: Queue, network: Network, open_queues: Open) -> None:
    """SQS's counts are approximate and can be forbidden, so the backlog is never 0."""
    queue.publish(b"x")
    adapter = open_queues(queue)
    held = receive(adapter, 1)
    network.always["GetQueueAttributes"] = DENIED
    assert adapter.backlog() is None
    adapter.nack(held, 5.0, FAILURE)
    network.always["GetQueueAttributes"] = BROKEN
    assert adapter.backlog() == 1


def test_leases_of_held_and_pending_messages_are_extended(queue: Queue, open_queues: Open) -> None:
    """The adapter sets the visibility timeout, not the queue."""
    queue.set_attributes(VisibilityTimeout="0")
    queue.publish(b"held", b"waiting")
    adapter = open_queues(queue, lease_seconds=2.0)
    held = receive(adapter, 1)
    adapter.receive(1, 0)  # the message of its poll is pending
    wait_for(adapter._polling.pending)
    for _ in range(4):
        adapter.extend(held, 2.0)
        time.sleep(0.8)
        assert queue.pull() == []
    adapter.ack([*held, *receive(adapter, 1)])
    assert queue.count() == 0


def test_pending_message_with_expired_lease_is_dropped(queue: Queue, network: Network, open_queues: Open) -> None:
    """A parked worker does not receive it, and SQS can reject its extension. SQS redelivers it."""
    network.always["ChangeMessageVisibilityBatch"] = DENIED
    queue.publish(b"a")
    adapter = open_queues(queue, lease_seconds=1.0)
    adapter.receive(1, 0)  # the message of its poll is pending
    wait_for(adapter._polling.pending)
    with pytest.raises(QueueError, match="leases"):
        adapter.extend([], 1.0)
    time.sleep(1.1)
    (again,) = receive(adapter, 1)
    assert again.attempt == 2
    assert adapter._polling._expected == 0
    adapter.ack([again])


def test_settling_after_lost_lease_has_no_effect(
    queue: Queue, open_queues: Open, caplog: pytest.LogCaptureFixture
) -> None:
    """At that time, the message was redelivered."""
    queue.publish(b"x")
    adapter = open_queues(queue, lease_seconds=1.0)
    late = receive(adapter, 1)
    (again,) = receive(adapter, 1)
    assert again.attempt == 2
    queue.client.delete_message(QueueUrl=queue.queue_url, ReceiptHandle=again.receipt)
    adapter.nack(late, 0.0, FAILURE)
    adapter.extend(late, 60)
    adapter.ack(late)
    assert logged(caplog) == [
        ("lease_lost", 1),
        ("lease_lost", 1),
    ]  # of a nack and an extension; SQS reports success for the ack
    assert receive(adapter, 1, wait=0.5) == []


def test_leases_are_limited_to_twelve_hours(queue: Queue, network: Network, open_queues: Open) -> None:
    """SQS's limit counts from the receipt. The worker gets an error, because the message can be redelivered."""
    queue.publish(b"x")
    adapter = open_queues(queue)
    (held,) = receive(adapter, 1)
    old = replace(held, received_at=held.received_at - sqs_settlement.MAX_HOLD + 30)
    with pytest.raises(QueueError, match="twelve hours"):
        adapter.extend([old], 60.0)
    adapter.nack([old], 600.0, FAILURE)
    adapter.nack([replace(held, received_at=held.received_at - 13 * 3600)], 600.0, FAILURE)
    seconds = [
        request["Entries"][0]["VisibilityTimeout"] for request in network.requests["ChangeMessageVisibilityBatch"]
    ]
    assert [29 <= seconds[0] <= 30, 29 <= seconds[1] <= 30, seconds[2]] == [True, True, 0]
    before = len(network.requests["ChangeMessageVisibilityBatch"])
    with pytest.raises(QueueError, match="twelve hours"):
        adapter.extend([replace(held, received_at=held.received_at - 13 * 3600)], 60.0)
    assert len(network.requests["ChangeMessageVisibilityBatch"]) == before


def test_delay_is_rounded_up(queue: Queue, network: Network, open_queues: Open) -> None:
    """SQS accepts whole seconds. A message must not be redelivered early."""
    queue.publish(b"x")
    adapter = open_queues(queue)
    adapter.nack(receive(adapter, 1), 0.4, FAILURE)
    (request,) = network.requests["ChangeMessageVisibilityBatch"]
    assert request["Entries"][0]["VisibilityTimeout"] == 1


def test_only_retryable_entries_are_retried(
    queue: Queue, network: Network, open_queues: Open, caplog: pytest.LogCaptureFixture
) -> None:
    """Lost leases are counted, and rejected entries are logged."""
    queue.publish(*numbered(6))
    adapter = open_queues(queue)
    held = receive(adapter, 6)
    failed = [
        {"Id": "0", "SenderFault": False, "Code": "InternalError", "Message": "try again"},
        {"Id": "1", "SenderFault": True, "Code": "ReceiptHandleIsInvalid"},
        {"Id": "2", "SenderFault": True, "Code": "Strange", "Message": "because"},
        {"Id": "4", "SenderFault": True, "Code": "RequestThrottled"},
        {"Id": "5", "SenderFault": False, "Code": "ReceiptHandleIsInvalid"},
    ]
    network.responses["DeleteMessageBatch"].append(Response(200, Failed=failed, Successful=[{"Id": "3"}]))
    adapter.ack(held)
    first, second = ([e["ReceiptHandle"] for e in r["Entries"]] for r in network.requests["DeleteMessageBatch"])
    assert first == [delivery.receipt for delivery in held]
    assert second == [held[0].receipt, held[4].receipt]
    assert logged(caplog) == [("lease_lost", 2), ("settlement_failed", 1)]
    assert vars(caplog.records[1])["reason"] == "Strange: because"


def test_messages_are_settled_in_calls_of_ten(
    queue: Queue, network: Network, open_queues: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each entry has a unique id."""
    monkeypatch.setattr(sqs_settlement, "THREADS", 1)  # moto miscounts concurrent deletions
    adapter = open_queues(queue)
    queue.publish(*numbered(25))
    held = receive(adapter, 25)
    adapter.ack(held)
    entries = [request["Entries"] for request in network.requests["DeleteMessageBatch"]]
    assert sorted(len(batch) for batch in entries) == [5, 10, 10]
    assert len({entry["Id"] for batch in entries for entry in batch}) == 25
    assert queue.count() == 0


@pytest.mark.parametrize("failure", [BUSY, BROKEN, Response(200)], ids=["throttled", "5xx", "no entry"])
def test_ack_is_retried(
    queue: Queue, network: Network, open_queues: Open, monkeypatch: pytest.MonkeyPatch, failure: Response
) -> None:
    """A message whose ack is lost is processed twice."""
    monkeypatch.setattr(sqs_settlement, "NACK_TIMEOUT", 0.0)
    queue.publish(b"a")
    adapter = open_queues(queue)
    held = receive(adapter, 1)
    network.responses["DeleteMessageBatch"].extend([failure] * 3)
    adapter.ack(held)
    assert len(network.requests["DeleteMessageBatch"]) == 4
    assert queue.count() == 0


def test_failed_ack_is_logged(
    queue: Queue, network: Network, open_queues: Open, caplog: pytest.LogCaptureFixture
) -> None:
    """SQS redelivers the messages; nothing else fails."""
    queue.publish(b"a")
    adapter = open_queues(queue)
    held = receive(adapter, 1)
    network.always["DeleteMessageBatch"] = DENIED
    adapter.ack(held)
    assert len(network.requests["DeleteMessageBatch"]) == 1
    assert logged(caplog) == [("settlement_failed", 1)]


def test_retries_of_ack_end_with_the_lease(
    queue: Queue,
    network: Network,
    open_queues: Open,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At that time, SQS has redelivered the messages. If one call fails to connect, the others are skipped."""
    monkeypatch.setattr(sqs_settlement, "ACK_TIMEOUT", 0.3)
    monkeypatch.setattr(sqs_settlement, "THREADS", 1)
    queue.publish(b"a")
    adapter = open_queues(queue)
    (held,) = receive(adapter, 1)
    network.always["DeleteMessageBatch"] = BROKEN
    adapter.ack([held] * 500)
    assert len(network.requests["DeleteMessageBatch"]) < 50
    assert logged(caplog) == [("settlement_failed", 500)]


@pytest.mark.parametrize("number", [1, 30])
def test_close_ends_retries(queue: Queue, network: Network, open_queues: Open, number: int) -> None:
    """After the grace period, no retries delay the shutdown."""
    queue.publish(b"a")
    adapter = open_queues(queue)
    (held,) = receive(adapter, 1)
    network.always["DeleteMessageBatch"] = BROKEN
    acking = threading.Thread(target=adapter.ack, args=([held] * number,))
    acking.start()
    wait_for(lambda: network.requests["DeleteMessageBatch"])
    adapter.close()
    acking.join(60)
    assert not acking.is_alive()
    adapter.ack([held] * number)  # a lane that still acks gets no exception


def test_extension_is_not_retried(
    queue: Queue, network: Network, open_queues: Open, caplog: pytest.LogCaptureFixture
) -> None:
    """A retry could take effect after a nack. The caller gets an error, because leases can end."""
    queue.publish(b"a")
    adapter = open_queues(queue)
    held = receive(adapter, 1)
    adapter.extend(held, 60)
    network.always["ChangeMessageVisibilityBatch"] = BROKEN
    with pytest.raises(QueueError, match="leases"):
        adapter.extend(held, 61)
    assert len(network.requests["ChangeMessageVisibilityBatch"]) == 1 + aws.BOTO_ATTEMPTS
    assert [vars(record)["action"] for record in caplog.records] == ["extend"]


def test_extension_skips_messages_settled_in_the_meantime(
    queue: Queue, open_queues: Open, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Extending thousands takes a while. A nack is not undone, and an ack is not reported as a lost lease."""
    monkeypatch.setattr(sqs_settlement, "THREADS", 1)  # sequential calls
    queue.publish(*numbered(20))
    adapter = open_queues(queue)
    held = receive(adapter, 20)
    change = adapter._client.change_message_visibility_batch

    def settle_during_extension(**request: Any) -> Any:
        monkeypatch.setattr(adapter._client, "change_message_visibility_batch", change)
        adapter.ack([held[0], held[15]])
        adapter.nack([held[16]], 0.0, FAILURE)
        return change(**request)

    monkeypatch.setattr(adapter._client, "change_message_visibility_batch", settle_during_extension)
    adapter.extend(held, 60.0)
    assert logged(caplog) == []
    assert [delivery.body for delivery in receive(adapter, 1)] == [held[16].body]


def test_last_failure_is_logged_if_the_policy_dead_letters(
    moto: Server, open_queues: Open, caplog: pytest.LogCaptureFixture
) -> None:
    """The dead letter itself has no reason. The message is no longer expected."""
    queue = Queue(moto, receives=2)
    queue.publish(b"poison")
    adapter = open_queues(queue)
    adapter.check()
    adapter.nack(receive(adapter, 1), 0.0, FAILURE)
    assert len(adapter._expected_redeliveries) == 1
    adapter.nack(receive(adapter, 1), 0.0, FAILURE)
    assert len(adapter._expected_redeliveries) == 0
    assert [(record.message, vars(record)["reason"]) for record in caplog.records] == [
        ("attempts_exhausted", FAILURE.reason)
    ]
    assert receive(adapter, 1, wait=0.5) == []
    assert bodies(queue.dead_letters(1)) == [b"poison"]
    assert adapter.backlog() is None


def test_dead_letter_without_policy_delays_the_message(moto: Server, open_queues: Open) -> None:
    """SQS redelivers indefinitely. If the policy is unknown, the message must still reach its maximum of receives."""
    queue = Queue(moto, receives=None)
    queue.publish(b"poison")
    adapter = open_queues(queue)
    (delivery,) = receive(adapter, 1)
    assert not adapter.dead_letter(delivery, FAILURE)
    (delivery,) = receive(adapter, 1)
    adapter.check()
    assert not adapter.dead_letter(delivery, FAILURE)
    assert receive(adapter, 1, wait=1) == []


def test_dead_letter_backs_off_if_the_policy_is_unknown(queue: Queue, network: Network, open_queues: Open) -> None:
    """There is possibly no policy, and AWS charges for every request."""
    queue.publish(b"poison")
    adapter = open_queues(queue)
    (delivery,) = receive(adapter, 1)
    for attempt in (1, 5, 10_000):
        assert not adapter.dead_letter(replace(delivery, attempt=attempt), FAILURE)
    seconds = [
        request["Entries"][0]["VisibilityTimeout"] for request in network.requests["ChangeMessageVisibilityBatch"]
    ]
    assert seconds == [2, 32, 3600]


def test_direct_dead_letter_has_its_reason(queue: Queue, open_queues: Open) -> None:
    """It is sent at the first attempt, with as many of the original attributes as SQS allows."""
    queue.publish(b"poison", reason="original", **{f"own{number}": "é" for number in range(9)})
    adapter = open_queues(queue, direct_dead_letter=True)
    assert adapter.check() == []
    (delivery,) = receive(adapter, 1)
    failure = Failure("Klaviyo said \x00 " + "é" * 2000, "send", "Rejected", "OrderCreated", "order", "")
    assert adapter.dead_letter(delivery, failure)
    (dead_letter,) = queue.dead_letters(1)
    values = {name: value["StringValue"] for name, value in dead_letter["MessageAttributes"].items()}
    reason = values.pop("reason")
    assert reason.startswith("Klaviyo said \N{REPLACEMENT CHARACTER} é")
    assert len(reason.encode()) in {1023, 1024}
    own = {name: values.pop(name) for name in list(values) if name.startswith("own")}
    assert own == dict.fromkeys(("own0", "own1"), "é")
    assert values == {
        "stage": "send",
        "error": "Rejected",
        "message_type": "OrderCreated",
        "resource_type": "order",
        "queue": queue.name,
        "message_id": delivery.id,
        "attempt": "1",
    }
    assert dead_letter["Body"] == "poison"
    assert queue.count() == 0


def test_message_is_redelivered_if_dead_letter_cannot_be_sent(
    queue: Queue, open_queues: Open, caplog: pytest.LogCaptureFixture
) -> None:
    """Sending fails, for example, if the dead-letter queue does not exist."""
    queue.publish(b"poison")
    adapter = open_queues(queue, direct_dead_letter=True)
    (unknown,) = receive(adapter, 1)
    assert not adapter.dead_letter(unknown, FAILURE)
    adapter.check()
    queue.client.delete_queue(QueueUrl=queue.dead_url)
    (delivery,) = receive(adapter, 1)
    assert not adapter.dead_letter(delivery, FAILURE)
    (again,) = receive(adapter, 1)
    assert again.attempt == 3
    assert logged(caplog, "dead_letter_failed") == [("dead_letter_failed", None)]
    adapter.ack([again])


def test_check_reports_missing_policies(moto: Server, open_queues: Open) -> None:
    """Each warning has the command that fixes it."""
    bare = Queue(moto, receives=None)
    (policy,) = open_queues(bare).check()
    assert f"aws sqs set-queue-attributes --queue-url {bare.queue_url} --attributes" in policy.todo
    assert "no redrive policy" in policy.reason
    assert policy.is_missing_policy
    with pytest.raises(QueueError, match=r"KLAVIYO_WORKER_DEAD_LETTER_MODE=direct: .* has no dead-letter queue"):
        open_queues(bare, direct_dead_letter=True).check()
    few = Queue(moto, receives=4)
    few.client.delete_queue(QueueUrl=few.dead_url)
    dead, receives = open_queues(few).check()
    todo = "create it, or correct its name or region in the URL"
    assert str(dead) == f"the dead-letter queue: {few.name}-dead in eu-central-1 does not exist: {todo}"
    assert "after 4 receives" in receives.reason
    assert (dead.is_missing_policy, receives.is_missing_policy) == (True, False)
    with pytest.raises(
        QueueError, match=f"KLAVIYO_WORKER_DEAD_LETTER_MODE=direct: .* {few.name}-dead in eu-central-1 does not exist"
    ):
        open_queues(few, direct_dead_letter=True).check()
    few.client.delete_queue(QueueUrl=few.queue_url)
    with pytest.raises(QueueError, match=f"QUEUE_URL: {few.name} in eu-central-1 does not exist: create it"):
        open_queues(few).check()


def test_missing_permission_to_read_the_queue_is_a_warning(
    moto: Server, network: Network, open_queues: Open, caplog: pytest.LogCaptureFixture
) -> None:
    """The policy is unknown. Only direct mode requires it."""
    network.always["GetQueueAttributes"] = DENIED
    queue = Queue(moto)
    (warning,) = open_queues(queue).check()
    assert warning.todo == f"grant sqs:GetQueueAttributes on {queue.name}"
    with pytest.raises(
        QueueError, match=f"KLAVIYO_WORKER_DEAD_LETTER_MODE=direct: .* grant sqs:GetQueueAttributes on {queue.name}"
    ):
        open_queues(queue, direct_dead_letter=True).check()
    assert open_queues(queue).counts() == (None, None)


def test_each_queue_is_counted_if_permitted(queue: Queue, network: Network, open_queues: Open) -> None:
    """A missing permission for one of them does not hide the other."""
    queue.publish(b"a", b"b")
    queue.client.send_message(QueueUrl=queue.dead_url, MessageBody="dead")
    adapter = open_queues(queue)
    assert adapter.counts() == (2, None)  # its dead-letter queue is not known yet
    adapter = open_queues(queue)
    adapter.check()
    assert adapter.counts() == (2, 1)
    network.responses["GetQueueAttributes"].append(DENIED)
    assert adapter.counts() == (2, None)
    network.down()
    with pytest.raises(QueueError, match=f"QUEUE_URL: cannot reach SQS for {queue.name} in eu-central-1: "):
        adapter.counts()


def test_messages_that_arrive_after_stop_are_nacked_immediately(queue: Queue, open_queues: Open) -> None:
    """A poll cannot be cancelled. Another worker gets the message before the lease ends."""
    adapter = open_queues(queue)
    adapter.receive(1, 0)
    queue.publish(b"x")
    adapter.stop()
    (again,) = receive(open_queues(queue), 1)
    assert again.attempt == 2


def test_stop_waits_for_polls_only_once(
    queue: Queue, open_queues: Open, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SQS redelivers the messages of later polls."""
    monkeypatch.setattr(polling, "STOP_TIMEOUT", -0.9)
    adapter = open_queues(queue)
    adapter.receive(1, 0)
    adapter.stop()
    adapter.stop()
    assert logged(caplog) == [("polls_not_ended", None)]


def test_polls_request_no_more_than_there_is_room(queue: Queue, network: Network, open_queues: Open) -> None:
    """Other workers cannot receive the messages in the inbox."""
    queue.publish(*numbered(40))
    adapter = open_queues(queue)
    got = receive(adapter, 23)
    assert len(got) == 23
    requested = sum(request["MaxNumberOfMessages"] for request in network.requests["ReceiveMessage"])
    assert requested == 23
    assert {request["VisibilityTimeout"] for request in network.requests["ReceiveMessage"]} == {60}


def test_no_poll_starts_without_a_waiting_receive(queue: Queue, network: Network, open_queues: Open) -> None:
    """A parked worker must not keep messages from others."""
    adapter = open_queues(queue)
    adapter.receive(5, 0)
    (poll,) = adapter._polling._polls
    poll.join(60)
    time.sleep(0.2)
    assert len(network.requests["ReceiveMessage"]) == 1


def test_concurrent_polls_increase_when_full_and_decrease_when_empty(
    queue: Queue, network: Network, open_queues: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """AWS charges for every poll."""
    monkeypatch.setattr(polling, "MAX_RECEIVERS", 3)
    queue.publish(*numbered(60))
    adapter = open_queues(queue)
    max_receivers = 0
    got: list[SQSDelivery] = []
    while len(got) < 60:
        got += adapter.receive(1000, 0.5)
        max_receivers = max(max_receivers, adapter._polling._receivers)
    adapter.ack(got)
    assert max_receivers == 3
    deadline = time.monotonic() + 60
    while adapter._polling._receivers > 1 and time.monotonic() < deadline:
        adapter.receive(1000, 0.2)
    deadline = time.monotonic() + 3
    while len(adapter._polling._polls) > 1 and time.monotonic() < deadline:
        adapter.receive(1000, 0.1)
    before = len(network.requests["ReceiveMessage"])
    for _ in range(10):
        adapter.receive(1000, 0.1)
    assert len(network.requests["ReceiveMessage"]) - before <= 2


@pytest.mark.parametrize("refusal", [NO_QUEUE, DENIED, Response(403, "InvalidClientTokenId")])
def test_lasting_refusal_raises_until_it_ends(
    queue: Queue,
    network: Network,
    open_queues: Open,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    refusal: Response,
) -> None:
    """The worker resumes after a permission was granted or the queue was created."""
    monkeypatch.setattr(reconnect, "REFUSAL_TIMEOUT", 0.3)
    monkeypatch.setattr(reconnect, "MIN_BACKOFF", 0.1)
    monkeypatch.setattr(reconnect, "MAX_BACKOFF", 0.2)
    network.always["ReceiveMessage"] = refusal
    adapter = open_queues(queue)
    with pytest.raises(QueueRefusedError, match="QUEUE_URL: SQS refuses to deliver messages: An error occurred"):
        receive(adapter, 1)
    with pytest.raises(QueueRefusedError):
        receive(adapter, 1)
    assert "receive_failed" in [record.message for record in caplog.records]
    del network.always["ReceiveMessage"]
    queue.publish(b"back")
    adapter._polling._refusal = ""
    assert [delivery.body for delivery in receive(adapter, 1)] == [b"back"]
    assert adapter._polling._failures.lasting_refusal() == ""


@pytest.mark.parametrize("failure", [BUSY, BROKEN])
def test_transient_errors_are_retried_indefinitely(
    queue: Queue,
    network: Network,
    open_queues: Open,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    failure: Response,
) -> None:
    """The backoff grows, and a success resets it."""
    monkeypatch.setattr(reconnect, "REFUSAL_TIMEOUT", 0.0)
    monkeypatch.setattr(reconnect, "MIN_BACKOFF", 0.05)
    monkeypatch.setattr(reconnect, "MAX_BACKOFF", 0.1)
    network.responses["ReceiveMessage"].extend([failure] * 3 * aws.BOTO_ATTEMPTS)
    queue.publish(b"x")
    adapter = open_queues(queue)
    assert len(receive(adapter, 1)) == 1
    assert [vars(record)["retry_in_s"] for record in caplog.records] == [0.05, 0.1, 0.1]
    assert adapter._polling._failures._backoff == 0.05


def test_immediate_empty_response_is_followed_by_a_pause(
    queue: Queue, network: Network, open_queues: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A long poll takes seconds. A proxy that answers immediately would be polled a hundred times a second."""
    monkeypatch.setattr(reconnect, "MIN_BACKOFF", 60.0)
    network.responses["ReceiveMessage"].append(ProxyResponse(200, b"<html>Welcome</html>"))
    queue.publish(b"x")
    adapter = open_queues(queue)
    assert receive(adapter, 1, wait=1.0) == []
    assert len(network.requests["ReceiveMessage"]) == 1


def test_check_fails_after_a_failed_poll(
    queue: Queue, network: Network, open_queues: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`run --once` checks an idle queue: one that cannot be read is not empty."""
    monkeypatch.setattr(reconnect, "MIN_BACKOFF", 0.1)
    network.responses["ReceiveMessage"].append(DENIED)
    adapter = open_queues(queue)
    deadline = time.monotonic() + 60
    while not adapter._polling.last_error and time.monotonic() < deadline:
        adapter.receive(1, 0)
    with pytest.raises(QueueError, match=r"QUEUE_URL: cannot receive from SQS: .*AccessDenied"):
        adapter.check()
    queue.publish(b"x")
    adapter.ack(receive(adapter, 1))
    assert adapter.check() == []


def test_receiving_resumes_after_network_failure(
    queue: Queue, network: Network, open_queues: Open, caplog: pytest.LogCaptureFixture
) -> None:
    """Connections were closed during a poll, and refused for a while."""
    adapter = open_queues(queue)
    adapter.receive(1, 0.3)
    network.down()
    assert receive(adapter, 1, wait=1.5) == []  # the interrupted poll ends at the server in the meantime
    queue.publish(b"x")
    network.up()
    assert len(receive(adapter, 1)) == 1
    assert "receive_failed" in [record.message for record in caplog.records]


def test_receiving_continues_after_invalid_response(
    queue: Queue, network: Network, open_queues: Open, caplog: pytest.LogCaptureFixture
) -> None:
    """A proxy can send any response."""
    network.responses["ReceiveMessage"].append(Response(200, Messages=[{"MessageId": "1"}]))
    queue.publish(b"x")
    adapter = open_queues(queue)
    assert len(receive(adapter, 1)) == 1
    assert [vars(record)["error"] for record in caplog.records] == ["KeyError"]


@pytest.mark.parametrize(
    "noise",
    [
        ProxyResponse(200, b"<html>Welcome</html>"),
        ProxyResponse(502, "Gerät".encode("latin-1")),
        ProxyResponse(200, b"[]"),
        ProxyResponse(200, b"null"),
        Response(200, Successful=[{}], Failed=[{}]),
    ],
    ids=["HTML", "no UTF-8", "a list", "null", "entries without id"],
)
def test_invalid_response_is_retried_or_reported(
    queue: Queue, network: Network, open_queues: Open, monkeypatch: pytest.MonkeyPatch, noise: Response
) -> None:
    """Settlement is retried; other calls raise an error that an operator understands."""
    monkeypatch.setattr(aws, "RETRY_TIMEOUT", 0.1)
    monkeypatch.setattr(sqs_settlement, "THREADS", 1)  # moto miscounts concurrent deletions
    queue.publish(*numbered(12))
    adapter = open_queues(queue)
    held = receive(adapter, 12)
    for operation in ("DeleteMessageBatch", "ChangeMessageVisibilityBatch"):
        network.responses[operation].extend([noise] * 2)
    adapter.nack(held[:1], 60.0, FAILURE)
    adapter.ack(held[1:])
    assert queue.count() == 1
    for operation in ("GetQueueUrl", "GetQueueAttributes", "SendMessage", "SendMessageBatch"):
        network.always[operation] = noise
    with pytest.raises(QueueError, match="QUEUE_URL: cannot reach SQS"):
        open_queue(queue.url)
    with pytest.raises(QueueError, match="QUEUE_URL: cannot reach SQS"):
        adapter.check()
    with pytest.raises(QueueError, match="QUEUE_URL: 0 messages were published, then: "):
        adapter.publish([b"x"])
    assert adapter.backlog() == 1


def test_publish_fills_the_queue(queue: Queue, open_queues: Open) -> None:
    """The calls have at most ten messages and one mebibyte."""
    adapter = open_queues(queue)
    assert adapter.publish(iter(numbered(25))) == 25
    assert adapter.publish([b"x" * 400_000] * 5) == 5
    assert adapter.publish([]) == 0
    assert len(queue.pull()) == 30


@pytest.mark.parametrize("body", [b"", b"\xff", b"a\x00", "\ufffe".encode(), b"\x0b"])
def test_publish_rejects_invalid_message(queue: Queue, open_queues: Open, body: bytes) -> None:
    """The error has the number of the message, and how many messages were published before it."""
    with pytest.raises(
        QueueError, match=r"10 messages were published, then: message 12 is invalid: expected UTF-8 text"
    ):
        open_queues(queue).publish([*[b"fine"] * 11, body, b"fine"])
    assert len(queue.pull()) == 10


def test_publish_reports_failed_entries(queue: Queue, network: Network, open_queues: Open) -> None:
    """Each entry of a call has its own result."""
    failed = [{"Id": str(number), "SenderFault": True, "Code": "Strange", "Message": "because"} for number in (1, 2)]
    network.responses["SendMessageBatch"].append(Response(200, Failed=failed, Successful=[{"Id": "0"}]))
    adapter = open_queues(queue)
    with pytest.raises(QueueError, match="1 messages were published, then: SQS did not accept message 2, 3: Strange"):
        adapter.publish([b"a", b"b", b"c"])
    network.responses["SendMessageBatch"].extend([BROKEN, BUSY])
    assert adapter.publish([b"a"]) == 1
    network.responses["SendMessageBatch"].append(DENIED)
    with pytest.raises(QueueError, match=r"0 messages were published, then: An error occurred .AccessDenied"):
        adapter.publish([b"a"])


def test_fifo_queue_can_be_read_only(moto: Server, open_queues: Open) -> None:
    """Its messages need a group, which a line of a file and a dead letter do not have."""
    client = Queue(moto, receives=None).client
    url = client.create_queue(QueueName="orders.fifo", Attributes={"FifoQueue": "true"})["QueueUrl"]
    client.send_message(QueueUrl=url, MessageBody="x", MessageGroupId="g", MessageDeduplicationId="1")
    adapter = open_queue("sqs://orders.fifo")
    assert isinstance(adapter, SQSQueue)
    adapter.ack(receive(adapter, 1))
    with pytest.raises(QueueError, match=r"orders.fifo is a FIFO queue, which `publish` does not support"):
        adapter.publish([b"x"])
    adapter.close()
    direct = open_queue("sqs://orders.fifo", QueueOptions(direct_dead_letter=True))
    with pytest.raises(QueueError, match=r"KLAVIYO_WORKER_DEAD_LETTER_MODE=direct does not support FIFO queues"):
        direct.check()
    direct.close()


def test_both_forms_of_url_are_accepted(moto: Server, queue: Queue) -> None:
    """The two forms are the name with AWS's variables, and the https URL with its region."""
    queue.publish(b"x")
    adapter = open_queue(f"https://sqs.eu-central-1.amazonaws.com/123456789012/{queue.name}")
    assert isinstance(adapter, SQSQueue)
    adapter.ack(receive(adapter, 1))
    adapter.close()
    named = open_queue(f"{queue.url}?region=eu-central-1")
    assert named.check() == []
    named.close()
    with pytest.raises(
        QueueError,
        match=f"QUEUE_URL: {queue.name} in us-east-1 does not exist: create it, or correct its name or region in the ",
    ):
        open_queue(f"{queue.url}?region=us-east-1")


def test_aws_region_is_read(queue: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    """ECS sets AWS_REGION, which boto3 does not read."""
    monkeypatch.delenv("AWS_DEFAULT_REGION")
    with pytest.raises(QueueError, match=r"no AWS region: write sqs://NAME\?region=REGION, or set AWS_DEFAULT_REGION"):
        open_queue(queue.url)
    monkeypatch.setenv("AWS_REGION", "eu-central-1")
    open_queue(queue.url).close()


@pytest.mark.parametrize("url", ["sqs://", "sqs://a/b", "sqs://a?lease=3", "https://example.com/q", "sqs://a:b@c"])
def test_malformed_url_error_has_the_expected_form(url: str) -> None:
    """The exit code is 2; no call is made."""
    with pytest.raises(QueueURLError, match=r"sqs://NAME\[\?region=REGION\] or https://sqs.REGION.amazonaws.com"):
        open_queue(url)


def test_invalid_aws_settings_are_reported(queue: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error is one line, without a traceback of boto3."""
    monkeypatch.setattr(aws, "RETRY_TIMEOUT", 0.1)
    with monkeypatch.context() as patch:
        patch.setenv("AWS_PROFILE", "missing")
        with pytest.raises(QueueError, match="AWS's own settings are invalid: The config profile"):
            open_queue(queue.url)
    with monkeypatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL_SQS", "http://127.0.0.1:1")
        with pytest.raises(QueueError, match=f"cannot reach SQS for {queue.name} in eu-central-1: Could not connect"):
            open_queue(queue.url)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    with pytest.raises(QueueError, match=r"no AWS credentials \(NoCredentialsError\): set AWS_ACCESS_KEY_ID and"):
        open_queue(queue.url)


def test_endpoint_without_tls_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    """Messages contain personal data. An emulator on this machine needs no certificate."""
    monkeypatch.setenv("AWS_ENDPOINT_URL_SQS", "http://sqs.example.com:4566")
    with pytest.raises(QueueError, match=r"AWS_ENDPOINT_URL_SQS: sqs.example.com:4566: expected an https:// URL"):
        open_queue("sqs://orders?region=eu-central-1")


def test_denied_access_is_reported_in_the_words_of_aws(queue: Queue, network: Network) -> None:
    """AWS names the identity and the action."""
    network.responses["GetQueueUrl"].append(DENIED)
    with pytest.raises(
        QueueError,
        match=f"QUEUE_URL: not permitted to use {queue.name} in eu-central-1: .*not authorized to perform that",
    ):
        open_queue(queue.url)


@pytest.mark.parametrize(
    ("code", "text", "expected"),
    [
        ("SignatureDoesNotMatch", "The signature we calculated does not match", "check AWS_SECRET_ACCESS_KEY"),
        (
            "SignatureDoesNotMatch",
            "Signature expired: 20261130T1 is now earlier than",
            "synchronize the clock of this ",
        ),
        ("SignatureDoesNotMatch", "Signature not yet current: 20261130T1 is still later", "synchronize the clock of "),
        ("RequestTimeTooSkewed", "because", "synchronize the clock of this machine"),
        ("InvalidClientTokenId", "The security token is invalid", "check AWS_ACCESS_KEY_ID, and AWS_SESSION_TOKEN if "),
        ("ExpiredToken", "The security token is expired", "renew the temporary credentials"),
    ],
)
def test_refused_signature_is_explained_without_the_token(
    code: str, text: str, expected: str, queue: Queue, network: Network
) -> None:
    """In further lines, AWS quotes the headers of the request."""
    quoted = f"{text}\n\nThe Canonical String is\nx-amz-security-token:s3cret"
    network.responses["GetQueueUrl"].append(Response(403, code, quoted))
    with pytest.raises(QueueError, match=rf"^QUEUE_URL: SQS refuses the \w+ .*: {expected}") as error:
        open_queue(queue.url)
    assert "s3cret" not in str(error.value)
