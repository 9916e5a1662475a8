"""Azure Service Bus adapter. receiver.py receives messages, settlement.py settles them."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from azure.identity import DefaultAzureCredential
from azure.servicebus import (
    ServiceBusClient,
    ServiceBusMessage,
    ServiceBusMessageBatch,
    ServiceBusReceiver,
    ServiceBusSender,
    ServiceBusSubQueue,
    parse_connection_string,
)
from azure.servicebus.exceptions import (
    MessageSizeExceededError,
    MessagingEntityDisabledError,
    MessagingEntityNotFoundError,
)

from adapters.base import Interruption, QueueError, QueueURLError
from adapters.servicebus.connections import FAILURES, close_in_background, first_line, is_refusal, open_with_timeout
from adapters.servicebus.dead_letter_reason import format_reason
from adapters.servicebus.dead_letters import ServiceBusDeadLetters
from adapters.servicebus.delay_queue import DelayQueue
from adapters.servicebus.lock_duration import LockDuration
from adapters.servicebus.message import ServiceBusDelivery
from adapters.servicebus.receiver import MAX_PREFETCH, Receiver
from adapters.servicebus.settlement import ReceiverPool, Settlement
from adapters.shared.loopback import is_loopback
from adapters.shared.redeliveries import ExpectedRedeliveries

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from azure.servicebus import ServiceBusReceivedMessage

    from adapters.base import Delivery, Failure, QueueOptions, QueueWarning

CALL_TIMEOUT = 5.0  # seconds for one call, or for opening a receiver
MAX_BATCH = 1000  # messages in a call to publish
_EXPECTED = "expected servicebus://NAMESPACE.servicebus.windows.net/QUEUE or /TOPIC/SUBSCRIPTION"
_SECRET = "SERVICEBUS_CONNECTION_STRING"  # noqa: S105 - its name
_NO_TLS = re.compile(r";\s*UseDevelopmentEmulator\s*=\s*true", re.IGNORECASE)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._~/-]{0,259}")

_PUBLISH_RETRIES, _BACKOFF = 3, 0.3  # of the SDK: after 0.6, 1.2 and 2.4 seconds


@dataclass(frozen=True, slots=True)
class Entity:
    """A queue, or a subscription of a topic."""

    host: str  # of the namespace; with a port if it is an emulator
    name: str  # of the queue or of the topic
    subscription: str = ""  # "" if it is a queue

    def __str__(self) -> str:
        return "/".join(filter(None, (self.host, self.name, self.subscription)))


def open_url(url: str, options: QueueOptions) -> ServiceBusQueue:
    """Open `servicebus://HOST/QUEUE` or `servicebus://HOST/TOPIC/SUBSCRIPTION`; names can be percent-encoded."""
    entity = parse_url(url)
    if options.connection_string:
        check_connection_string(options.connection_string, entity)
    return ServiceBusQueue(entity, options)


def parse_url(url: str) -> Entity:
    """Return the entity of a URL. Raises QueueURLError."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise QueueURLError("QUEUE_URL is malformed", todo=_EXPECTED) from None
    names = [unquote(name) for name in parts.path.removeprefix("/").split("/")]
    is_host = parts.hostname is not None and re.fullmatch(r"[a-z0-9-]+(\.[a-z0-9-]+)+|localhost", parts.hostname)
    if not is_host or parts.username is not None or parts.query or parts.fragment or len(names) > 2:  # noqa: PLR2004
        raise QueueURLError("QUEUE_URL is malformed", todo=_EXPECTED)
    if not all(_NAME.fullmatch(name) for name in names):
        raise QueueURLError("QUEUE_URL is malformed", todo=_EXPECTED)
    return Entity(f"{parts.hostname}:{port}" if port else str(parts.hostname), *names)


def check_connection_string(connection_string: str, entity: Entity) -> None:
    """Raise QueueURLError if a connection string is not for this entity; the error does not quote it."""
    try:
        parsed = parse_connection_string(connection_string)
        host = urlsplit(parsed.endpoint).netloc.lower()
    except ValueError:
        expected = "Endpoint=sb://NAMESPACE.servicebus.windows.net/;SharedAccessKeyName=...;SharedAccessKey=..."
        raise QueueURLError(f"{_SECRET} is malformed", todo=f"expected {expected}") from None
    if host != entity.host:
        raise QueueURLError(
            f"{_SECRET} is not for the namespace of QUEUE_URL, {entity.host}", todo="correct one of them"
        )
    if parsed.entity_path and parsed.entity_path != entity.name:
        raise QueueURLError(
            f"{_SECRET} is not for the queue or topic of QUEUE_URL, {entity}", todo="correct one of them"
        )
    if _NO_TLS.search(connection_string) and not is_loopback(urlsplit(f"//{host}").hostname or ""):
        raise QueueURLError(f"{_SECRET}: UseDevelopmentEmulator, which turns TLS off, is for this machine only")


class ServiceBusQueue:
    """A queue or a subscription. Implements QueueAdapter and every optional protocol except SupportsCounts."""

    def __init__(self, entity: Entity, options: QueueOptions) -> None:
        self._entity = entity
        self._connection_string = options.connection_string
        self._credential = None if options.connection_string else DefaultAzureCredential()
        self._client = self._make_client(retries=0)
        # A thread of the SDK can read from a link at the same time as the receiving thread. Messages then get the lock
        # tokens of other messages. `keep_alive=0` turns that thread off, but only if messages are prefetched.
        prefetch = max(min(MAX_PREFETCH, options.max_messages) - 1, 1)
        connect = partial(self._open_receiver, prefetch_count=prefetch, keep_alive=0)
        self._receiver = Receiver(connect, options.max_bytes)
        self._settlement = Settlement(self._open_receiver)
        self._delay_queue: DelayQueue[ServiceBusReceivedMessage] = DelayQueue(
            options.max_messages, self._settlement.nack
        )
        self._expected_redeliveries = ExpectedRedeliveries()
        self._lock_duration = LockDuration()

    @property
    def lease_seconds(self) -> float:
        """The duration of a lock, estimated from received messages. Before the first message, the shortest possible."""
        return self._lock_duration.seconds

    def receive(self, max_messages: int, wait: float) -> Sequence[ServiceBusDelivery]:
        """Return messages that have arrived."""
        deliveries = self._receiver.receive(max_messages, wait)
        self._expected_redeliveries.remove(delivery.sequence_number for delivery in deliveries)
        self._lock_duration.update(_messages(deliveries))
        return deliveries

    def ack(self, deliveries: Sequence[Delivery]) -> None:
        """Complete the messages. Retry for as long as the locks can last."""
        self._expected_redeliveries.remove(delivery.sequence_number for delivery in _deliveries(deliveries))
        self._settlement.ack(_messages(deliveries), self._lock_duration.seconds)

    def nack(self, deliveries: Sequence[Delivery], delay: float = 0.0, failure: Failure | None = None) -> None:
        """Abandon the messages immediately, or after `delay`; until then they stay locked by this worker.

        Service Bus has no delayed abandon, and cannot keep a failure. Every delivery counts as an attempt, even if the
        worker did not process the message. At most `max_messages` are delayed: if there are more, those due first are
        abandoned early. After `stop`, none is delayed, except that those whose delay must be kept stay locked for the
        duration of a lock.
        """
        self._expected_redeliveries.add(delivery.sequence_number for delivery in _deliveries(deliveries))
        messages = _messages(deliveries)
        is_failed = failure is not None and not isinstance(failure, Interruption)
        if delay > 0 and self._delay_queue.is_closed and not is_failed:
            self._settlement.extend(messages)
            return
        self._settlement.nack(self._delay_queue.put(messages, delay) if delay > 0 else messages)

    def dead_letter(self, delivery: Delivery, failure: Failure) -> bool:
        """Move the message to the dead-letter queue, with a short reason and a description."""
        reason, description = format_reason(failure, delivery.attempt, datetime.now(UTC))
        (message,) = _messages([delivery])
        return self._settlement.dead_letter(message, reason, description)

    def extend(self, deliveries: Sequence[Delivery], seconds: float) -> None:  # noqa: ARG002 - the queue sets the duration
        """Renew the locks, including those of pending and of delayed messages."""
        messages = [*_messages(deliveries), *_messages(self._receiver.pending()), *self._delay_queue.items()]
        if not self._settlement.extend(messages):
            raise QueueError("some locks could not be renewed")
        self._lock_duration.update(messages)

    def backlog(self) -> int | None:
        """Return the number of messages nacked and not redelivered yet: the real backlog requires the Manage claim."""
        return len(self._expected_redeliveries) or None

    def check(self) -> Sequence[QueueWarning]:
        """Read a message without a lock, which requires the Listen claim. Raises QueueError if that fails."""
        pool = ReceiverPool(self._open_receiver)
        try:
            (error,) = pool.run([ServiceBusReceiver.peek_messages])
        finally:
            pool.close(0.0)
        if error is not None:
            raise self._queue_error(error) from None
        return []

    def destination(self) -> str:
        """Return the URL of the queue or of the topic."""
        return f"servicebus://{self._entity.host}/{self._entity.name}"

    def stop(self) -> None:
        """Stop receiving. Abandon pending and delayed messages."""
        self._settlement.nack([*_messages(self._receiver.stop()), *self._delay_queue.close()])

    def close(self) -> None:
        """Stop, and close the connections."""
        self.stop()
        self._receiver.close()
        self._settlement.close()
        if self._credential is not None:
            self._credential.close()

    def dead_letters(self) -> ServiceBusDeadLetters:
        """Open the dead-letter queue, which requires only the Listen claim."""
        connect = partial(self._open_receiver, sub_queue=ServiceBusSubQueue.DEAD_LETTER)
        dead_letters = ServiceBusDeadLetters(connect, self._queue_error)
        try:
            dead_letters.check()
        except QueueError:
            dead_letters.close()
            raise
        return dead_letters

    def publish(self, bodies: Iterable[bytes]) -> int:
        """Publish to the queue or the topic, in order, in batches of the size that it allows."""
        stored = 0
        sender = self._sender()
        try:
            for batch in _batches(open_with_timeout(sender), bodies):
                sender.send_messages(batch)
                stored += len(batch)
        except MessageSizeExceededError:
            raise QueueError(f"QUEUE_URL: {stored} messages were published, then one was too large") from None
        except FAILURES as error:
            raise self._queue_error(error, f"{stored} messages were published, then: ") from None
        finally:
            close_in_background(sender)
        return stored

    def _make_client(self, retries: int) -> ServiceBusClient:
        options: dict[str, Any] = {
            "retry_total": retries,
            "retry_backoff_factor": _BACKOFF,
            "try_timeout": CALL_TIMEOUT,
        }
        if bundle := os.environ.get("SSL_CERT_FILE"):  # the SDK reads no variable
            options["connection_verify"] = bundle
        if self._credential is None:
            return ServiceBusClient.from_connection_string(self._connection_string, **options)
        return ServiceBusClient(self._entity.host, self._credential, **options)

    def _open_receiver(self, **options: Any) -> ServiceBusReceiver:
        """Return a receiver with its own connection."""
        name, subscription = self._entity.name, self._entity.subscription
        if subscription:
            return open_with_timeout(self._client.get_subscription_receiver(name, subscription, **options))
        return open_with_timeout(self._client.get_queue_receiver(name, **options))

    def _sender(self) -> ServiceBusSender:
        client, name = self._make_client(_PUBLISH_RETRIES), self._entity.name
        return client.get_topic_sender(name) if self._entity.subscription else client.get_queue_sender(name)

    def _queue_error(self, error: BaseException, prefix: str = "") -> QueueError:
        """Return an error that says what is wrong with the queue, and what to do."""
        reason, todo = f"cannot reach {self._entity}: {first_line(error)}", ""
        if isinstance(error, MessagingEntityNotFoundError):
            reason, todo = f"{self._entity} does not exist", "create it, or correct the name"
        elif isinstance(error, MessagingEntityDisabledError):
            reason, todo = f"{self._entity} is disabled", "set its status to Active"
        elif is_refusal(error):
            reason = f"not permitted to use {self._entity} ({first_line(error)})"
            todo = (
                f"grant the role Azure Service Bus Data Receiver on {self._entity}, or a {_SECRET} with Listen rights"
            )
        return QueueError(f"QUEUE_URL: {prefix}{reason}", todo=todo)


def _deliveries(deliveries: Sequence[Delivery]) -> list[ServiceBusDelivery]:
    return [delivery for delivery in deliveries if isinstance(delivery, ServiceBusDelivery)]


def _messages(deliveries: Sequence[Delivery]) -> list[ServiceBusReceivedMessage]:
    return [delivery.message for delivery in _deliveries(deliveries)]


def _batches(sender: ServiceBusSender, bodies: Iterable[bytes]) -> Iterator[ServiceBusMessageBatch]:
    """Split messages into batches. Raises MessageSizeExceededError for a message that is too large for any."""
    batch = sender.create_message_batch()
    for body in bodies:
        message = ServiceBusMessage(body)
        if len(batch) < MAX_BATCH:
            try:
                batch.add_message(message)
            except MessageSizeExceededError:
                if not len(batch):
                    raise
            else:
                continue
        yield batch
        batch = sender.create_message_batch()
        batch.add_message(message)
    if len(batch):
        yield batch
