"""Azure Service Bus: what a queue, or a subscription of a topic, has to do with a queue of ours.

Messages come by adapters/servicebus_receiving.py, and are settled by adapters/servicebus_settlement.py.
"""

from __future__ import annotations

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

from adapters.base import QueueError, QueueURLError
from adapters.servicebus.connections import FAILURES, close_soon, in_short, is_refusal, opened
from adapters.servicebus.dead_letter_reason import written
from adapters.servicebus.dead_letters import ServiceBusDeadLetters
from adapters.servicebus.delay_queue import Parking
from adapters.servicebus.lock_duration import Lease
from adapters.servicebus.message import ServiceBusDelivery
from adapters.servicebus.receiver import MOST_AT_ONCE, Receiving
from adapters.servicebus.settlement import Settlement, Threads
from adapters.shared.loopback import is_loopback
from adapters.shared.redeliveries import Awaited

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
_ROLE = f"grant the role Azure Service Bus Data Receiver on it, or set {_SECRET} to one with Listen rights"
_PUBLISH_RETRIES, _BACKOFF = 3, 0.3  # by the SDK: after 0.6, 1.2 and 2.4 seconds


@dataclass(frozen=True, slots=True)
class Entity:
    """A queue (no subscription), or a subscription of a topic."""

    host: str  # of the namespace; with a port for an emulator
    name: str  # of the queue or the topic
    subscription: str = ""

    def __str__(self) -> str:
        return "/".join(filter(None, (self.host, self.name, self.subscription)))


def open_url(url: str, options: QueueOptions) -> ServiceBusQueue:
    """Open `servicebus://HOST/QUEUE` or `servicebus://HOST/TOPIC/SUBSCRIPTION`; names are percent-decoded."""
    entity = parse_url(url)
    if options.connection_string:
        fits(options.connection_string, entity)
    return ServiceBusQueue(entity, options)


def parse_url(url: str) -> Entity:
    """Return what a URL names. Raises QueueURLError."""
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


def fits(connection_string: str, entity: Entity) -> None:
    """Raise QueueURLError unless a connection string is for this queue; the error does not quote it."""
    try:
        about = parse_connection_string(connection_string)
        host = urlsplit(about.endpoint).netloc.lower()
    except ValueError:
        expected = "Endpoint=sb://NAMESPACE.servicebus.windows.net/;SharedAccessKeyName=...;SharedAccessKey=..."
        raise QueueURLError(f"{_SECRET} is malformed", todo=f"expected {expected}") from None
    if host != entity.host:
        raise QueueURLError(
            f"{_SECRET} is for another namespace than QUEUE_URL, {entity.host}", todo="correct one of them"
        )
    if about.entity_path and about.entity_path != entity.name:
        raise QueueURLError(
            f"{_SECRET} is for another queue or topic than QUEUE_URL, {entity}", todo="correct one of them"
        )
    if _NO_TLS.search(connection_string) and not is_loopback(urlsplit(f"//{host}").hostname or ""):
        raise QueueURLError(f"{_SECRET}: UseDevelopmentEmulator, which turns TLS off, is for this machine only")


class ServiceBusQueue:
    """A queue or a subscription. Implements QueueAdapter, SupportsPublish and SupportsDeadLetters."""

    def __init__(self, entity: Entity, options: QueueOptions) -> None:
        self._entity = entity
        self._connection_string = options.connection_string
        self._credential = None if options.connection_string else DefaultAzureCredential()
        self._client = self._make_client(retries=0)
        # The SDK reads from a link now and then on a thread of its own, beside ours, and then mixes up messages and
        # lock tokens. `keep_alive` turns that off, but only where something is prefetched.
        prefetch = max(min(MOST_AT_ONCE, options.max_messages) - 1, 1)
        receiving = partial(self._open_receiver, prefetch_count=prefetch, keep_alive=0)
        self._receiving = Receiving(receiving, options.max_bytes)
        self._settlement = Settlement(self._open_receiver)
        self._parking: Parking[ServiceBusReceivedMessage] = Parking(options.max_messages, self._settlement.abandon)
        self._awaited = Awaited()
        self._lease = Lease()

    @property
    def lease_seconds(self) -> float:
        """Seconds a lock lasts, as the messages tell; the shortest there is until one came."""
        return self._lease.seconds

    def receive(self, max_messages: int, wait: float) -> Sequence[ServiceBusDelivery]:
        """Return what arrived."""
        deliveries = self._receiving.take(max_messages, wait)
        self._awaited.came(delivery.sequence_number for delivery in deliveries)
        self._lease.note(_messages(deliveries))
        return deliveries

    def ack(self, deliveries: Sequence[Delivery]) -> None:
        """Complete, insisting for as long as the locks may hold."""
        self._awaited.came(delivery.sequence_number for delivery in _deliveries(deliveries))
        self._settlement.complete(_messages(deliveries), self._lease.seconds)

    def nack(self, deliveries: Sequence[Delivery], delay: float = 0.0, failure: Failure | None = None) -> None:  # noqa: ARG002 - there is no place for a failure
        """Abandon, at once or after `delay`; until then the messages stay locked, here.

        Service Bus cannot delay an abandon, and every one costs a delivery attempt, handled or not. No more than
        `max_messages` are held so: beyond that, and once stopped, those that are due first go back at once.
        """
        self._awaited.note(delivery.sequence_number for delivery in _deliveries(deliveries))
        messages = _messages(deliveries)
        self._settlement.abandon(self._parking.park(messages, delay) if delay > 0 else messages)

    def dead_letter(self, delivery: Delivery, failure: Failure) -> bool:
        """Move the message to the queue's dead letters, with a reason in short and in a sentence."""
        reason, description = written(failure, delivery.attempt, datetime.now(UTC))
        (message,) = _messages([delivery])
        return self._settlement.bury(message, reason, description)

    def extend(self, deliveries: Sequence[Delivery], seconds: float) -> None:  # noqa: ARG002 - the queue decides for how long
        """Renew the locks of these, of what waits to be received, and of what waits to go back."""
        messages = [*_messages(deliveries), *_messages(self._receiving.waiting()), *self._parking.parked()]
        if not self._settlement.extend(messages):
            raise QueueError("Service Bus was not told of all leases")
        self._lease.note(messages)

    def backlog(self) -> int | None:
        """Count what was sent back and is expected again; to ask Service Bus takes the right to manage it."""
        return len(self._awaited) or None

    def check(self) -> Sequence[QueueWarning]:
        """Peek, which takes the right to listen. Raises QueueError when that is not possible."""
        threads = Threads(self._open_receiver)
        try:
            (error,) = threads.run([ServiceBusReceiver.peek_messages])
        finally:
            threads.close(0.0)
        if error is not None:
            raise self._explain(error) from None
        return []

    def stop(self) -> None:
        """Stop receiving; return what was not received and what waits to go back."""
        self._settlement.abandon([*_messages(self._receiving.stop()), *self._parking.close()])

    def close(self) -> None:
        """Stop, and close the connections."""
        self.stop()
        self._receiving.close()
        self._settlement.close()
        if self._credential is not None:
            self._credential.close()

    def dead_letters(self) -> ServiceBusDeadLetters:
        """Open the dead letters, for which the right to listen is enough."""
        connect = partial(self._open_receiver, sub_queue=ServiceBusSubQueue.DEAD_LETTER)
        letters = ServiceBusDeadLetters(connect, self._explain)
        try:
            letters.check()
        except QueueError:
            letters.close()
            raise
        return letters

    def publish(self, bodies: Iterable[bytes]) -> int:
        """Publish to the queue or the topic, in order, in batches of the size that it takes."""
        stored = 0
        sender = self._sender()
        try:
            for batch in _batches(opened(sender), bodies):
                sender.send_messages(batch)
                stored += len(batch)
        except MessageSizeExceededError:
            raise QueueError(f"QUEUE_URL: {stored} messages were published, then one was too large") from None
        except FAILURES as error:
            raise self._explain(error, f"{stored} messages were published, then: ") from None
        finally:
            close_soon(sender)
        return stored

    def _make_client(self, retries: int) -> ServiceBusClient:
        options: dict[str, Any] = {
            "retry_total": retries,
            "retry_backoff_factor": _BACKOFF,
            "try_timeout": CALL_TIMEOUT,
        }
        if self._credential is None:
            return ServiceBusClient.from_connection_string(self._connection_string, **options)
        return ServiceBusClient(self._entity.host, self._credential, **options)

    def _open_receiver(self, **options: Any) -> ServiceBusReceiver:
        """Return a receiver with a connection of its own."""
        name, subscription = self._entity.name, self._entity.subscription
        if subscription:
            return opened(self._client.get_subscription_receiver(name, subscription, **options))
        return opened(self._client.get_queue_receiver(name, **options))

    def _sender(self) -> ServiceBusSender:
        client, name = self._make_client(_PUBLISH_RETRIES), self._entity.name
        return client.get_topic_sender(name) if self._entity.subscription else client.get_queue_sender(name)

    def _explain(self, error: BaseException, prefix: str = "") -> QueueError:
        """Return an error that says what is wrong with the queue, and what to do."""
        reason, todo = f"cannot reach {self._entity}: {in_short(error)}", ""
        if isinstance(error, MessagingEntityNotFoundError):
            reason, todo = f"{self._entity} does not exist", "create it, or correct the name"
        elif isinstance(error, MessagingEntityDisabledError):
            reason, todo = f"{self._entity} is disabled", "set its status to Active"
        elif is_refusal(error):
            reason, todo = f"not permitted to use {self._entity} ({in_short(error)})", _ROLE
        return QueueError(f"QUEUE_URL: {prefix}{reason}", todo=todo)


def _deliveries(deliveries: Sequence[Delivery]) -> list[ServiceBusDelivery]:
    return [delivery for delivery in deliveries if isinstance(delivery, ServiceBusDelivery)]


def _messages(deliveries: Sequence[Delivery]) -> list[ServiceBusReceivedMessage]:
    return [delivery.message for delivery in _deliveries(deliveries)]


def _batches(sender: ServiceBusSender, bodies: Iterable[bytes]) -> Iterator[ServiceBusMessageBatch]:
    """Split what is to be published into batches. Raises MessageSizeExceededError for what fits in none."""
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
