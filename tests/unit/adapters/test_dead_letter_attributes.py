"""The attributes of dead letters, written by the worker, the queue or another publisher."""

from __future__ import annotations

from datetime import UTC, datetime

from google.pubsub_v1.types import PubsubMessage
from hypothesis import given
from hypothesis import strategies as st

from adapters import Failure
from adapters.pubsub.dead_letters import _dead_letter
from adapters.shared.dead_letter_attributes import DeadLetterInfo, from_worker

ADDED = ("reason", "stage", "error", "message_type", "resource_type", "resource_id", "message_id", "attempt", "queue")
PUBSUB = ("DeliveryCount", "TopicPublishTime", "Subscription")
NAMES = st.sampled_from((*ADDED, *(f"CloudPubSubDeadLetterSource{name}" for name in PUBSUB), "colour"))
VALUES = st.text() | st.integers(0, 10**5000).map(lambda number: f"{number:x}") | st.from_regex("[0-9]{1,5000}")
TIMES = st.datetimes().map(str) | st.datetimes(timezones=st.just(UTC)).map(datetime.isoformat)


@given(attributes=st.dictionaries(NAMES, VALUES | TIMES))
def test_any_attributes_are_read(attributes: dict[str, str]) -> None:
    """Any client can publish to a dead-letter topic. Times have a zone, counts are small, a failure has a reason."""
    now = datetime.now(UTC)
    dead_letter = _dead_letter(PubsubMessage(data=b"x", message_id="1", attributes=attributes, publish_time=now))
    assert dead_letter.delivery.published_at is None or dead_letter.delivery.published_at.tzinfo
    assert 0 <= (dead_letter.delivery.attempt or 0) < 10**9
    assert dead_letter.delivery.attributes.items() <= attributes.items()
    assert dead_letter.failure.reason or attributes["reason"] == ""


def test_attributes_of_the_worker_are_read_completely() -> None:
    """The message's own attributes are separated from the worker's."""
    failure = Failure("why", "send", "Rejected", "OrderCreated", "order", "o1")
    written = {name: getattr(failure, name) for name in Failure.__slots__}
    others = {"message_id": "7", "attempt": "3", "subscription": "s", "queue": "q", "colour": "blue"}
    assert from_worker({**written, **others}) == DeadLetterInfo(failure, 3, {"colour": "blue"})
    assert from_worker({"reason": "a publisher's own", "attempt": "3"}) is None
