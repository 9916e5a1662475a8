"""The Pub/Sub adapter on Google's emulator."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import pytest

from adapters import QueueError, QueueOptions
from adapters.pubsub import queue as pubsub
from adapters.pubsub import streaming_pull
from adapters.shared import reconnect
from tests.integration.conftest import FAILURE
from tests.support.pubsub_emulator import Emulator, Subscription, bodies
from tests.support.waiting import receive, wait_for

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.integration.conftest import Open


pytestmark = pytest.mark.usefixtures("emulated")


def test_messages_arrive_unchanged_and_are_removed_by_ack(subscription: Subscription, opened: Open) -> None:
    """The body can be any bytes. Attributes, attempt and time of publishing arrive."""
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


def test_receive_waits_as_long_as_requested(subscription: Subscription, opened: Open) -> None:
    """`receive` returns [] in time if the queue is empty."""
    queue = opened(subscription.url)
    queue.receive(1, 0)
    started_at = time.monotonic()
    assert queue.receive(10, 0.3) == []
    assert 0.25 < time.monotonic() - started_at < 3


def test_nacked_message_is_redelivered_after_its_delay(emulator: Emulator, opened: Open) -> None:
    """The delay can be 0. The attempt number increases. Until the redelivery, the backlog counts the message."""
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


def test_retry_policy_replaces_the_delay(subscription: Subscription, opened: Open) -> None:
    """Messages that stay leased would prevent the delivery of new ones."""
    subscription.publish(b"x")
    queue = opened(subscription.url)
    assert queue.check() == []
    queue.nack(receive(queue, 1), 600.0, FAILURE)
    (again,) = receive(queue, 1)
    assert again.attempt == 2


def test_policy_dead_letters_message_after_its_last_attempt(
    subscription: Subscription, opened: Open, caplog: pytest.LogCaptureFixture
) -> None:
    """`dead_letter` returns True at the last attempt. The message is then not expected. Others are not affected."""
    subscription.publish(b"poison", b"good")
    queue = opened(subscription.url)
    queue.check()
    results: list[tuple[int | None, bool]] = []
    while not (results and results[-1][1]):
        for delivery in receive(queue, 1):
            if delivery.body == b"good":
                queue.ack([delivery])
            else:
                results.append((delivery.attempt, queue.dead_letter(delivery, FAILURE)))
    assert results == [(1, False), (2, False), (3, False), (4, False), (5, True)]
    assert bodies(subscription.dead_letters(1)) == [b"poison"]
    assert queue.backlog() is None
    assert "attempts_exhausted" in [record.message for record in caplog.records]


def test_direct_dead_letter_has_its_reason(subscription: Subscription, opened: Open) -> None:
    """It is published at the first attempt, with its own attributes; values are truncated to Pub/Sub's limit."""
    subscription.publish(b"poison", topic="mine", retry="é" * 512)
    queue = opened(subscription.url, direct_dead_letter=True)
    queue.check()
    (delivery,) = receive(queue, 1)
    assert queue.dead_letter(delivery, FAILURE)
    (dead_letter,) = subscription.dead_letters(1)
    assert dead_letter.data == b"poison"
    reason = dead_letter.attributes.pop("reason")
    assert FAILURE.reason.startswith(reason)
    assert 1000 < len(reason.encode()) <= 1024
    assert dict(dead_letter.attributes) == {
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


def test_message_is_redelivered_if_dead_letter_cannot_be_published(subscription: Subscription, opened: Open) -> None:
    """Publishing fails, for example, if the topic does not exist."""
    subscription.publish(b"poison")
    queue = opened(subscription.url, direct_dead_letter=True)
    queue.check()
    (delivery,) = receive(queue, 1)
    subscription.publisher.delete_topic(topic=f"projects/demo/topics/{subscription.name}-dead")
    assert not queue.dead_letter(delivery, FAILURE)
    (again,) = receive(queue, 1)
    assert (again.body, again.attempt) == (b"poison", 2)
    queue.ack([again])


def test_dead_letter_without_policy_delays_the_message(emulator: Emulator, opened: Open) -> None:
    """Pub/Sub does not count attempts and redelivers indefinitely."""
    subscription = Subscription(emulator, bare=True)
    subscription.publish(b"poison")
    queue = opened(subscription.url)
    (delivery,) = receive(queue, 1)
    assert delivery.attempt is None
    assert not queue.dead_letter(delivery, FAILURE)
    assert receive(queue, 1, wait=2) == []


def test_check_reports_missing_policies(emulator: Emulator, opened: Open) -> None:
    """Each warning has the command that fixes it."""
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
    with pytest.raises(QueueError) as missing:
        opened(bare.url, direct_dead_letter=True).check()
    assert str(missing.value) == (
        f"KLAVIYO_WORKER_DEAD_LETTER_MODE=direct: {bare.path} has no dead-letter topic: gcloud pubsub subscriptions "
        f"update {bare.path} --dead-letter-topic=TOPIC --max-delivery-attempts=10"
    )
    pushed = Subscription(emulator, push="http://127.0.0.1:1/")
    with pytest.raises(QueueError, match="is a push subscription: use push://HOST:PORT"):
        opened(pushed.url).check()
    with pytest.raises(QueueError, match="projects/demo/subscriptions/nowhere does not exist"):
        opened("pubsub://demo/nowhere").check()


def test_deleted_topic_is_reported(emulator: Emulator, opened: Open) -> None:
    """The subscription remains, and receives nothing."""
    subscription = Subscription(emulator)
    queue = opened(subscription.url)
    queue.check()
    assert queue.destination() == f"pubsub://demo/{subscription.name}"
    subscription.publisher.delete_topic(request={"topic": subscription._path("topics", "")})
    with pytest.raises(QueueError, match=f"QUEUE_URL: the topic of {subscription.path} was deleted: delete the subscr"):
        queue.check()


def test_stop_nacks_pending_messages_and_settling_continues(subscription: Subscription, opened: Open) -> None:
    """They are redelivered immediately, not when their leases end."""
    subscription.publish(*(b"%d" % number for number in range(100)))
    queue = opened(subscription.url, max_messages=50)
    held = receive(queue, 10)
    time.sleep(1)  # more are prefetched
    queue.stop()
    queue.ack(held)
    queue.close()
    time.sleep(1)  # without a pull, no message must go to the closed stream
    back = subscription.pull(5.0, max_messages=90)
    assert len(held) == 10
    assert sorted(entry.message.data for entry in back) == sorted(
        {b"%d" % number for number in range(100)} - {delivery.body for delivery in held}
    )


def test_connection_is_closed_with_its_stream(subscription: Subscription, opened: Open) -> None:
    """A long-running worker must not accumulate connections, and dead streams must not receive messages."""
    queue = opened(subscription.url)
    queue.receive(1, 0.5)
    client = queue._stream._client
    assert client is not None
    queue.stop()
    deadline = time.monotonic() + 60
    with pytest.raises(ValueError, match="closed channel"):  # noqa: PT012 - eventually
        while time.monotonic() < deadline:
            client.get_subscription(subscription=subscription.path)


def test_leases_are_extended_without_a_stream(subscription: Subscription) -> None:
    """The client does not extend leases without a stream; the adapter extends those of held and pending messages."""
    queue = pubsub.PubSubQueue(subscription.path, QueueOptions(), lease_seconds=10)
    subscription.publish(b"held")
    held = receive(queue, 1)
    subscription.publish(b"waiting")
    wait_for(queue._stream.pending)
    queue._stream._close()
    for _ in range(4):
        queue.extend(held, 10)
        assert subscription.pull(3.0) == []
    queue.ack([*held, *receive(queue, 1)])
    queue.close()
    assert subscription.unacked() == []


def test_hanging_stream_is_reopened(
    subscription: Subscription, opened: Open, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A defect in the client's consumer thread leaves a stream open that receives nothing."""
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
    wait_for(lambda: seen)
    with monkeypatch.context() as patch, caplog.at_level("INFO"):
        patch.setattr(streaming_pull, "IDLE_TIMEOUT", 0.5)
        assert receive(queue, 1, wait=1) == []
    assert "receiver_restarted" in [record.message for record in caplog.records]
    deadline = time.monotonic() + 60
    while not (got := receive(queue, 1, wait=1)) and time.monotonic() < deadline:
        subscription.publish(b"news")  # the emulator sends some messages to streams that were just closed
    assert got[0].body == b"news"


def test_receiving_resumes_after_subscription_is_recreated(
    subscription: Subscription, opened: Open, caplog: pytest.LogCaptureFixture
) -> None:
    """The worker does not need a restart."""
    queue = opened(subscription.url)
    queue.receive(1, 0.5)
    subscription.subscriber.delete_subscription(subscription=subscription.path)
    assert receive(queue, 1, wait=3) == []
    topic = f"projects/demo/topics/{subscription.name}"
    subscription.subscriber.create_subscription(name=subscription.path, topic=topic)
    subscription.publish(b"back")
    assert [delivery.body for delivery in receive(queue, 1, wait=30)] == [b"back"]
    assert "receive_failed" in [record.message for record in caplog.records]


def test_permanently_missing_subscription_raises(
    subscription: Subscription, opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The exit code is 3, and the supervisor restarts the worker."""
    monkeypatch.setattr(reconnect, "REFUSAL_TIMEOUT", 1.0)
    queue = opened("pubsub://demo/nowhere")
    with pytest.raises(QueueError, match="Pub/Sub refuses the subscription: 404"):
        receive(queue, 1, wait=30)


def test_publish_fills_the_topic(subscription: Subscription, opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    """The calls respect Pub/Sub's limits. An error has the number of messages published before it."""
    monkeypatch.setattr(pubsub, "MAX_BATCH", 100)
    queue = opened(subscription.url)
    assert queue.publish(b"%d" % number for number in range(250)) == 250
    assert queue.publish([b"x" * 4_000_000] * 3) == 3
    assert len(subscription.pull(5.0)) == 253
    with pytest.raises(QueueError, match="100 messages were published, then: message 102 is empty"):
        queue.publish([*[b"fine"] * 101, b""])

    def until_the_topic_is_gone() -> Iterator[bytes]:
        yield from [b"fine"] * 101  # the first call is made when the first message of the second call is read
        subscription.publisher.delete_topic(topic=f"projects/demo/topics/{subscription.name}")

    with pytest.raises(QueueError, match="100 messages were published, then: 404"):
        queue.publish(until_the_topic_is_gone())
