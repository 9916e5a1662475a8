"""The dead letters of Pub/Sub on Google's emulator: where they are found, and what is said when they are not."""

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

PUBLISHED = datetime(2026, 5, 1, 12, 0, 0, 250_000, UTC)


@pytest.fixture(autouse=True)
def emulated(emulator: Emulator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PUBSUB_EMULATOR_HOST", emulator.host)


@pytest.fixture
def subscription(emulator: Emulator) -> Subscription:
    return Subscription(emulator)


def attach(subscription: Subscription, suffix: str, **more: Any) -> str:
    """Create another subscription on the topic of the dead letters; return its URL."""
    name = subscription._path("subscriptions", suffix)
    topic = subscription._path("topics", "dead")
    subscription.subscriber.create_subscription(request={"name": name, "topic": topic, **more})
    return f"pubsub://demo/{name.rpartition('/')[2]}"


def bury(subscription: Subscription, body: bytes, **attributes: str) -> None:
    topic = subscription._path("topics", "dead")
    message = {"data": body, "attributes": attributes}
    subscription.publisher.publish(request={"topic": topic, "messages": [message]})


def bodies(queue: PubSubQueue, wait: float = 5.0) -> list[bytes]:
    """Look once, and leave all."""
    letters = queue.dead_letters()
    try:
        return [letter.delivery.body for letter in letters.receive(10, wait)]
    finally:
        letters.close()


def test_the_only_subscription_that_is_pulled_is_found(subscription: Subscription, opened: Open) -> None:
    """One that is pushed, to an archive maybe, is no place to look."""
    attach(subscription, "pushed", push_config={"push_endpoint": "http://127.0.0.1:9/"})
    bury(subscription, b"x")
    assert bodies(opened(subscription.url)) == [b"x"]


def test_of_several_one_is_to_be_named(subscription: Subscription, opened: Open) -> None:
    """The error has their URLs. The setting is all there is to it then."""
    other = attach(subscription, "other")
    bury(subscription, b"x")
    text = f"set DEAD_LETTER_QUEUE_URL to one of pubsub://demo/{subscription.name}-dead, {other}"
    with pytest.raises(QueueError, match=f"^QUEUE_URL: .*{re.escape(text)}$"):
        opened(subscription.url).dead_letters()
    assert bodies(opened("pubsub://demo/another-worker", dead_letter_url=other)) == [b"x"]


def test_the_queue_itself_is_no_place_of_dead_letters(subscription: Subscription, opened: Open) -> None:
    """Else `dlq drop` would remove what is still to be handled."""
    with pytest.raises(QueueURLError, match=r"^DEAD_LETTER_QUEUE_URL is QUEUE_URL: "):
        opened(subscription.url, dead_letter_url=subscription.url).dead_letters()


def test_what_is_missing_is_named(subscription: Subscription, opened: Open, emulator: Emulator) -> None:
    """With what to do: a policy, a subscription for its topic, the right name."""
    bare = Subscription(emulator, bare=True)
    with pytest.raises(QueueError) as missing:
        opened(bare.url).dead_letters()
    assert str(missing.value) == (
        f"QUEUE_URL: {bare.path} has no dead-letter topic: gcloud pubsub subscriptions update {bare.path} "
        "--dead-letter-topic=TOPIC --max-delivery-attempts=10"
    )
    subscription.subscriber.delete_subscription(subscription=subscription._path("subscriptions", "dead"))
    with pytest.raises(
        QueueError, match="has no pull subscription: create one, because the topic keeps no messages without it"
    ):
        opened(subscription.url).dead_letters()
    with pytest.raises(QueueError, match=r"^DEAD_LETTER_QUEUE_URL: projects/demo/subscriptions/nowhere does not exist"):
        bodies(opened(subscription.url, dead_letter_url="pubsub://demo/nowhere"))
    for wrong in ("sqs://dead", "pubsub://demo", "pubsub://demo/dead?x=y"):
        with pytest.raises(QueueURLError, match=r"^DEAD_LETTER_QUEUE_URL is malformed: expected pubsub://"):
            opened(subscription.url, dead_letter_url=wrong).dead_letters()


def test_refusals_say_what_to_grant_or_to_set(
    subscription: Subscription, opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The emulator has no permissions: each call is refused in turn."""
    queue = opened(subscription.url)

    def refuse(*_: Any, **__: Any) -> None:
        raise google.PermissionDenied("no")  # type: ignore[no-untyped-call]

    letters = queue.dead_letters()
    with monkeypatch.context() as patch:
        patch.setattr(queue._client, "pull", refuse)
        path = f"{subscription.path}-dead"
        with pytest.raises(QueueError, match=f"not permitted to pull .*: grant roles/pubsub.subscriber on {path}$"):
            letters.receive(10, 1.0)
    letters.close()
    with monkeypatch.context() as patch:
        patch.setattr(queue._publisher, "list_topic_subscriptions", refuse)
        with pytest.raises(QueueError, match=r"grant roles/pubsub.viewer on it, or set DEAD_LETTER_QUEUE_URL$"):
            queue.dead_letters()
    with monkeypatch.context() as patch:
        patch.setattr(queue._client, "get_subscription", refuse)
        with pytest.raises(QueueError, match=r"grant roles/pubsub.viewer on it, or set DEAD_LETTER_QUEUE_URL$"):
            queue.dead_letters()


def test_a_letter_whose_lease_was_lost_can_still_be_removed(subscription: Subscription, opened: Open) -> None:
    """It is leased anew by the look that goes on, and not handed out again."""
    bury(subscription, b"x")
    letters = opened(subscription.url).dead_letters()
    found = letters.receive(10, 5.0)
    (old,) = [lease.handle for lease in letters._leases.values()]
    letters._source.extend([old], 0)
    assert letters.receive(10, 1.0) == []
    (new,) = [lease.handle for lease in letters._leases.values()]
    assert new != old
    letters.remove(found)
    letters.close()
    assert subscription.pull(0.5, dead=True) == []


def test_what_is_pulled_is_held_for_a_minute_at_once(
    subscription: Subscription, opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The subscription's own deadline may be ten seconds. What cannot be held is not shown. Silence is no error."""
    bury(subscription, b"x")
    queue = opened(subscription.url)
    letters = queue.dead_letters()
    told: list[dict[str, Any]] = []

    def fail(*, request: dict[str, Any], **_: Any) -> None:
        told.append(request)
        raise google.NotFound("gone")  # type: ignore[no-untyped-call]

    def say_nothing(**_: Any) -> None:
        raise google.DeadlineExceeded("late")  # type: ignore[no-untyped-call]

    with monkeypatch.context() as patch:
        patch.setattr(queue._client, "modify_ack_deadline", fail)
        with pytest.raises(QueueError, match=r"cannot extend the leases of its dead letters in .*: 404 gone"):
            letters.receive(10, 5.0)
    assert [(len(request["ack_ids"]), request["ack_deadline_seconds"]) for request in told] == [(1, 60)]
    with monkeypatch.context() as patch:
        patch.setattr(queue._client, "pull", say_nothing)
        assert letters.receive(10, 0.1) == []
    letters.close()


def test_removing_in_vain_is_told(subscription: Subscription, opened: Open) -> None:
    """The subscription may be gone meanwhile."""
    bury(subscription, b"x")
    letters = opened(subscription.url).dead_letters()
    found = letters.receive(10, 5.0)
    subscription.subscriber.delete_subscription(subscription=f"{subscription.path}-dead")
    with pytest.raises(QueueError, match=r"^QUEUE_URL: 1 dead letters may not have been removed: 404 "):
        letters.remove(found)
    letters.close()


@pytest.mark.parametrize(
    ("attributes", "told"),
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
    ids=["the policy's", "ours", "unreadable", "anybody's"],
)
def test_attributes_tell_who_gave_up(attributes: dict[str, str], told: tuple[Any, ...]) -> None:
    """Pub/Sub's word counts more than ours, which a message that was sent again may still have on it."""
    letter = _dead_letter(PubsubMessage(data=b"x", message_id="1", attributes=attributes, publish_time=PUBLISHED))
    delivery = letter.delivery
    assert (delivery.attempt, delivery.published_at, delivery.attributes, letter.failure.stage) == told
    assert letter.dead_lettered_at == PUBLISHED
