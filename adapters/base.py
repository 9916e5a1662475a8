"""The contract between the worker and its queues: the methods that an adapter must implement."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, Protocol, runtime_checkable

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from datetime import datetime


class QueueError(Exception):
    """The queue cannot be used: it is unreachable or missing, or access to it is refused.

    `reason` says what is wrong, `todo` what to do about it ("" if there is no advice). The text joins both.
    """

    def __init__(self, reason: str, *, todo: str = "") -> None:
        super().__init__(f"{reason}: {todo}" if todo else reason)
        self.reason = reason
        self.todo = todo


class QueueRefusedError(QueueError):
    """The queue is missing, or access to it is refused. The worker parks until an operator fixes the cause."""


class QueueURLError(QueueError):
    """The URL of the queue, or a secret that belongs to it, is invalid. `todo` says what was expected."""


@dataclass(frozen=True, slots=True)
class QueueWarning:
    """A problem of a queue that an operator should fix. It does not stop a worker.

    `is_missing_policy`: the queue lacks a policy that delivery relies on. `klaviyo-worker check` then fails.
    """

    reason: str
    todo: str = ""
    is_missing_policy: bool = False

    def __str__(self) -> str:
        return f"{self.reason}: {self.todo}" if self.todo else self.reason


@dataclass(frozen=True, slots=True)
class QueueOptions:
    """Settings of the worker that concern queues. An adapter ignores those that do not apply to it."""

    max_messages: int = 2_000  # limit of messages received and not settled
    max_bytes: int = 8_000_000  # limit of the total size of their bodies
    direct_dead_letter: bool = False  # dead-letter immediately and with a reason, instead of by the queue's policy
    port: int = 6789  # to listen on, if messages are pushed and the URL has no port
    connection_string: str = field(default="", repr=False)  # for Azure Service Bus
    dead_letter_url: str = ""  # of the dead-letter queue to read; "": the queue of the policy


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a message is nacked or dead-lettered. Contains no personal data."""

    reason: str  # one sentence for an operator
    stage: str  # parse, enrich, transform or send; queue if the queue itself dead-lettered the message
    error: str  # class name of the error
    message_type: str = ""  # "" if unknown
    resource_type: str = ""  # "" if unknown
    resource_id: str = ""  # "" if unknown


@dataclass(frozen=True, slots=True)
class Interruption(Failure):
    """Why a message is nacked although it did not fail: the worker stops, but a request of it can still take effect.

    The delivery counts as an attempt.
    """


class Delivery(Protocol):
    """One hand-over of a message by the queue. An adapter adds what it needs to settle it."""

    @property
    def id(self) -> str:
        """The queue's id of the message, for logs.

        Redeliveries have the same id. It can change if the queue's own tools move a dead letter back to the queue.
        """

    @property
    def body(self) -> bytes:
        """The message as it was published."""

    @property
    def attributes(self) -> Mapping[str, str]:
        """The attributes that the publisher or the queue attached to the message."""

    @property
    def attempt(self) -> int | None:
        """Number of this delivery, 1 for the first; None if the queue does not count."""

    @property
    def published_at(self) -> datetime | None:
        """When the queue accepted the message; None if unknown."""


class QueueAdapter(Protocol):
    """A queue that delivers at least once. Any number of workers can share it: each delivery is leased to one of them.

    The worker calls `receive` from one thread and `extend` from another. It calls `ack`, `nack` and `dead_letter` from
    several threads at the same time. Settling or extending a delivery whose lease has ended must do nothing and raise
    nothing, because the queue redelivers the message.
    """

    @property
    def lease_seconds(self) -> float | None:
        """The minimum number of seconds that a lease lasts without `extend`; None if leases need no extension.

        The value can change: the worker reads it before each extension.
        """

    def receive(self, max_messages: int, wait: float) -> Sequence[Delivery]:
        """Return up to `max_messages` deliveries, or [] if none arrives within `wait` seconds.

        Return as soon as any delivery is available; do not wait for more. The worker calls this method in a loop:
        `max_messages` is at least 1, and `wait` is at most one second. After a transient error, log it and return [];
        retry in a later call.

        Raises QueueError if the queue cannot be read: the worker gives its messages back to the queue and exits.
        Raises QueueRefusedError if credentials or permissions are refused: the worker parks and calls again later.
        """

    def ack(self, deliveries: Sequence[Delivery]) -> None:
        """Remove the messages permanently: their effect is in Klaviyo, or they have none.

        After a transient error, retry while the leases last. If the retries fail, log the error: the queue redelivers
        the messages.
        """

    def nack(self, deliveries: Sequence[Delivery], delay: float = 0.0, failure: Failure | None = None) -> None:
        """Give the messages back to the queue, which redelivers each of them after at least `delay` seconds.

        If `delay` is longer than the queue supports, use the queue's maximum.

        `failure` says why processing failed. Store it if the queue can: if the queue's policy dead-letters the message
        later, this is the reason to report. `failure` is None if the worker returns messages without a result, because
        it stops. A queue that can undo the count does not count those deliveries as attempts. It must not shorten their
        delay, nor that of an Interruption: until then, a bulk job of this worker can overwrite what another worker
        writes.
        """

    def dead_letter(self, delivery: Delivery, failure: Failure) -> bool:
        """Move a message that can never succeed to the dead-letter queue, with its reason.

        If the queue cannot do that, nack the message. Return True if the message is a dead letter now. Return False if
        the queue redelivers it until the queue's policy dead-letters it.
        """

    def extend(self, deliveries: Sequence[Delivery], seconds: float) -> None:
        """Make the leases end `seconds` from now.

        The worker calls this method three times per `lease_seconds`, with all deliveries that are not settled. Also
        extend the messages that the adapter has received and that `receive` has not returned yet. Raises QueueError if
        some leases could not be extended.
        """

    def backlog(self) -> int | None:
        """Return the number of messages on the queue that are not settled: ready, delayed and leased.

        `run --once` ends when the backlog is 0. If the queue cannot count, return the number of messages that this
        worker nacked and that were not redelivered yet; return None instead of 0.
        """

    def check(self) -> Sequence[QueueWarning]:
        """Return warnings for an operator. Raises QueueError if this process cannot consume the queue.

        Called at startup, by `klaviyo-worker check`, and by `run --once` before it ends if the backlog is unknown. Set
        `is_missing_policy` for a missing policy. If this process has no permission to read a policy, warn that the
        policy is unreadable.
        """

    def stop(self) -> None:
        """Stop receiving. Nack the messages that the adapter has received and that `receive` has not returned.

        Called after the last `receive`. The worker can settle and extend deliveries until it calls `close`.
        """

    def close(self) -> None:
        """Stop as `stop` does, and close the connections. Idempotent."""


class InertQueue:
    """A base class for queues without leases. Its methods do nothing, so messages stay in place unless acked."""

    @property
    def lease_seconds(self) -> float | None:
        """None: there is nothing to extend."""
        return None

    def nack(self, deliveries: Sequence[Delivery], delay: float = 0.0, failure: Failure | None = None) -> None:
        """Do nothing."""

    def dead_letter(self, delivery: Delivery, failure: Failure) -> bool:  # noqa: ARG002 - nothing to move
        """Return True."""
        return True

    def extend(self, deliveries: Sequence[Delivery], seconds: float) -> None:
        """Do nothing."""

    def check(self) -> Sequence[QueueWarning]:
        """Return no warnings."""
        return ()

    def stop(self) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A dead-lettered message."""

    delivery: Delivery
    failure: Failure  # fields that the queue does not keep are ""
    dead_lettered_at: datetime | None  # None if the queue does not keep it


class DeadLetterQueue(Protocol):
    """One pass through the dead letters of a queue. Its methods can be called from several threads.

    If the queue leases dead letters, those that `receive` returned stay leased to this object until they are removed or
    the object is closed. If the process dies, they remain dead letters.
    """

    def receive(self, max_messages: int, wait: float) -> Sequence[DeadLetter]:
        """Return up to `max_messages` dead letters that were not returned before, in the order of the queue.

        Wait up to `wait` seconds for the first; return [] if none is left. Raises QueueError.
        """

    def remove(self, dead_letters: Sequence[DeadLetter]) -> None:
        """Remove dead letters permanently. Raises QueueError if some of them possibly still exist."""

    def close(self) -> None:
        """Release the dead letters that were not removed, so that other readers can get them. Idempotent."""


class Counts(NamedTuple):
    """The size of a queue; None for a figure that this process has no permission to read."""

    backlog: int | None  # messages not settled: ready, delayed and leased
    dead_letters: int | None


@runtime_checkable
class SupportsPublish(Protocol):
    """A queue that `klaviyo-worker publish` can fill."""

    def publish(self, bodies: Iterable[bytes]) -> int:
        """Store the messages durably and return their number. A QueueError says how many were stored before it."""


@runtime_checkable
class SupportsCounts(Protocol):
    """A queue that can count all its messages, including those of other processes."""

    def counts(self) -> Counts:
        """Count the messages and the dead letters. Raises QueueError."""


@runtime_checkable
class SupportsDeadLetters(Protocol):
    """A queue whose dead letters `klaviyo-worker dlq` can read."""

    def dead_letters(self) -> DeadLetterQueue:
        """Start a pass through the dead letters. Raises QueueError if there is no dead-letter queue or no access."""


@runtime_checkable
class SupportsDestination(Protocol):
    """A queue that knows where commercetools must publish, so that its messages arrive in the queue."""

    def destination(self) -> str:
        """Return the destination as a URL, see docs/subscriptions.md; "" if unknown. Called after `check`."""
