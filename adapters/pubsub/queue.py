"""Google Pub/Sub adapter. streaming_pull.py receives messages, settlement.py settles them."""

from __future__ import annotations

import logging
import math
import re
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from google.api_core import exceptions as google
from google.api_core.retry import Retry, if_exception_type
from google.auth.exceptions import GoogleAuthError
from google.cloud.pubsub_v1 import SubscriberClient
from google.cloud.pubsub_v1.types import FlowControl
from google.pubsub_v1 import PublisherClient
from google.pubsub_v1.services.publisher.transports import PublisherGrpcTransport
from google.pubsub_v1.services.subscriber.transports import SubscriberGrpcTransport

from adapters.base import Interruption, QueueError, QueueURLError, QueueWarning
from adapters.pubsub import dead_letters
from adapters.pubsub.policies import SET_DEAD_LETTER_TOPIC, policy_warnings
from adapters.pubsub.settlement import LEASE_SECONDS, TRANSIENT_ERRORS, Settlement
from adapters.pubsub.streaming_pull import StreamClient, StreamingPull
from adapters.pubsub.transport import open_transport
from adapters.shared import proxy
from adapters.shared.chunks import chunked
from adapters.shared.leased_dead_letters import LeasedDeadLetters
from adapters.shared.redeliveries import ExpectedRedeliveries

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from datetime import datetime

    from google.cloud.pubsub_v1.subscriber.message import Message
    from google.pubsub_v1.types import Subscription

    from adapters.base import Delivery, Failure, QueueOptions

log = logging.getLogger("klaviyo_worker.pubsub")

MAX_LEASE_DURATION = 7 * 86400.0  # seconds for which the client extends leases; longer than the worker holds messages
MAX_DELAY = 600  # seconds, Pub/Sub's limit
CALL_TIMEOUT = 10.0  # seconds for one call
DEAD_LETTER_TIMEOUT = 5.0  # seconds of retries to publish a dead letter; then the message is redelivered
MAX_BATCH = 1000  # messages in a call to publish, Pub/Sub's limit
MAX_BATCH_BYTES = 5_000_000  # of the bodies in a call to publish, half of Pub/Sub's limit
MAX_ATTRIBUTE = 1024  # bytes of an attribute's value
_EXPECTED = "expected pubsub://PROJECT/SUBSCRIPTION"
_URL = re.compile(r"(?i:pubsub)://(?P<project>[^/?#]+)/(?P<subscription>[A-Za-z][A-Za-z0-9._~+%-]{2,254})")
_DELETED_TOPIC = "_deleted-topic_"
_DIRECT_MODE = "KLAVIYO_WORKER_DEAD_LETTER_MODE=direct"
_CONSUME = "pubsub.subscriptions.consume"
_RETRY = Retry(predicate=if_exception_type(*TRANSIENT_ERRORS), initial=0.2, maximum=5.0, timeout=30.0)


@dataclass(frozen=True, slots=True)
class PubSubDelivery:
    """A leased message. `attempt` is None if the subscription has no dead-letter policy."""

    id: str
    body: bytes = field(repr=False)
    attributes: Mapping[str, str]
    attempt: int | None
    published_at: datetime
    message: Message = field(repr=False)


def open_url(url: str, options: QueueOptions) -> PubSubQueue:
    """Open `pubsub://PROJECT/SUBSCRIPTION`. PUBSUB_EMULATOR_HOST, if set, is the address of an emulator."""
    path = _path(url, "QUEUE_URL")
    try:
        return PubSubQueue(path, options)
    except GoogleAuthError as error:
        todo = "set GOOGLE_APPLICATION_CREDENTIALS, or run under a service account"
        raise QueueError(f"QUEUE_URL: no Google credentials ({type(error).__name__})", todo=todo) from None


def _path(url: str, setting: str) -> str:
    named = _URL.fullmatch(url)
    if named is None:
        raise QueueURLError(f"{setting} is malformed", todo=_EXPECTED)
    return f"projects/{named['project']}/subscriptions/{named['subscription']}"


class PubSubQueue:
    """A subscription. Implements QueueAdapter, SupportsPublish, SupportsDeadLetters and SupportsDestination."""

    def __init__(self, path: str, options: QueueOptions, *, lease_seconds: int = LEASE_SECONDS) -> None:
        self._path = path
        self._lease_seconds = lease_seconds
        self._options = options
        self._client = SubscriberClient(transport=open_transport(SubscriberGrpcTransport))
        flow_control = FlowControl(
            max_messages=options.max_messages,
            max_bytes=options.max_bytes,
            max_lease_duration=MAX_LEASE_DURATION,
            min_duration_per_lease_extension=lease_seconds,
        )
        self._settlement = Settlement(self._client, path)
        self._stream = StreamingPull(_open_stream_client, path, flow_control)
        self._topic = ""  # "" if it was not read yet
        self._dead_letter_topic = ""  # "" if the subscription has none or was not read yet
        self._max_attempts = math.inf
        self._has_retry_policy = False  # False also if unknown
        self._expected_redeliveries = ExpectedRedeliveries()

    @property
    def lease_seconds(self) -> float:
        """The ack deadline of received messages. The client extends it too, but only while its stream is open."""
        return self._lease_seconds

    def receive(self, max_messages: int, wait: float) -> Sequence[PubSubDelivery]:
        """Return messages that the stream has received."""
        deliveries = [_delivery(message) for message in self._stream.receive(max_messages, wait)]
        self._expected_redeliveries.remove(delivery.id for delivery in deliveries)
        return deliveries

    def ack(self, deliveries: Sequence[Delivery]) -> None:
        """Acknowledge the messages. Retry for as long as the leases can last."""
        self._expected_redeliveries.remove(delivery.id for delivery in deliveries)
        messages = _messages(deliveries)
        self._settlement.ack(messages)
        for message in messages:
            message.drop()

    def nack(self, deliveries: Sequence[Delivery], delay: float = 0.0, failure: Failure | None = None) -> None:
        """End the leases immediately if a retry policy delays redeliveries; otherwise after `delay`, at most 600 s.

        The delay of messages that did not fail is always kept: another worker must not receive them earlier.

        A delayed message stays leased and counts against the flow control of this worker's stream: if many messages
        are delayed, the stream delivers no new ones. Every delivery counts as an attempt, even if the worker did not
        process the message.
        """
        for delivery in deliveries:
            if not self._is_last(delivery):
                self._expected_redeliveries.add([delivery.id])
            elif failure is not None:
                fields = {"reason": failure.reason, "stage": failure.stage, "error": failure.error}
                log.error("attempts_exhausted", extra={"message_id": delivery.id, **fields})
        messages = _messages(deliveries)
        for message in messages:  # first, so that the client does not extend the leases again
            message.drop()
        is_failed = failure is not None and not isinstance(failure, Interruption)
        is_delayed_by_policy = self._has_retry_policy and is_failed
        seconds = 0 if is_delayed_by_policy else min(math.ceil(max(delay, 0.0)), MAX_DELAY)
        self._settlement.nack(messages, seconds)

    def dead_letter(self, delivery: Delivery, failure: Failure) -> bool:
        """In direct mode, publish the message to the dead-letter topic. Otherwise, or if that fails, nack it.

        Return True if the message was published, or if the dead-letter policy moves it after this attempt.

        Without a dead-letter policy, Pub/Sub redelivers indefinitely, so the message is delayed as long as possible.
        """
        if self._options.direct_dead_letter and self._publish_dead_letter(delivery, failure):
            self.ack([delivery])
            return True
        self.nack([delivery], MAX_DELAY if delivery.attempt is None else 0.0, failure)
        return self._is_last(delivery)

    def extend(self, deliveries: Sequence[Delivery], seconds: float) -> None:
        """Extend the leases, including those of pending messages: without a stream, the client does not extend them."""
        messages = [*_messages(deliveries), *self._stream.pending()]
        if not self._settlement.extend(messages, math.ceil(seconds)):
            raise QueueError("some leases could not be extended")

    def backlog(self) -> int | None:
        """Return the number of messages nacked and not redelivered yet, because Pub/Sub does not report its backlog."""
        return len(self._expected_redeliveries) or None

    def check(self) -> Sequence[QueueWarning]:
        """Read the subscription and its policies. Raises QueueError if it cannot be used in the configured mode."""
        subscription = self._read_subscription()
        self._check_permission()
        if subscription is None:
            if self._options.direct_dead_letter:
                reason = f"{_DIRECT_MODE}: {self._unreadable}, so its dead-letter topic is unknown"
                raise QueueError(reason, todo=self._grant_viewer)
            return [QueueWarning(f"{self._unreadable}, so its policies are unknown", self._grant_viewer)]
        if self._options.direct_dead_letter and not self._dead_letter_topic:
            reason = f"{_DIRECT_MODE}: {self._path} has no dead-letter topic"
            raise QueueError(reason, todo=SET_DEAD_LETTER_TOPIC.format(self._path))
        if subscription.topic == _DELETED_TOPIC:
            todo = "delete the subscription, and create it again on the topic to which commercetools publishes"
            raise QueueError(f"QUEUE_URL: the topic of {self._path} was deleted", todo=todo)
        if subscription.push_config.push_endpoint:
            raise QueueError(
                f"QUEUE_URL: {self._path} is a push subscription", todo="use push://HOST:PORT, or a pull subscription"
            )
        return list(policy_warnings(subscription, self._lease_seconds))

    def destination(self) -> str:
        """Return the URL of the subscription's topic; "" if this process has no permission to read it."""
        match = re.fullmatch("projects/(.+)/topics/(.+)", self._topic)
        return f"pubsub://{match[1]}/{match[2]}" if match else ""

    def stop(self) -> None:
        """Stop the stream and nack pending messages."""
        self._settlement.nack(self._stream.stop(), 0)

    def close(self) -> None:
        """Stop, and close the connections."""
        self.stop()
        self._client.close()
        if "_publisher" in vars(self):
            self._publisher.transport.close()  # type: ignore[no-untyped-call]

    def publish(self, bodies: Iterable[bytes]) -> int:
        """Publish the messages to the subscription's topic, in order."""
        subscription = self._read_subscription()
        if subscription is None:
            raise QueueError(f"QUEUE_URL: {self._unreadable}, so its topic is unknown", todo=self._grant_viewer)
        stored = 0
        for batch in chunked(bodies, len, MAX_BATCH_BYTES, MAX_BATCH):
            if b"" in batch:
                empty = f"message {stored + batch.index(b'') + 1} is empty, which Pub/Sub does not accept"
                raise QueueError(f"QUEUE_URL: {stored} messages were published, then: {empty}")
            try:
                request = {"topic": subscription.topic, "messages": [{"data": body} for body in batch]}
                self._publisher.publish(request=request, retry=_RETRY, timeout=CALL_TIMEOUT)
            except google.GoogleAPIError as error:
                raise QueueError(f"QUEUE_URL: {stored} messages were published, then: {error}") from None
            stored += len(batch)
        return stored

    def dead_letters(self) -> LeasedDeadLetters:
        """Open the subscription of the dead-letter topic. Close it before the queue."""
        given = self._options.dead_letter_url
        path = _path(given, dead_letters.DEAD_LETTER_SETTING) if given else self._dead_letter_path()
        if path == self._path:
            raise QueueURLError(
                f"{dead_letters.DEAD_LETTER_SETTING} names the same subscription as QUEUE_URL",
                todo="set it to the subscription of the dead-letter topic",
            )
        return LeasedDeadLetters(dead_letters.PubSubDeadLetters(self._client, path))

    @cached_property
    def _publisher(self) -> PublisherClient:
        return PublisherClient(transport=open_transport(PublisherGrpcTransport))

    @property
    def _unreadable(self) -> str:
        return f"not permitted to read {self._path}"

    @property
    def _grant_viewer(self) -> str:
        return f"grant roles/pubsub.viewer on {self._path}"

    def _read_subscription(self) -> Subscription | None:
        """Read the subscription and store its policies. Return None if this process is not permitted to read it."""
        try:
            subscription: Subscription = self._client.get_subscription(
                request={"subscription": self._path}, retry=_RETRY, timeout=CALL_TIMEOUT
            )
        except google.PermissionDenied:
            return None
        except google.NotFound:
            raise QueueError(f"QUEUE_URL: {self._path} does not exist", todo="create it, or correct the name") from None
        except google.Unauthenticated:
            reason = f"QUEUE_URL: Google refuses the credentials for {self._path}"
            todo = "check GOOGLE_APPLICATION_CREDENTIALS, and the clock of this machine"
            raise QueueError(reason, todo=todo) from None
        except (google.GoogleAPIError, GoogleAuthError) as error:
            reason = f"QUEUE_URL: cannot reach Pub/Sub for {self._path}"
            if proxy.is_refusal(str(error)):
                raise QueueError(f"{reason}: {proxy.REFUSED}", todo=proxy.ADVICE) from None
            raise QueueError(f"{reason}: {error}") from None
        self._topic = subscription.topic
        self._dead_letter_topic = subscription.dead_letter_policy.dead_letter_topic
        self._max_attempts = subscription.dead_letter_policy.max_delivery_attempts or self._max_attempts
        self._has_retry_policy = "retry_policy" in subscription
        return subscription

    def _dead_letter_path(self) -> str:
        if self._read_subscription() is None:
            todo = f"{self._grant_viewer}, or set {dead_letters.DEAD_LETTER_SETTING}"
            raise QueueError(f"QUEUE_URL: {self._unreadable}, so its dead-letter topic is unknown", todo=todo)
        if not self._dead_letter_topic:
            raise QueueError(
                f"QUEUE_URL: {self._path} has no dead-letter topic", todo=SET_DEAD_LETTER_TOPIC.format(self._path)
            )
        return dead_letters.find_dead_letter_subscription(self._dead_letter_topic, self._publisher, self._client)

    def _check_permission(self) -> None:
        request = {"resource": self._path, "permissions": [_CONSUME]}
        try:
            allowed = self._client.test_iam_permissions(request=request, retry=_RETRY, timeout=CALL_TIMEOUT)
        except google.MethodNotImplemented:  # the emulator has no permissions
            return
        except google.GoogleAPIError as error:
            raise QueueError(f"QUEUE_URL: cannot read the permissions on {self._path}: {error}") from None
        if _CONSUME not in allowed.permissions:
            raise QueueError(
                f"QUEUE_URL: not permitted to consume {self._path}",
                todo=f"grant roles/pubsub.subscriber on {self._path}",
            )

    def _is_last(self, delivery: Delivery) -> bool:
        """Return whether the dead-letter policy dead-letters this message if it is nacked now."""
        return delivery.attempt is not None and delivery.attempt >= self._max_attempts

    def _publish_dead_letter(self, delivery: Delivery, failure: Failure) -> bool:
        """Publish the message to the dead-letter topic with its reason; return whether that succeeded."""
        attributes = {
            **delivery.attributes,
            **{name: value for name, value in asdict(failure).items() if value},
            "subscription": self._path,
            "message_id": delivery.id,
            "attempt": str(delivery.attempt),
        }
        truncated = {name: value.encode()[:MAX_ATTRIBUTE].decode(errors="ignore") for name, value in attributes.items()}
        request = {"topic": self._dead_letter_topic, "messages": [{"data": delivery.body, "attributes": truncated}]}
        try:
            retry = _RETRY.with_timeout(DEAD_LETTER_TIMEOUT)
            self._publisher.publish(request=request, retry=retry, timeout=CALL_TIMEOUT)
        except (google.GoogleAPIError, GoogleAuthError) as error:
            log.warning("dead_letter_failed", extra={"message_id": delivery.id, "reason": str(error)})
            return False
        return True


def _messages(deliveries: Sequence[Delivery]) -> list[Message]:
    return [delivery.message for delivery in deliveries if isinstance(delivery, PubSubDelivery)]


def _delivery(message: Message) -> PubSubDelivery:
    return PubSubDelivery(
        message.message_id,
        message.data,
        dict(message.attributes),
        message.delivery_attempt,
        message.publish_time,
        message,
    )


def _open_stream_client() -> StreamClient:
    return StreamClient(transport=open_transport(SubscriberGrpcTransport))
