"""The dead letters of Pub/Sub on Google's emulator, and the errors if they are not found."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import pytest
from google.api_core import exceptions as google
from google.pubsub_v1.types import PubsubMessage

from adapters import QueueError, QueueURLError
from adapters.pubsub.dead_letters import _dead_letter
from tests.support.pubsub_emulator import Emulator, Subscription

if TYPE_CHECKING:
    from adapters.pubsub.queue import PubSubQueue
    from tests.integration.conftest import Open

pytestmark = pytest.mark.usefixtures("emulated")

PUBLISHED = datetime(2026, 5, 1, 12, 0, 0, 250_000, UTC)


def add_subscription(subscription: Subscription, suffix: str, **more: Any) -> str:
    """Create another subscription of the dead-letter topic; return its URL."""
    name = subscription._path("subscriptions", suffix)
    topic = subscription._path("topics", "dead")
    subscription.subscriber.create_subscription(request={"name": name, "topic": topic, **more})
    return f"pubsub://demo/{name.rpartition('/')[2]}"


def publish_dead_letter(subscription: Subscription, body: bytes, **attributes: str) -> None:
    """Publish a message to the dead-letter topic."""
    topic = subscription._path("topics", "dead")
    message = {"data": body, "attributes": attributes}
    subscription.publisher.publish(request={"topic": topic, "messages": [message]})


def bodies(queue: PubSubQueue, wait: float = 5.0) -> list[bytes]:
    """Receive dead letters and release them."""
    dead_letters = queue.dead_letters()
    try:
        return [dead_letter.delivery.body for dead_letter in dead_letters.receive(10, wait)]
    finally:
        dead_letters.close()


def test_only_pull_subscription_is_found(subscription: Subscription, opened: Open) -> None:
    """A push subscription, for example to an archive, is ignored."""
    add_subscription(subscription, "pushed", push_config={"push_endpoint": "http://127.0.0.1:9/"})
    publish_dead_letter(subscription, b"x")
    assert bodies(opened(subscription.url)) == [b"x"]


def test_several_subscriptions_require_the_setting(subscription: Subscription, opened: Open) -> None:
    """The error has their URLs. With the setting, the topic is not read."""
    other = add_subscription(subscription, "other")
    publish_dead_letter(subscription, b"x")
    text = f"set DEAD_LETTER_QUEUE_URL to one of pubsub://demo/{subscription.name}-dead, {other}"
    with pytest.raises(QueueError, match=f"^QUEUE_URL: .*{re.escape(text)}$"):
        opened(subscription.url).dead_letters()
    assert bodies(opened("pubsub://demo/another-worker", dead_letter_url=other)) == [b"x"]


def test_setting_must_not_be_the_queue_itself(subscription: Subscription, opened: Open) -> None:
    """Otherwise `dlq drop` would remove messages that are not processed yet."""
    with pytest.raises(QueueURLError, match=r"^DEAD_LETTER_QUEUE_URL names the same subscription as QUEUE_URL: "):
        opened(subscription.url, dead_letter_url=subscription.url).dead_letters()


def test_missing_policy_or_subscription_is_reported(
    subscription: Subscription, opened: Open, emulator: Emulator
) -> None:
    """The advice is to add a policy, create a subscription, or correct the name."""
    bare = Subscription(emulator, bare=True)
    with pytest.raises(QueueError) as missing:
        opened(bare.url).dead_letters()
    assert str(missing.value) == (
        f"QUEUE_URL: {bare.path} has no dead-letter topic: gcloud pubsub subscriptions update {bare.path} "
        "--dead-letter-topic=TOPIC --max-delivery-attempts=10"
    )
    subscription.subscriber.delete_subscription(subscription=subscription._path("subscriptions", "dead"))
    with pytest.raises(
        QueueError, match=r"has no pull subscription: create one \(without a subscription, a topic keeps no messages\)"
    ):
        opened(subscription.url).dead_letters()
    with pytest.raises(QueueError, match=r"^DEAD_LETTER_QUEUE_URL: projects/demo/subscriptions/nowhere does not exist"):
        bodies(opened(subscription.url, dead_letter_url="pubsub://demo/nowhere"))
    for wrong in ("sqs://dead", "pubsub://demo", "pubsub://demo/dead?x=y"):
        with pytest.raises(QueueURLError, match=r"^DEAD_LETTER_QUEUE_URL is malformed: expected pubsub://"):
            opened(subscription.url, dead_letter_url=wrong).dead_letters()


def test_missing_permissions_are_reported(
    subscription: Subscription, opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The emulator has no permissions, so each call is made to fail in turn."""
    queue = opened(subscription.url)

    def refuse(*_: Any, **__: Any) -> None:
        raise google.PermissionDenied("no")  # type: ignore[no-untyped-call]

    dead_letters = queue.dead_letters()
    with monkeypatch.context() as patch:
        patch.setattr(queue._client, "pull", refuse)
        path = f"{subscription.path}-dead"
        with pytest.raises(QueueError, match=f"not permitted to pull .*: grant roles/pubsub.subscriber on {path}$"):
            dead_letters.receive(10, 1.0)
    dead_letters.close()
    with monkeypatch.context() as patch:
        patch.setattr(queue._publisher, "list_topic_subscriptions", refuse)
        with pytest.raises(
            QueueError, match=r"grant roles/pubsub.viewer on projects/.*/topics/.*, or set DEAD_LETTER_QUEUE_URL$"
        ):
            queue.dead_letters()
    with monkeypatch.context() as patch:
        patch.setattr(queue._client, "get_subscription", refuse)
        with pytest.raises(
            QueueError, match=f"grant roles/pubsub.viewer on {subscription.path}, or set DEAD_LETTER_QUEUE_URL$"
        ):
            queue.dead_letters()


def test_dead_letter_with_lost_lease_can_be_removed(subscription: Subscription, opened: Open) -> None:
    """The next pull leases it again. It is not returned twice."""
    publish_dead_letter(subscription, b"x")
    dead_letters = opened(subscription.url).dead_letters()
    found = dead_letters.receive(10, 5.0)
    (old,) = [lease.handle for lease in dead_letters._leases.values()]
    dead_letters._source.extend([old], 0)
    assert dead_letters.receive(10, 1.0) == []
    (new,) = [lease.handle for lease in dead_letters._leases.values()]
    assert new != old
    dead_letters.remove(found)
    dead_letters.close()
    assert subscription.pull(0.5, dead=True) == []


def test_pulled_messages_are_immediately_leased_for_a_minute(
    subscription: Subscription, opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The subscription's own deadline can be ten seconds. Without an extension, the messages are not returned."""
    publish_dead_letter(subscription, b"x")
    queue = opened(subscription.url)
    dead_letters = queue.dead_letters()
    requests: list[dict[str, Any]] = []

    def fail(*, request: dict[str, Any], **_: Any) -> None:
        requests.append(request)
        raise google.NotFound("gone")  # type: ignore[no-untyped-call]

    def time_out(**_: Any) -> None:
        raise google.DeadlineExceeded("late")  # type: ignore[no-untyped-call]

    with monkeypatch.context() as patch:
        patch.setattr(queue._client, "modify_ack_deadline", fail)
        with pytest.raises(QueueError, match=r"cannot extend the leases of its dead letters in .*: 404 gone"):
            dead_letters.receive(10, 5.0)
    assert [(len(request["ack_ids"]), request["ack_deadline_seconds"]) for request in requests] == [(1, 60)]
    with monkeypatch.context() as patch:
        patch.setattr(queue._client, "pull", time_out)
        assert dead_letters.receive(10, 0.1) == []
    dead_letters.close()


def test_failed_removal_is_reported(subscription: Subscription, opened: Open) -> None:
    """It fails, for example, if the subscription was deleted."""
    publish_dead_letter(subscription, b"x")
    dead_letters = opened(subscription.url).dead_letters()
    found = dead_letters.receive(10, 5.0)
    subscription.subscriber.delete_subscription(subscription=f"{subscription.path}-dead")
    with pytest.raises(QueueError, match=r"^QUEUE_URL: 1 dead letters were possibly not removed: 404 "):
        dead_letters.remove(found)
    dead_letters.close()


@pytest.mark.parametrize(
    ("attributes", "expected"),
    [
        (
            {"CloudPubSubDeadLetterSourceDeliveryCount": "10", "reason": "stale", "message_id": "7", "attempt": "1"}
            | {"CloudPubSubDeadLetterSourceTopicPublishTime": "2026-05-01T12:00:00.250+00:00", "colour": "blue"},
            (10, PUBLISHED, {"reason": "stale", "message_id": "7", "attempt": "1", "colour": "blue"}, "queue"),
        ),
        (
            {"reason": "why", "stage": "send", "message_id": "7", "attempt": "None", "subscription": "s", "colour": ""},
            (None, None, {"colour": ""}, "send"),
        ),
        (
            {"CloudPubSubDeadLetterSourceDeliveryCount": "many", "CloudPubSubDeadLetterSourceTopicPublishTime": "then"},
            (None, None, {}, "queue"),
        ),
        ({"reason": "of the publisher's own"}, (None, None, {"reason": "of the publisher's own"}, "queue")),
    ],
    ids=["policy", "worker", "unreadable", "another publisher"],
)
def test_attributes_distinguish_policy_and_worker(attributes: dict[str, str], expected: tuple[Any, ...]) -> None:
    """Pub/Sub's attributes take precedence: a message that was moved back to the queue can still have the worker's."""
    dead_letter = _dead_letter(PubsubMessage(data=b"x", message_id="1", attributes=attributes, publish_time=PUBLISHED))
    delivery = dead_letter.delivery
    assert (delivery.attempt, delivery.published_at, delivery.attributes, dead_letter.failure.stage) == expected
    assert dead_letter.dead_lettered_at == PUBLISHED
