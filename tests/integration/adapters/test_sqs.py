"""The SQS adapter on moto, and behind a relay that answers as moto cannot."""

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
    """All calls of queues opened from now on go by a relay."""
    relay = Network(moto)
    monkeypatch.setenv("AWS_ENDPOINT_URL_SQS", f"http://127.0.0.1:{relay.port}")
    yield relay
    relay.down()


@pytest.fixture
def opened() -> Iterator[Open]:
    """Open queues, with polls that end soon, as closing waits for them; closed in the end."""
    queues: list[SQSQueue] = []

    def open_(queue: Queue, lease_seconds: float = 60.0, **options: Any) -> SQSQueue:
        client = aws.connect()
        queues.append(
            SQSQueue(client, queue.queue_url, QueueOptions(**options), lease_seconds=lease_seconds, poll_seconds=1)
        )
        return queues[-1]

    yield open_
    for queue in queues:
        queue.close()


def receive(queue: SQSQueue, number: int, wait: float = 15.0) -> list[SQSDelivery]:
    """Receive so many messages, or what came in time."""
    deadline = time.monotonic() + wait
    got: list[SQSDelivery] = []
    while len(got) < number and time.monotonic() < deadline:
        got += queue.receive(number - len(got), 0.2)
    return got


def numbered(number: int) -> list[bytes]:
    return [b"%d" % index for index in range(number)]


def logged(caplog: pytest.LogCaptureFixture, *names: str) -> list[tuple[str, Any]]:
    """Return what was logged: its name, and how many messages it was about."""
    records = [(record.message, vars(record).get("messages")) for record in caplog.records]
    return [record for record in records if not names or record[0] in names]


def test_attributes_arrive_and_receipts_are_not_shown(queue: Queue, opened: Open) -> None:
    """Who reads a log must not be able to delete messages."""
    queue.publish("é \U0001f600".encode(), colour="blue", number="7")
    ours = opened(queue)
    (delivery,) = receive(ours, 1)
    assert (delivery.body, delivery.attributes) == ("é \U0001f600".encode(), {"colour": "blue", "number": "7"})
    assert delivery.receipt not in repr(delivery)


def test_what_is_sent_back_counts_when_sqs_does_not_see_it(queue: Queue, network: Network, opened: Open) -> None:
    """Its counts are approximate, and may be forbidden: an empty queue is never told from them."""
    queue.publish(b"x")
    ours = opened(queue)
    held = receive(ours, 1)
    network.always["GetQueueAttributes"] = DENIED
    assert ours.backlog() is None
    ours.nack(held, 5.0, FAILURE)
    network.always["GetQueueAttributes"] = BROKEN
    assert ours.backlog() == 1


def test_leases_are_extended_of_what_is_held_and_of_what_waits(queue: Queue, opened: Open) -> None:
    """Past the time they were received for, which is ours to say, not the queue's."""
    queue.set_attributes(VisibilityTimeout="0")
    queue.publish(b"held", b"waiting")
    ours = opened(queue, lease_seconds=2.0)
    held = receive(ours, 1)
    ours.receive(1, 0)  # what its poll brings waits
    deadline = time.monotonic() + 10
    while not ours._polling.pending() and time.monotonic() < deadline:
        time.sleep(0.01)
    for _ in range(4):
        ours.extend(held, 2.0)
        time.sleep(0.8)
        assert queue.pull() == []
    ours.ack([*held, *receive(ours, 1)])
    assert queue.count() == 0


def test_what_waited_longer_than_its_lease_is_not_handed_out(queue: Queue, network: Network, opened: Open) -> None:
    """A parked worker leaves it in the inbox, and SQS may not be told to extend it: it comes again by itself."""
    network.always["ChangeMessageVisibilityBatch"] = DENIED
    queue.publish(b"a")
    ours = opened(queue, lease_seconds=1.0)
    ours.receive(1, 0)  # what its poll brings waits
    deadline = time.monotonic() + 10
    while not ours._polling.pending() and time.monotonic() < deadline:
        time.sleep(0.01)
    with pytest.raises(QueueError, match="leases"):
        ours.extend([], 1.0)
    time.sleep(1.1)
    (again,) = receive(ours, 1)
    assert again.attempt == 2
    assert ours._polling._expected == 0
    ours.ack([again])


def test_a_lease_that_ended_is_no_error(queue: Queue, opened: Open, caplog: pytest.LogCaptureFixture) -> None:
    """The message came again by then; the first holder's acks and nacks change nothing for the second."""
    queue.publish(b"x")
    ours = opened(queue, lease_seconds=1.0)
    late = receive(ours, 1)
    (again,) = receive(ours, 1)
    assert again.attempt == 2
    queue.client.delete_message(QueueUrl=queue.queue_url, ReceiptHandle=again.receipt)
    ours.nack(late, 0.0, FAILURE)
    ours.extend(late, 60)
    ours.ack(late)
    assert logged(caplog) == [("lease_lost", 1), ("lease_lost", 1)]  # of a nack and an extension; acks are not told
    assert receive(ours, 1, wait=0.5) == []


def test_no_lease_is_asked_for_that_sqs_does_not_grant(queue: Queue, network: Network, opened: Open) -> None:
    """Twelve hours from the receipt at the most; then the message comes again, and the worker knows that it may."""
    queue.publish(b"x")
    ours = opened(queue)
    (held,) = receive(ours, 1)
    old = replace(held, received_at=held.received_at - sqs_settlement.MAX_HOLD + 30)
    with pytest.raises(QueueError, match="twelve hours"):
        ours.extend([old], 60.0)
    ours.nack([old], 600.0, FAILURE)
    ours.nack([replace(held, received_at=held.received_at - 13 * 3600)], 600.0, FAILURE)
    told = [request["Entries"][0]["VisibilityTimeout"] for request in network.requests["ChangeMessageVisibilityBatch"]]
    assert [29 <= told[0] <= 30, 29 <= told[1] <= 30, told[2]] == [True, True, 0]
    before = len(network.requests["ChangeMessageVisibilityBatch"])
    with pytest.raises(QueueError, match="twelve hours"):
        ours.extend([replace(held, received_at=held.received_at - 13 * 3600)], 60.0)
    assert len(network.requests["ChangeMessageVisibilityBatch"]) == before


def test_a_delay_is_never_cut(queue: Queue, network: Network, opened: Open) -> None:
    """SQS takes whole seconds; a message comes again no sooner than asked."""
    queue.publish(b"x")
    ours = opened(queue)
    ours.nack(receive(ours, 1), 0.4, FAILURE)
    (request,) = network.requests["ChangeMessageVisibilityBatch"]
    assert request["Entries"][0]["VisibilityTimeout"] == 1


def test_entries_that_fail_are_told_again_one_by_one(
    queue: Queue, network: Network, opened: Open, caplog: pytest.LogCaptureFixture
) -> None:
    """Those whose fault is SQS's; a lease that ended is counted, and one that is refused is said to be."""
    queue.publish(*numbered(6))
    ours = opened(queue)
    held = receive(ours, 6)
    failed = [
        {"Id": "0", "SenderFault": False, "Code": "InternalError", "Message": "try again"},
        {"Id": "1", "SenderFault": True, "Code": "ReceiptHandleIsInvalid"},
        {"Id": "2", "SenderFault": True, "Code": "Strange", "Message": "because"},
        {"Id": "4", "SenderFault": True, "Code": "RequestThrottled"},
        {"Id": "5", "SenderFault": False, "Code": "ReceiptHandleIsInvalid"},
    ]
    network.responses["DeleteMessageBatch"].append(Response(200, Failed=failed, Successful=[{"Id": "3"}]))
    ours.ack(held)
    first, second = ([e["ReceiptHandle"] for e in r["Entries"]] for r in network.requests["DeleteMessageBatch"])
    assert first == [delivery.receipt for delivery in held]
    assert second == [held[0].receipt, held[4].receipt]
    assert logged(caplog) == [("lease_lost", 2), ("settlement_failed", 1)]
    assert vars(caplog.records[1])["reason"] == "Strange: because"


def test_many_are_settled_in_calls_of_ten(
    queue: Queue, network: Network, opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each entry has a name of its own; all of them go."""
    monkeypatch.setattr(sqs_settlement, "THREADS", 1)  # moto loses count of what is deleted side by side
    ours = opened(queue)
    queue.publish(*numbered(25))
    held = receive(ours, 25)
    ours.ack(held)
    entries = [request["Entries"] for request in network.requests["DeleteMessageBatch"]]
    assert sorted(len(some) for some in entries) == [5, 10, 10]
    assert len({entry["Id"] for some in entries for entry in some}) == 25
    assert queue.count() == 0


@pytest.mark.parametrize("trouble", [BUSY, BROKEN, Response(200)], ids=["throttled", "5xx", "nothing said"])
def test_acks_insist(
    queue: Queue, network: Network, opened: Open, monkeypatch: pytest.MonkeyPatch, trouble: Response
) -> None:
    """A message whose ack is lost comes twice; a nack that is lost costs a lease at most."""
    monkeypatch.setattr(sqs_settlement, "NACK_TIMEOUT", 0.0)
    queue.publish(b"a")
    ours = opened(queue)
    held = receive(ours, 1)
    network.responses["DeleteMessageBatch"].extend([trouble] * 3)
    ours.ack(held)
    assert len(network.requests["DeleteMessageBatch"]) == 4
    assert queue.count() == 0


def test_an_ack_that_is_refused_is_told_and_no_error(
    queue: Queue, network: Network, opened: Open, caplog: pytest.LogCaptureFixture
) -> None:
    """The messages come again; nothing else stops."""
    queue.publish(b"a")
    ours = opened(queue)
    held = receive(ours, 1)
    network.always["DeleteMessageBatch"] = DENIED
    ours.ack(held)
    assert len(network.requests["DeleteMessageBatch"]) == 1
    assert logged(caplog) == [("settlement_failed", 1)]


def test_a_longer_outage_ends_the_insisting(
    queue: Queue,
    network: Network,
    opened: Open,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By then the messages have been given to somebody else. One call that finds nobody speaks for the others."""
    monkeypatch.setattr(sqs_settlement, "ACK_TIMEOUT", 0.3)
    monkeypatch.setattr(sqs_settlement, "THREADS", 1)
    queue.publish(b"a")
    ours = opened(queue)
    (held,) = receive(ours, 1)
    network.always["DeleteMessageBatch"] = BROKEN
    ours.ack([held] * 500)
    assert len(network.requests["DeleteMessageBatch"]) < 50
    assert logged(caplog) == [("settlement_failed", 500)]


@pytest.mark.parametrize("number", [1, 30])
def test_closing_ends_the_insisting(queue: Queue, network: Network, opened: Open, number: int) -> None:
    """What the grace period did not suffice for is not waited for any more."""
    queue.publish(b"a")
    ours = opened(queue)
    (held,) = receive(ours, 1)
    network.always["DeleteMessageBatch"] = BROKEN
    acking = threading.Thread(target=ours.ack, args=([held] * number,))
    acking.start()
    deadline = time.monotonic() + 10
    while not network.requests["DeleteMessageBatch"] and time.monotonic() < deadline:
        time.sleep(0.01)
    ours.close()
    acking.join(10)
    assert not acking.is_alive()
    ours.ack([held] * number)  # a lane that is still at it hears nothing worse than that it failed


def test_an_extension_is_tried_once(
    queue: Queue, network: Network, opened: Open, caplog: pytest.LogCaptureFixture
) -> None:
    """One that insists could overtake a nack. That it failed is said: the messages may not be ours any more."""
    queue.publish(b"a")
    ours = opened(queue)
    held = receive(ours, 1)
    ours.extend(held, 60)
    network.always["ChangeMessageVisibilityBatch"] = BROKEN
    with pytest.raises(QueueError, match="leases"):
        ours.extend(held, 61)
    assert len(network.requests["ChangeMessageVisibilityBatch"]) == 1 + aws.ATTEMPTS
    assert [vars(record)["action"] for record in caplog.records] == ["extend"]


def test_an_extension_leaves_alone_what_is_settled_meanwhile(
    queue: Queue, opened: Open, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes a while for thousands: a nack is not undone, and an ack is no lost lease."""
    monkeypatch.setattr(sqs_settlement, "THREADS", 1)  # a call after the other
    queue.publish(*numbered(20))
    ours = opened(queue)
    held = receive(ours, 20)
    change = ours._client.change_message_visibility_batch

    def settle_meanwhile(**asked: Any) -> Any:
        monkeypatch.setattr(ours._client, "change_message_visibility_batch", change)
        ours.ack([held[0], held[15]])
        ours.nack([held[16]], 0.0, FAILURE)
        return change(**asked)

    monkeypatch.setattr(ours._client, "change_message_visibility_batch", settle_meanwhile)
    ours.extend(held, 60.0)
    assert logged(caplog) == []
    assert [delivery.body for delivery in receive(ours, 1)] == [held[16].body]


def test_what_the_queue_gives_up_on_is_logged_with_its_last_reason(
    moto: Server, opened: Open, caplog: pytest.LogCaptureFixture
) -> None:
    """The dead letter itself tells none. Nothing is waited for any more."""
    queue = Queue(moto, receives=2)
    queue.publish(b"poison")
    ours = opened(queue)
    ours.check()
    ours.nack(receive(ours, 1), 0.0, FAILURE)
    assert len(ours._expected_redeliveries) == 1
    ours.nack(receive(ours, 1), 0.0, FAILURE)
    assert len(ours._expected_redeliveries) == 0
    assert [(record.message, vars(record)["reason"]) for record in caplog.records] == [
        ("queue_gave_up", FAILURE.reason)
    ]
    assert receive(ours, 1, wait=0.5) == []
    assert bodies(queue.dead_letters(1)) == [b"poison"]
    assert ours.backlog() is None


def test_poison_without_a_policy_comes_seldom(moto: Server, opened: Open) -> None:
    """Nobody counts, so nothing may spin. Where the policy is not known there may be one, which has to be reached."""
    queue = Queue(moto, receives=None)
    queue.publish(b"poison")
    ours = opened(queue)
    (delivery,) = receive(ours, 1)
    assert not ours.dead_letter(delivery, FAILURE)
    (delivery,) = receive(ours, 1)
    ours.check()
    assert not ours.dead_letter(delivery, FAILURE)
    assert receive(ours, 1, wait=1) == []


def test_poison_does_not_spin_where_the_policy_is_not_known(queue: Queue, network: Network, opened: Open) -> None:
    """There may be none, and every turn is paid for."""
    queue.publish(b"poison")
    ours = opened(queue)
    (delivery,) = receive(ours, 1)
    for attempt in (1, 5, 10_000):
        assert not ours.dead_letter(replace(delivery, attempt=attempt), FAILURE)
    told = [request["Entries"][0]["VisibilityTimeout"] for request in network.requests["ChangeMessageVisibilityBatch"]]
    assert told == [2, 32, 3600]


def test_direct_dead_letters_carry_their_reason(queue: Queue, opened: Open) -> None:
    """Buried at the first attempt; its own attributes are kept as far as ten go."""
    queue.publish(b"poison", reason="theirs", **{f"own{number}": "é" for number in range(9)})
    ours = opened(queue, direct_dead_letter=True)
    assert ours.check() == []
    (delivery,) = receive(ours, 1)
    failure = Failure("Klaviyo said \x00 " + "é" * 2000, "send", "Rejected", "OrderCreated", "order", "")
    assert ours.dead_letter(delivery, failure)
    (letter,) = queue.dead_letters(1)
    told = {name: value["StringValue"] for name, value in letter["MessageAttributes"].items()}
    reason = told.pop("reason")
    assert reason.startswith("Klaviyo said \N{REPLACEMENT CHARACTER} é")
    assert len(reason.encode()) in {1023, 1024}
    own = {name: told.pop(name) for name in list(told) if name.startswith("own")}
    assert own == dict.fromkeys(("own0", "own1"), "é")
    assert told == {
        "stage": "send",
        "error": "Rejected",
        "message_type": "OrderCreated",
        "resource_type": "order",
        "queue": queue.name,
        "message_id": delivery.id,
        "attempt": "1",
    }
    assert letter["Body"] == "poison"
    assert queue.count() == 0


def test_a_dead_letter_that_cannot_be_sent_is_not_lost(
    queue: Queue, opened: Open, caplog: pytest.LogCaptureFixture
) -> None:
    """Without its queue the message comes again."""
    queue.publish(b"poison")
    ours = opened(queue, direct_dead_letter=True)
    (unknown,) = receive(ours, 1)
    assert not ours.dead_letter(unknown, FAILURE)
    ours.check()
    queue.client.delete_queue(QueueUrl=queue.dead_url)
    (delivery,) = receive(ours, 1)
    assert not ours.dead_letter(delivery, FAILURE)
    (again,) = receive(ours, 1)
    assert again.attempt == 3
    assert logged(caplog, "dead_letter_failed") == [("dead_letter_failed", None)]
    ours.ack([again])


def test_check_names_what_the_queue_lacks(moto: Server, opened: Open) -> None:
    """One sentence each, with the command that mends it."""
    bare = Queue(moto, receives=None)
    (policy,) = opened(bare).check()
    assert f"aws sqs set-queue-attributes --queue-url {bare.queue_url} --attributes" in policy.todo
    assert "no redrive policy" in policy.reason
    assert policy.is_missing_policy
    with pytest.raises(QueueError, match=r"KLAVIYO_WORKER_DEAD_LETTER_MODE=direct: .* has no dead-letter queue"):
        opened(bare, direct_dead_letter=True).check()
    few = Queue(moto, receives=4)
    few.client.delete_queue(QueueUrl=few.dead_url)
    dead, receives = opened(few).check()
    assert str(dead) == f"the dead-letter queue: {few.name}-dead does not exist: create it, or correct name or region"
    assert "after 4 receives" in receives.reason
    assert (dead.is_missing_policy, receives.is_missing_policy) == (True, False)
    with pytest.raises(QueueError, match=f"KLAVIYO_WORKER_DEAD_LETTER_MODE=direct: .* {few.name}-dead does not exist"):
        opened(few, direct_dead_letter=True).check()
    few.client.delete_queue(QueueUrl=few.queue_url)
    with pytest.raises(QueueError, match=f"QUEUE_URL: {few.name} does not exist: create it"):
        opened(few).check()


def test_who_may_not_read_the_queue_is_warned_and_works(
    moto: Server, network: Network, opened: Open, caplog: pytest.LogCaptureFixture
) -> None:
    """The policy is unknown, which only direct dead letters cannot do without."""
    network.always["GetQueueAttributes"] = DENIED
    queue = Queue(moto)
    (warning,) = opened(queue).check()
    assert warning.todo == "grant sqs:GetQueueAttributes on it"
    with pytest.raises(
        QueueError, match=r"KLAVIYO_WORKER_DEAD_LETTER_MODE=direct: .* grant sqs:GetQueueAttributes on it"
    ):
        opened(queue, direct_dead_letter=True).check()
    assert opened(queue).counts() == (None, None)


def test_both_queues_are_counted_as_far_as_permitted(queue: Queue, network: Network, opened: Open) -> None:
    """That one may not be read does not hide the other."""
    queue.publish(b"a", b"b")
    queue.client.send_message(QueueUrl=queue.dead_url, MessageBody="dead")
    ours = opened(queue)
    assert ours.counts() == (2, None)  # nobody looked for its dead-letter queue yet
    ours = opened(queue)
    ours.check()
    assert ours.counts() == (2, 1)
    network.responses["GetQueueAttributes"].append(DENIED)
    assert ours.counts() == (2, None)
    network.down()
    with pytest.raises(QueueError, match=f"QUEUE_URL: cannot reach SQS for {queue.name}: "):
        ours.counts()


def test_what_a_poll_still_brings_after_the_stop_goes_back_at_once(queue: Queue, opened: Open) -> None:
    """It cannot be called off; the next worker has the message long before a lease ends."""
    ours = opened(queue)
    ours.receive(1, 0)
    queue.publish(b"x")
    ours.stop()
    (again,) = receive(opened(queue), 1)
    assert again.attempt == 2


def test_polls_that_do_not_end_are_not_waited_for_twice(
    queue: Queue, opened: Open, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What they bring comes again by itself."""
    monkeypatch.setattr(polling, "STOP_TIMEOUT", -0.9)
    ours = opened(queue)
    ours.receive(1, 0)
    ours.stop()
    ours.stop()
    assert logged(caplog) == [("polls_not_ended", None)]


def test_no_more_is_asked_for_than_there_is_room(queue: Queue, network: Network, opened: Open) -> None:
    """What is in the inbox is out of reach for others."""
    queue.publish(*numbered(40))
    ours = opened(queue)
    got = receive(ours, 23)
    assert len(got) == 23
    handed_out = sum(request["MaxNumberOfMessages"] for request in network.requests["ReceiveMessage"])
    assert handed_out == 23
    assert {request["VisibilityTimeout"] for request in network.requests["ReceiveMessage"]} == {60}


def test_nothing_is_asked_for_while_nobody_waits(queue: Queue, network: Network, opened: Open) -> None:
    """A parked worker must not keep messages from others: a poll that ends has no successor."""
    ours = opened(queue)
    ours.receive(5, 0)
    (poll,) = ours._polling._polls
    poll.join(10)
    time.sleep(0.2)
    assert len(network.requests["ReceiveMessage"]) == 1


def test_polls_grow_while_they_come_back_full_and_shrink_when_one_is_empty(
    queue: Queue, network: Network, opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every poll is paid for."""
    monkeypatch.setattr(polling, "MAX_RECEIVERS", 3)
    queue.publish(*numbered(60))
    ours = opened(queue)
    most = 0
    got: list[SQSDelivery] = []
    while len(got) < 60:
        got += ours.receive(1000, 0.5)
        most = max(most, ours._polling._receivers)
    ours.ack(got)
    assert most == 3
    deadline = time.monotonic() + 10
    while ours._polling._receivers > 1 and time.monotonic() < deadline:
        ours.receive(1000, 0.2)
    deadline = time.monotonic() + 3
    while len(ours._polling._polls) > 1 and time.monotonic() < deadline:
        ours.receive(1000, 0.1)
    before = len(network.requests["ReceiveMessage"])
    for _ in range(10):
        ours.receive(1000, 0.1)
    assert len(network.requests["ReceiveMessage"]) - before <= 2


@pytest.mark.parametrize("refusal", [NO_QUEUE, DENIED, Response(403, "InvalidClientTokenId")])
def test_a_refusal_that_lasts_is_told_and_may_end(
    queue: Queue,
    network: Network,
    opened: Open,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    refusal: Response,
) -> None:
    """Somebody grants it, or makes the queue anew: the worker goes on by itself."""
    monkeypatch.setattr(reconnect, "REFUSAL_TIMEOUT", 0.3)
    monkeypatch.setattr(reconnect, "MIN_BACKOFF", 0.1)
    monkeypatch.setattr(reconnect, "MAX_BACKOFF", 0.2)
    network.always["ReceiveMessage"] = refusal
    ours = opened(queue)
    with pytest.raises(QueueRefusedError, match="QUEUE_URL: SQS refuses to deliver messages: An error occurred"):
        receive(ours, 1)
    with pytest.raises(QueueRefusedError):
        receive(ours, 1)
    assert "receive_failed" in [record.message for record in caplog.records]
    del network.always["ReceiveMessage"]
    queue.publish(b"back")
    ours._polling._refusal = ""
    assert [delivery.body for delivery in receive(ours, 1)] == [b"back"]
    assert ours._polling._failures.lasting_refusal() == ""


@pytest.mark.parametrize("trouble", [BUSY, BROKEN])
def test_other_trouble_is_outlasted_without_end(
    queue: Queue,
    network: Network,
    opened: Open,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    trouble: Response,
) -> None:
    """Throttled or broken, SQS will be back; tries become rarer, and a success forgets that."""
    monkeypatch.setattr(reconnect, "REFUSAL_TIMEOUT", 0.0)
    monkeypatch.setattr(reconnect, "MIN_BACKOFF", 0.05)
    monkeypatch.setattr(reconnect, "MAX_BACKOFF", 0.1)
    network.responses["ReceiveMessage"].extend([trouble] * 3 * aws.ATTEMPTS)
    queue.publish(b"x")
    ours = opened(queue)
    assert len(receive(ours, 1)) == 1
    assert [vars(record)["retry_in_s"] for record in caplog.records] == [0.05, 0.1, 0.1]
    assert ours._polling._failures._backoff == 0.05


def test_an_answer_that_is_empty_at_once_is_not_asked_for_again_at_once(
    queue: Queue, network: Network, opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A long poll takes its time; a proxy that answers in its place would be asked a hundred times a second."""
    monkeypatch.setattr(reconnect, "MIN_BACKOFF", 60.0)
    network.responses["ReceiveMessage"].append(ProxyResponse(200, b"<html>Welcome</html>"))
    queue.publish(b"x")
    ours = opened(queue)
    assert receive(ours, 1, wait=1.0) == []
    assert len(network.requests["ReceiveMessage"]) == 1


def test_a_queue_that_hands_out_nothing_checks_well_only_when_it_is_let(
    queue: Queue, network: Network, opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`run --once` checks a queue that is quiet: one that refuses to be read is not empty."""
    monkeypatch.setattr(reconnect, "MIN_BACKOFF", 0.1)
    network.responses["ReceiveMessage"].append(DENIED)
    ours = opened(queue)
    deadline = time.monotonic() + 10
    while not ours._polling.last_error and time.monotonic() < deadline:
        ours.receive(1, 0)
    with pytest.raises(QueueError, match=r"QUEUE_URL: cannot receive from SQS: .*AccessDenied"):
        ours.check()
    queue.publish(b"x")
    ours.ack(receive(ours, 1))
    assert ours.check() == []


def test_a_network_that_was_down_is_used_again(
    queue: Queue, network: Network, opened: Open, caplog: pytest.LogCaptureFixture
) -> None:
    """Connections cut in the middle of a poll, and refused for a while."""
    ours = opened(queue)
    ours.receive(1, 0.3)
    network.down()
    assert receive(ours, 1, wait=1.5) == []  # the poll that was cut ends at the server meanwhile
    queue.publish(b"x")
    network.up()
    assert len(receive(ours, 1)) == 1
    assert "receive_failed" in [record.message for record in caplog.records]


def test_an_answer_that_is_none_does_not_end_the_receiving(
    queue: Queue, network: Network, opened: Open, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever a proxy says."""
    network.responses["ReceiveMessage"].append(Response(200, Messages=[{"MessageId": "1"}]))
    queue.publish(b"x")
    ours = opened(queue)
    assert len(receive(ours, 1)) == 1
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
def test_an_answer_that_is_none_is_no_reason_to_end(
    queue: Queue, network: Network, opened: Open, monkeypatch: pytest.MonkeyPatch, noise: Response
) -> None:
    """Settling goes on when SQS is back; all else is an error that an operator can read."""
    monkeypatch.setattr(aws, "RETRY_TIMEOUT", 0.1)
    monkeypatch.setattr(sqs_settlement, "THREADS", 1)  # moto loses count of what is deleted side by side
    queue.publish(*numbered(12))
    ours = opened(queue)
    held = receive(ours, 12)
    for operation in ("DeleteMessageBatch", "ChangeMessageVisibilityBatch"):
        network.responses[operation].extend([noise] * 2)
    ours.nack(held[:1], 60.0, FAILURE)
    ours.ack(held[1:])
    assert queue.count() == 1
    for operation in ("GetQueueUrl", "GetQueueAttributes", "SendMessage", "SendMessageBatch"):
        network.always[operation] = noise
    with pytest.raises(QueueError, match="QUEUE_URL: cannot reach SQS"):
        open_queue(queue.url)
    with pytest.raises(QueueError, match="QUEUE_URL: cannot reach SQS"):
        ours.check()
    with pytest.raises(QueueError, match="QUEUE_URL: 0 messages were published, then: "):
        ours.publish([b"x"])
    assert ours.backlog() == 1


def test_publish_fills_the_queue(queue: Queue, opened: Open) -> None:
    """In calls that SQS takes: ten messages, a mebibyte."""
    ours = opened(queue)
    assert ours.publish(iter(numbered(25))) == 25
    assert ours.publish([b"x" * 400_000] * 5) == 5
    assert ours.publish([]) == 0
    assert len(queue.pull()) == 30


@pytest.mark.parametrize("body", [b"", b"\xff", b"a\x00", "\ufffe".encode(), b"\x0b"])
def test_publish_names_the_message_that_sqs_does_not_take(queue: Queue, opened: Open, body: bytes) -> None:
    """Its number, and how many went in before."""
    with pytest.raises(
        QueueError, match=r"10 messages were published, then: message 12 is invalid: expected UTF-8 text"
    ):
        opened(queue).publish([*[b"fine"] * 11, body, b"fine"])
    assert len(queue.pull()) == 10


def test_publish_tells_what_sqs_did_not_take(queue: Queue, network: Network, opened: Open) -> None:
    """Each entry of a call has a fate of its own."""
    failed = [{"Id": str(number), "SenderFault": True, "Code": "Strange", "Message": "because"} for number in (1, 2)]
    network.responses["SendMessageBatch"].append(Response(200, Failed=failed, Successful=[{"Id": "0"}]))
    ours = opened(queue)
    with pytest.raises(QueueError, match="1 messages were published, then: SQS did not accept message 2, 3: Strange"):
        ours.publish([b"a", b"b", b"c"])
    network.responses["SendMessageBatch"].extend([BROKEN, BUSY])
    assert ours.publish([b"a"]) == 1
    network.responses["SendMessageBatch"].append(DENIED)
    with pytest.raises(QueueError, match=r"0 messages were published, then: An error occurred .AccessDenied"):
        ours.publish([b"a"])


def test_fifo_queues_are_read_and_not_written(moto: Server, opened: Open) -> None:
    """Their messages need groups, which neither a line of a file nor a dead letter has."""
    client = Queue(moto, receives=None).client
    url = client.create_queue(QueueName="orders.fifo", Attributes={"FifoQueue": "true"})["QueueUrl"]
    client.send_message(QueueUrl=url, MessageBody="x", MessageGroupId="g", MessageDeduplicationId="1")
    ours = open_queue("sqs://orders.fifo")
    assert isinstance(ours, SQSQueue)
    ours.ack(receive(ours, 1))
    with pytest.raises(QueueError, match=r"orders.fifo is a FIFO queue, which `publish` does not support"):
        ours.publish([b"x"])
    ours.close()
    direct = open_queue("sqs://orders.fifo", QueueOptions(direct_dead_letter=True))
    with pytest.raises(QueueError, match=r"KLAVIYO_WORKER_DEAD_LETTER_MODE=direct does not support FIFO queues"):
        direct.check()
    direct.close()


def test_both_forms_of_url_name_the_queue(moto: Server, queue: Queue) -> None:
    """By name, wherever AWS's variables lead; by the URL that AWS shows, in its region."""
    queue.publish(b"x")
    ours = open_queue(f"https://sqs.eu-central-1.amazonaws.com/123456789012/{queue.name}")
    assert isinstance(ours, SQSQueue)
    ours.ack(receive(ours, 1))
    ours.close()
    named = open_queue(f"{queue.url}?region=eu-central-1")
    assert named.check() == []
    named.close()
    with pytest.raises(QueueError, match=f"QUEUE_URL: {queue.name} does not exist: create it, or correct name or reg"):
        open_queue(f"{queue.url}?region=us-east-1")


def test_the_region_of_a_container_is_used(queue: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    """ECS sets AWS_REGION, which boto3 does not read."""
    monkeypatch.delenv("AWS_DEFAULT_REGION")
    with pytest.raises(QueueError, match=r"no AWS region: write sqs://NAME\?region=REGION, or set AWS_DEFAULT_REGION"):
        open_queue(queue.url)
    monkeypatch.setenv("AWS_REGION", "eu-central-1")
    open_queue(queue.url).close()


@pytest.mark.parametrize("url", ["sqs://", "sqs://a/b", "sqs://a?lease=3", "https://example.com/q", "sqs://a:b@c"])
def test_a_malformed_url_says_what_was_expected(url: str) -> None:
    """Exit code 2, not a call that fails later."""
    with pytest.raises(QueueURLError, match=r"sqs://NAME\[\?region=REGION\] or https://sqs.REGION.amazonaws.com"):
        open_queue(url)


def test_what_boto3_lacks_is_named(queue: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    """No traceback from its depths."""
    monkeypatch.setattr(aws, "RETRY_TIMEOUT", 0.1)
    with monkeypatch.context() as changed:
        changed.setenv("AWS_PROFILE", "nobody")
        with pytest.raises(QueueError, match="AWS's own settings are invalid: The config profile"):
            open_queue(queue.url)
    with monkeypatch.context() as changed:
        changed.setenv("AWS_ENDPOINT_URL_SQS", "http://127.0.0.1:1")
        with pytest.raises(QueueError, match=f"cannot reach SQS for {queue.name}: Could not connect"):
            open_queue(queue.url)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    with pytest.raises(QueueError, match=r"no AWS credentials \(NoCredentialsError\): set AWS_ACCESS_KEY_ID and"):
        open_queue(queue.url)


def test_messages_cross_no_network_unencrypted(monkeypatch: pytest.MonkeyPatch) -> None:
    """They hold what belongs to people. A stand-in on this machine needs no certificate."""
    monkeypatch.setenv("AWS_ENDPOINT_URL_SQS", "http://sqs.example.com:4566")
    with pytest.raises(QueueError, match=r"AWS_ENDPOINT_URL_SQS: sqs.example.com:4566: expected an https:// URL"):
        open_queue("sqs://orders?region=eu-central-1")


def test_who_may_not_ask_for_the_queue_is_told_what_aws_says(queue: Queue, network: Network) -> None:
    """It names who asked and for what."""
    network.responses["GetQueueUrl"].append(DENIED)
    with pytest.raises(QueueError, match=f"QUEUE_URL: not permitted on {queue.name}: .*not authorized to perform that"):
        open_queue(queue.url)


def test_a_refused_signature_shows_no_token(queue: Queue, network: Network) -> None:
    """AWS answers with the headers it was given, in further lines."""
    said = "The signature does not match.\n\nThe Canonical String is\nx-amz-security-token:SECRET"
    network.responses["GetQueueUrl"].append(Response(403, "SignatureDoesNotMatch", said))
    with pytest.raises(QueueError, match="SQS refuses") as error:
        open_queue(queue.url)
    assert "does not match" in str(error.value)
    assert "SECRET" not in str(error.value)
