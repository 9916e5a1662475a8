"""What is read from the attributes of a dead letter, whoever wrote them."""

from __future__ import annotations

from datetime import UTC, datetime

from google.pubsub_v1.types import PubsubMessage
from hypothesis import given
from hypothesis import strategies as st

from adapters import Failure
from adapters.pubsub.dead_letters import _dead_letter
from adapters.shared.dead_letter_attributes import DeadLetterInfo, from_worker

OURS = ("reason", "stage", "error", "message_type", "resource_type", "resource_id", "message_id", "attempt", "queue")
THEIRS = ("DeliveryCount", "TopicPublishTime", "Subscription")
NAMES = st.sampled_from((*OURS, *(f"CloudPubSubDeadLetterSource{name}" for name in THEIRS), "colour"))
VALUES = st.text() | st.integers(0, 10**5000).map(lambda number: f"{number:x}") | st.from_regex("[0-9]{1,5000}")
TIMES = st.datetimes().map(str) | st.datetimes(timezones=st.just(UTC)).map(datetime.isoformat)


@given(attributes=st.dictionaries(NAMES, VALUES | TIMES))
def test_any_attributes_can_be_read(attributes: dict[str, str]) -> None:
    """Anybody may publish to a topic of dead letters: times have a zone, counts are small, a failure says something."""
    now = datetime.now(UTC)
    letter = _dead_letter(PubsubMessage(data=b"x", message_id="1", attributes=attributes, publish_time=now))
    assert letter.delivery.published_at is None or letter.delivery.published_at.tzinfo
    assert 0 <= (letter.delivery.attempt or 0) < 10**9
    assert letter.delivery.attributes.items() <= attributes.items()
    assert letter.failure.reason or attributes["reason"] == ""


def test_what_we_wrote_is_read_in_full() -> None:
    """And the message's own attributes are told from ours."""
    failure = Failure("why", "send", "Rejected", "OrderCreated", "order", "o1")
    written = {name: getattr(failure, name) for name in Failure.__slots__}
    about = {"message_id": "7", "attempt": "3", "subscription": "s", "queue": "q", "colour": "blue"}
    assert from_worker({**written, **about}) == DeadLetterInfo(failure, 3, {"colour": "blue"})
    assert from_worker({"reason": "a publisher's own", "attempt": "3"}) is None
