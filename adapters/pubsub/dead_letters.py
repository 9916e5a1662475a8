"""The dead letters of Pub/Sub: where they are, and how they are looked through.

They are pulled by single calls: a stream would hand over more than is looked at, and not end soon.
"""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Any, cast

from google.api_core import exceptions as google
from google.api_core.retry import Retry, if_exception_type
from google.auth.exceptions import GoogleAuthError

from adapters.base import DeadLetter, QueueError
from adapters.pubsub.settlement import MAX_IDS, PASSING
from adapters.shared import dead_letter_attributes as buried
from adapters.shared.leased_dead_letters import LetterDelivery

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from google.cloud.pubsub_v1 import SubscriberClient
    from google.pubsub_v1 import PublisherClient
    from google.pubsub_v1.types import PubsubMessage

SETTING = "DEAD_LETTER_QUEUE_URL"
CALL_TIMEOUT = 5.0  # seconds for one call, a pull too: Ctrl-C waits for it
SHORTEST_PULL = 1.0  # seconds; one that is cut off may lose what is on its way until its lease ends
MAX_PULL = 1000  # messages in a pull, Pub/Sub's limit
_PATIENCE = 10.0  # seconds to reach Pub/Sub
_RETRY = Retry(predicate=if_exception_type(*PASSING), initial=0.2, maximum=2.0, timeout=_PATIENCE)
_PULL_RETRY = Retry(
    predicate=if_exception_type(*(error for error in PASSING if error is not google.DeadlineExceeded)),
    initial=0.2,
    maximum=2.0,
    timeout=_PATIENCE,
)
_BY_POLICY = "CloudPubSubDeadLetterSource"  # begins the names of what Pub/Sub attaches itself
_COUNT, _PUBLISHED = f"{_BY_POLICY}DeliveryCount", f"{_BY_POLICY}TopicPublishTime"
# https://cloud.google.com/pubsub/docs/handling-failures#dead_letter_topic


def subscription_of(topic: str, publisher: PublisherClient, subscriber: SubscriberClient) -> str:
    """Return the path of the one subscription by which a topic can be pulled. Raises QueueError."""
    request: Any = {"topic": topic}
    try:
        found = list(publisher.list_topic_subscriptions(request=request, retry=_RETRY, timeout=CALL_TIMEOUT))
    except google.PermissionDenied:
        what = f"not permitted to list the subscriptions of {topic}"
        raise QueueError(f"QUEUE_URL: {what}", todo=f"grant roles/pubsub.viewer on it, or set {SETTING}") from None
    except google.NotFound:
        raise QueueError(f"QUEUE_URL: its dead-letter topic {topic} does not exist", todo="create it") from None
    except (google.GoogleAPIError, GoogleAuthError) as error:
        raise QueueError(f"QUEUE_URL: cannot reach Pub/Sub for {topic}: {error}") from None
    pulled = [path for path in found if _is_pulled(path, subscriber)]
    if not pulled:
        what = f"its dead-letter topic {topic} has no subscription that is pulled"
        raise QueueError(f"QUEUE_URL: {what}", todo=f"create one, as it forgets what it is sent, or set {SETTING}")
    if len(pulled) > 1:
        urls = ", ".join(sorted(_url(path) for path in pulled))
        raise QueueError(
            f"QUEUE_URL: its dead-letter topic {topic} has several", todo=f"set {SETTING} to one of {urls}"
        )
    return pulled[0]


class PubSubLetters:
    """A subscription of dead letters. Implements Source."""

    def __init__(self, client: SubscriberClient, path: str) -> None:
        self._client = client
        self._path = path

    def lease(self, at_most: int, wait: float, seconds: int) -> list[tuple[str, DeadLetter]]:
        """Pull once. The lease is the subscription's own at first, ten seconds by default."""
        request = {"subscription": self._path, "max_messages": min(at_most, MAX_PULL)}
        timeout = min(max(wait, SHORTEST_PULL), CALL_TIMEOUT)
        try:
            found = self._client.pull(request=request, retry=_PULL_RETRY, timeout=timeout).received_messages
        except google.DeadlineExceeded:
            return []
        except (google.GoogleAPIError, GoogleAuthError) as error:
            raise QueueError(self._explain(error)) from None
        if failed := self.extend([each.ack_id for each in found], seconds):
            reason = next(iter(failed.values()))
            raise QueueError(f"QUEUE_URL: its dead letters in {self._path} cannot be held: {reason}")
        return [(each.ack_id, _letter(each.message)) for each in found]

    def extend(self, handles: Sequence[str], seconds: int) -> dict[str, str]:
        """Modify the ack deadlines."""
        return self._tell(self._client.modify_ack_deadline, handles, ack_deadline_seconds=seconds)

    def remove(self, handles: Sequence[str]) -> dict[str, str]:
        """Acknowledge."""
        return self._tell(self._client.acknowledge, handles)

    def close(self) -> None:
        """Do nothing: the client is the queue's."""

    def _tell(self, call: Callable[..., object], handles: Sequence[str], **about: int) -> dict[str, str]:
        failed: dict[str, str] = {}
        for start in range(0, len(handles), MAX_IDS):
            some = handles[start : start + MAX_IDS]
            request = {"subscription": self._path, "ack_ids": some, **about}
            try:
                call(request=request, retry=_RETRY, timeout=CALL_TIMEOUT)
            except (google.GoogleAPIError, GoogleAuthError, ValueError) as error:  # ValueError: it was closed
                failed |= dict.fromkeys(some, str(error))
        return failed

    def _explain(self, error: Exception) -> str:
        if isinstance(error, google.NotFound):
            return f"{SETTING}: {self._path} does not exist: create it, or correct the name"
        if isinstance(error, google.PermissionDenied):
            return f"QUEUE_URL: not permitted to pull its dead letters: grant roles/pubsub.subscriber on {self._path}"
        return f"QUEUE_URL: its dead letters in {self._path} cannot be pulled: {error}"


def _is_pulled(path: str, subscriber: SubscriberClient) -> bool:
    """Tell whether nothing else takes the messages of a subscription; one that may not be read is taken for such."""
    try:
        found = subscriber.get_subscription(request={"subscription": path}, retry=_RETRY, timeout=CALL_TIMEOUT)
    except (google.GoogleAPIError, GoogleAuthError):
        return True
    elsewhere = (found.push_config.push_endpoint, found.bigquery_config.table, found.cloud_storage_config.bucket)
    return not any((*elsewhere, found.detached))


def _url(path: str) -> str:
    _, project, _, name = path.split("/")
    return f"pubsub://{project}/{name}"


def _letter(message: PubsubMessage) -> DeadLetter:
    attributes = dict(message.attributes)
    own = {name: value for name, value in attributes.items() if not name.startswith(_BY_POLICY)}
    told = None if _COUNT in attributes else buried.direct(attributes)
    burial = told or buried.by_policy(buried.count(attributes.get(_COUNT, "")), own)
    published_at = _time(attributes.get(_PUBLISHED, ""))
    delivery = LetterDelivery(message.message_id, message.data, burial.attributes, burial.attempt, published_at)
    return DeadLetter(delivery, burial.failure, cast("datetime", message.publish_time))


def _time(text: str) -> datetime | None:
    """Read a time; None for what is none: who publishes may write anything there."""
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        return None
    return time if time.tzinfo else None
