"""Finds the subscription of a dead-letter topic, and reads it by single pulls.

A stream would lease more messages than are read, and would take long to close.
"""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Any, cast

from google.api_core import exceptions as google
from google.api_core.retry import Retry, if_exception_type
from google.auth.exceptions import GoogleAuthError

from adapters.base import DeadLetter, QueueError
from adapters.pubsub.settlement import MAX_IDS, TRANSIENT_ERRORS
from adapters.shared.dead_letter_attributes import from_policy, from_worker, parse_attempt
from adapters.shared.leased_dead_letters import DeadLetterDelivery

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from google.cloud.pubsub_v1 import SubscriberClient
    from google.pubsub_v1 import PublisherClient
    from google.pubsub_v1.types import PubsubMessage

DEAD_LETTER_SETTING = "DEAD_LETTER_QUEUE_URL"
CALL_TIMEOUT = 5.0  # seconds for one call; short, because Ctrl-C waits for the end of a pull
MIN_PULL_TIMEOUT = 1.0  # seconds; messages of a pull that times out can stay leased
MAX_PULL = 1000  # messages in a pull, Pub/Sub's limit
_RETRY_TIMEOUT = 10.0  # seconds of retries
_RETRY = Retry(predicate=if_exception_type(*TRANSIENT_ERRORS), initial=0.2, maximum=2.0, timeout=_RETRY_TIMEOUT)
_PULL_RETRY = Retry(
    predicate=if_exception_type(*(error for error in TRANSIENT_ERRORS if error is not google.DeadlineExceeded)),
    initial=0.2,
    maximum=2.0,
    timeout=_RETRY_TIMEOUT,
)
_PREFIX = "CloudPubSubDeadLetterSource"  # of the attributes that Pub/Sub adds to a dead letter
_COUNT, _PUBLISHED = f"{_PREFIX}DeliveryCount", f"{_PREFIX}TopicPublishTime"
# https://cloud.google.com/pubsub/docs/handling-failures#dead_letter_topic


def find_dead_letter_subscription(topic: str, publisher: PublisherClient, subscriber: SubscriberClient) -> str:
    """Return the path of the only pull subscription of a topic. Raises QueueError."""
    request: Any = {"topic": topic}
    try:
        found = list(publisher.list_topic_subscriptions(request=request, retry=_RETRY, timeout=CALL_TIMEOUT))
    except google.PermissionDenied:
        reason = f"not permitted to list the subscriptions of {topic}"
        todo = f"grant roles/pubsub.viewer on {topic}, or set {DEAD_LETTER_SETTING}"
        raise QueueError(f"QUEUE_URL: {reason}", todo=todo) from None
    except google.NotFound:
        raise QueueError(f"QUEUE_URL: its dead-letter topic {topic} does not exist", todo="create it") from None
    except (google.GoogleAPIError, GoogleAuthError) as error:
        raise QueueError(f"QUEUE_URL: cannot reach Pub/Sub for {topic}: {error}") from None
    pulled = [path for path in found if _is_pulled(path, subscriber)]
    if not pulled:
        reason = f"its dead-letter topic {topic} has no pull subscription"
        todo = f"create one (without a subscription, a topic keeps no messages), or set {DEAD_LETTER_SETTING}"
        raise QueueError(f"QUEUE_URL: {reason}", todo=todo)
    if len(pulled) > 1:
        urls = ", ".join(sorted(_url(path) for path in pulled))
        raise QueueError(
            f"QUEUE_URL: its dead-letter topic {topic} has several pull subscriptions",
            todo=f"set {DEAD_LETTER_SETTING} to one of {urls}",
        )
    return pulled[0]


class PubSubDeadLetters:
    """A subscription of dead letters. Implements DeadLetterSource."""

    def __init__(self, client: SubscriberClient, path: str) -> None:
        self._client = client
        self._path = path

    def lease(self, max_messages: int, wait: float, seconds: int) -> list[tuple[str, DeadLetter]]:
        """Pull once. The subscription's own ack deadline, 10 s by default, is immediately extended to `seconds`."""
        request = {"subscription": self._path, "max_messages": min(max_messages, MAX_PULL)}
        timeout = min(max(wait, MIN_PULL_TIMEOUT), CALL_TIMEOUT)
        try:
            found = self._client.pull(request=request, retry=_PULL_RETRY, timeout=timeout).received_messages
        except google.DeadlineExceeded:
            return []
        except (google.GoogleAPIError, GoogleAuthError) as error:
            raise self._queue_error(error) from None
        if errors := self.extend([each.ack_id for each in found], seconds):
            reason = next(iter(errors.values()))
            raise QueueError(f"QUEUE_URL: cannot extend the leases of its dead letters in {self._path}: {reason}")
        return [(each.ack_id, _dead_letter(each.message)) for each in found]

    def extend(self, handles: Sequence[str], seconds: int) -> dict[str, str]:
        """Modify the ack deadlines."""
        return self._call_batches(self._client.modify_ack_deadline, handles, ack_deadline_seconds=seconds)

    def remove(self, handles: Sequence[str]) -> dict[str, str]:
        """Acknowledge the messages."""
        return self._call_batches(self._client.acknowledge, handles)

    def close(self) -> None:
        """Do nothing: the client belongs to the queue."""

    def _call_batches(self, call: Callable[..., object], handles: Sequence[str], **fields: int) -> dict[str, str]:
        """Make the calls. Return the error text of each handle that failed."""
        errors: dict[str, str] = {}
        for start in range(0, len(handles), MAX_IDS):
            batch = handles[start : start + MAX_IDS]
            request = {"subscription": self._path, "ack_ids": batch, **fields}
            try:
                call(request=request, retry=_RETRY, timeout=CALL_TIMEOUT)
            except (google.GoogleAPIError, GoogleAuthError, ValueError) as error:  # ValueError: the client was closed
                errors |= dict.fromkeys(batch, str(error))
        return errors

    def _queue_error(self, error: Exception) -> QueueError:
        if isinstance(error, google.NotFound):
            return QueueError(
                f"{DEAD_LETTER_SETTING}: {self._path} does not exist", todo="create it, or correct the name"
            )
        if isinstance(error, google.PermissionDenied):
            todo = f"grant roles/pubsub.subscriber on {self._path}"
            return QueueError("QUEUE_URL: not permitted to pull its dead letters", todo=todo)
        return QueueError(f"QUEUE_URL: cannot pull its dead letters in {self._path}: {error}")


def _is_pulled(path: str, subscriber: SubscriberClient) -> bool:
    """Return whether a subscription is neither pushed, exported nor detached. True if it cannot be read."""
    try:
        found = subscriber.get_subscription(request={"subscription": path}, retry=_RETRY, timeout=CALL_TIMEOUT)
    except (google.GoogleAPIError, GoogleAuthError):
        return True
    exports = (found.push_config.push_endpoint, found.bigquery_config.table, found.cloud_storage_config.bucket)
    return not any((*exports, found.detached))


def _url(path: str) -> str:
    _, project, _, name = path.split("/")
    return f"pubsub://{project}/{name}"


def _dead_letter(message: PubsubMessage) -> DeadLetter:
    """Return a message as a dead letter."""
    attributes = dict(message.attributes)
    own = {name: value for name, value in attributes.items() if not name.startswith(_PREFIX)}
    by_worker = None if _COUNT in attributes else from_worker(attributes)
    info = by_worker or from_policy(parse_attempt(attributes.get(_COUNT, "")), own)
    published_at = _parse_time(attributes.get(_PUBLISHED, ""))
    delivery = DeadLetterDelivery(message.message_id, message.data, info.attributes, info.attempt, published_at)
    return DeadLetter(delivery, info.failure, cast("datetime", message.publish_time))


def _parse_time(text: str) -> datetime | None:
    """Return the time; None if `text` is not a time, because publishers can also set this attribute."""
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        return None
    return time if time.tzinfo else None
