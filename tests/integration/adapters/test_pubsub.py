"""The Pub/Sub adapter on Google's emulator."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import pytest

from adapters import QueueError, QueueOptions
from adapters.pubsub import queue as pubsub
from adapters.pubsub import streaming_pull
from adapters.shared import reconnect
from tests.integration.conftest import FAILURE, receive
from tests.support.pubsub_emulator import Emulator, Subscription, bodies

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.integration.conftest import Open


@pytest.fixture(autouse=True)
def emulated(emulator: Emulator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PUBSUB_EMULATOR_HOST", emulator.host)


@pytest.fixture
def subscription(emulator: Emulator) -> Subscription:
    return Subscription(emulator)


def test_messages_come_in_batches_and_are_gone_once_acked(subscription: Subscription, opened: Open) -> None:
    """Any bytes, attributes, the attempt, and the time of publishing arrive."""
    sent = [b"\xff\x00 no text", "é".encode(), b"x" * 9_000_000, *(b"%d" % number for number in range(200))]
    subscription.publish(*sent[:2], colour="blue")
    subscription.publish(sent[2])
    subscription.publish(*sent[3:])
    queue = opened(subscription.url, max_bytes=20_000_000)
    assert queue.check() == []
    got = receive(queue, len(sent))
    assert sorted(delivery.body for delivery in got) == sorted(sent)
    by_body = {delivery.body: delivery for delivery in got}
    assert by_body[sent[0]].attributes == {"colour": "blue"}
    assert {delivery.attempt for delivery in got} == {1}
    assert 0 <= time.time() - got[0].published_at.timestamp() < 60
    assert "no text" not in repr(got)
    queue.ack(got)
    queue.close()
    assert subscription.unacked() == []


def test_receive_waits_no_longer_than_asked(subscription: Subscription, opened: Open) -> None:
    """Idle: an empty batch, in time."""
    queue = opened(subscription.url)
    queue.receive(1, 0)
    began = time.monotonic()
    assert queue.receive(10, 0.3) == []
    assert 0.25 < time.monotonic() - began < 3


def test_nacked_messages_come_again_no_sooner_than_asked(emulator: Emulator, opened: Open) -> None:
    """At once, or after the delay; with the attempt counted up; and they are known to be under way."""
    subscription = Subscription(emulator, minimum_backoff=None)
    subscription.publish(b"now", b"later")
    queue = opened(subscription.url)
    queue.check()
    first = {delivery.body: delivery for delivery in receive(queue, 2)}
    assert queue.backlog() is None
    nacked = time.monotonic()
    queue.nack([first[b"later"]], 3.0, FAILURE)
    queue.nack([first[b"now"]])
    assert queue.backlog() == 2
    now, later = receive(queue, 1)[0], receive(queue, 1)[0]
    assert time.monotonic() - nacked > 2.9
    assert [(delivery.body, delivery.attempt) for delivery in (now, later)] == [(b"now", 2), (b"later", 2)]
    assert queue.backlog() is None


def test_a_retry_policy_decides_when_nacked_messages_come_again(subscription: Subscription, opened: Open) -> None:
    """Not the worker: a message whose lease runs would keep others out."""
    subscription.publish(b"x")
    queue = opened(subscription.url)
    assert queue.check() == []
    queue.nack(receive(queue, 1), 600.0, FAILURE)
    (again,) = receive(queue, 1)
    assert again.attempt == 2


def test_the_policy_gives_up_on_poison_while_its_neighbours_pass(
    subscription: Subscription, opened: Open, caplog: pytest.LogCaptureFixture
) -> None:
    """`dead_letter` says when the message really is one; nothing waits for it any more."""
    subscription.publish(b"poison", b"good")
    queue = opened(subscription.url)
    queue.check()
    endings: list[tuple[int | None, bool]] = []
    while not (endings and endings[-1][1]):
        for delivery in receive(queue, 1):
            if delivery.body == b"good":
                queue.ack([delivery])
            else:
                endings.append((delivery.attempt, queue.dead_letter(delivery, FAILURE)))
    assert endings == [(1, False), (2, False), (3, False), (4, False), (5, True)]
    assert bodies(subscription.dead_letters(1)) == [b"poison"]
    assert queue.backlog() is None
    assert "queue_gave_up" in [record.message for record in caplog.records]


def test_direct_dead_letters_carry_their_reason(subscription: Subscription, opened: Open) -> None:
    """Buried at the first attempt, its own attributes kept, whatever their names; values cut to Pub/Sub's limit."""
    subscription.publish(b"poison", topic="mine", retry="é" * 512)
    queue = opened(subscription.url, direct_dead_letter=True)
    queue.check()
    (delivery,) = receive(queue, 1)
    assert queue.dead_letter(delivery, FAILURE)
    (letter,) = subscription.dead_letters(1)
    assert letter.data == b"poison"
    reason = letter.attributes.pop("reason")
    assert FAILURE.reason.startswith(reason)
    assert 1000 < len(reason.encode()) <= 1024
    assert dict(letter.attributes) == {
        "topic": "mine",
        "retry": "é" * 512,
        "stage": "send",
        "error": "Rejected",
        "subscription": subscription.path,
        "message_id": delivery.id,
        "attempt": "1",
    }
    queue.close()
    assert subscription.unacked() == []


def test_a_dead_letter_that_cannot_be_published_is_not_lost(subscription: Subscription, opened: Open) -> None:
    """Without the topic the message comes again."""
    subscription.publish(b"poison")
    queue = opened(subscription.url, direct_dead_letter=True)
    queue.check()
    (delivery,) = receive(queue, 1)
    subscription.publisher.delete_topic(topic=f"projects/demo/topics/{subscription.name}-dead")
    assert not queue.dead_letter(delivery, FAILURE)
    (again,) = receive(queue, 1)
    assert (again.body, again.attempt) == (b"poison", 2)
    queue.ack([again])


def test_poison_without_a_policy_comes_seldom(emulator: Emulator, opened: Open) -> None:
    """Nobody counts attempts, so nothing may spin."""
    subscription = Subscription(emulator, bare=True)
    subscription.publish(b"poison")
    queue = opened(subscription.url)
    (delivery,) = receive(queue, 1)
    assert delivery.attempt is None
    assert not queue.dead_letter(delivery, FAILURE)
    assert receive(queue, 1, wait=2) == []


def test_check_names_what_the_subscription_lacks(emulator: Emulator, opened: Open) -> None:
    """One sentence each, with the command that mends it."""
    bare = Subscription(emulator, bare=True)
    update = {"name": bare.path, "ack_deadline_seconds": 10}
    bare.subscriber.update_subscription(
        request={"subscription": update, "update_mask": {"paths": ["ack_deadline_seconds"]}}
    )
    dead, retry, deadline = opened(bare.url).check()
    assert "no dead-letter policy" in dead.reason
    assert [warning.is_missing_policy for warning in (dead, retry, deadline)] == [True, True, False]
    assert "no retry policy" in retry.reason
    assert "10 s" in deadline.reason
    command = f"gcloud pubsub subscriptions update {bare.path} --"
    assert all(warning.todo.startswith(command) for warning in (dead, retry, deadline))
    with pytest.raises(QueueError, match=r"KLAVIYO_WORKER_DEAD_LETTER_MODE=direct: .* has no dead-letter topic"):
        opened(bare.url, direct_dead_letter=True).check()
    pushed = Subscription(emulator, push="http://127.0.0.1:1/")
    with pytest.raises(QueueError, match="is a push subscription: use push://HOST:PORT"):
        opened(pushed.url).check()
    with pytest.raises(QueueError, match="projects/demo/subscriptions/nowhere does not exist"):
        opened("pubsub://demo/nowhere").check()


def test_stopping_returns_what_was_not_received_and_settles_the_rest(subscription: Subscription, opened: Open) -> None:
    """At once, not when the leases end; acks after the stop count."""
    subscription.publish(*(b"%d" % number for number in range(100)))
    queue = opened(subscription.url, max_messages=50)
    held = receive(queue, 10)
    time.sleep(1)  # more are on their way
    queue.stop()
    queue.ack(held)
    queue.close()
    time.sleep(1)  # nobody pulls: nothing may go to a stream that is no more
    back = subscription.pull(5.0, max_messages=90)
    assert len(held) == 10
    assert sorted(entry.message.data for entry in back) == sorted(
        {b"%d" % number for number in range(100)} - {delivery.body for delivery in held}
    )


def test_a_stream_takes_its_connection_with_it(subscription: Subscription, opened: Open) -> None:
    """Whatever ends it: a worker of many months must not collect connections, nor dead streams messages."""
    queue = opened(subscription.url)
    queue.receive(1, 0.5)
    client = queue._stream._client
    assert client is not None
    queue.stop()
    deadline = time.monotonic() + 15
    with pytest.raises(ValueError, match="closed channel"):  # noqa: PT012 - in the end
        while time.monotonic() < deadline:
            client.get_subscription(subscription=subscription.path)


def test_leases_outlive_the_stream(subscription: Subscription) -> None:
    """The client extends nothing once its stream has ended; held and waiting messages stay ours all the same."""
    queue = pubsub.PubSubQueue(subscription.path, QueueOptions(), lease_seconds=10)
    subscription.publish(b"held")
    held = receive(queue, 1)
    subscription.publish(b"waiting")
    deadline = time.monotonic() + 10
    while not queue._stream.pending() and time.monotonic() < deadline:
        time.sleep(0.05)
    queue._stream._close()
    for _ in range(4):
        queue.extend(held, 10)
        assert subscription.pull(3.0) == []
    queue.ack([*held, *receive(queue, 1)])
    queue.close()
    assert subscription.unacked() == []


def test_a_stream_that_hangs_is_opened_anew(
    subscription: Subscription, opened: Open, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A defect in the client's consumer thread leaves a stream that runs for ever and brings nothing."""
    from google.cloud.pubsub_v1.subscriber._protocol.streaming_pull_manager import StreamingPullManager

    original = StreamingPullManager._on_response
    seen: list[object] = []

    def broken_once(self: Any, response: Any) -> None:
        seen.append(response)
        if len(seen) == 1:
            raise RuntimeError("zombie")
        original(self, response)

    monkeypatch.setattr(StreamingPullManager, "_on_response", broken_once)
    queue = opened(subscription.url)
    queue.receive(1, 0)
    subscription.publish(b"lost on a dead stream")
    deadline = time.monotonic() + 10
    while not seen and time.monotonic() < deadline:
        time.sleep(0.05)
    with monkeypatch.context() as impatient, caplog.at_level("INFO"):
        impatient.setattr(streaming_pull, "IDLE_TIMEOUT", 0.5)
        assert receive(queue, 1, wait=1) == []
    assert "receiver_restarted" in [record.message for record in caplog.records]
    deadline = time.monotonic() + 20
    while not (got := receive(queue, 1, wait=1)) and time.monotonic() < deadline:
        subscription.publish(b"news")  # the emulator gives some to streams that were closed a moment ago
    assert got[0].body == b"news"


def test_a_subscription_that_is_gone_for_a_while_is_waited_for(
    subscription: Subscription, opened: Open, caplog: pytest.LogCaptureFixture
) -> None:
    """Somebody makes it anew: the worker goes on by itself."""
    queue = opened(subscription.url)
    queue.receive(1, 0.5)
    subscription.subscriber.delete_subscription(subscription=subscription.path)
    assert receive(queue, 1, wait=3) == []
    topic = f"projects/demo/topics/{subscription.name}"
    subscription.subscriber.create_subscription(name=subscription.path, topic=topic)
    subscription.publish(b"back")
    assert [delivery.body for delivery in receive(queue, 1, wait=30)] == [b"back"]
    assert "receive_failed" in [record.message for record in caplog.records]


def test_a_subscription_that_stays_away_ends_the_run(
    subscription: Subscription, opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit code 3, and the supervisor tries again."""
    monkeypatch.setattr(reconnect, "REFUSAL_TIMEOUT", 1.0)
    queue = opened("pubsub://demo/nowhere")
    with pytest.raises(QueueError, match="Pub/Sub refuses the subscription: 404"):
        receive(queue, 1, wait=30)


def test_publish_fills_the_topic(subscription: Subscription, opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    """In calls that Pub/Sub takes; what it does not take is an error that says how far it came."""
    monkeypatch.setattr(pubsub, "MAX_BATCH", 100)
    queue = opened(subscription.url)
    assert queue.publish(b"%d" % number for number in range(250)) == 250
    assert queue.publish([b"x" * 4_000_000] * 3) == 3
    assert len(subscription.pull(5.0)) == 253
    with pytest.raises(QueueError, match="100 messages were published, then: message 102 is empty"):
        queue.publish([*[b"fine"] * 101, b""])

    def until_the_topic_is_gone() -> Iterator[bytes]:
        yield from [b"fine"] * 101  # the first call is made when the second one's first message comes
        subscription.publisher.delete_topic(topic=f"projects/demo/topics/{subscription.name}")

    with pytest.raises(QueueError, match="100 messages were published, then: 404"):
        queue.publish(until_the_topic_is_gone())
