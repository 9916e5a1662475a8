"""The contract between the worker and its queues: the methods that an adapter must implement."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, Protocol, runtime_checkable

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from datetime import datetime


class QueueError(Exception):
    """The queue cannot be used: unreachable, missing, or not permitted.

    `reason` says what is wrong, `todo` what to do about it ("" if there is no advice). The text joins both.
    """

    def __init__(self, reason: str, *, todo: str = "") -> None:
        super().__init__(f"{reason}: {todo}" if todo else reason)
        self.reason = reason
        self.todo = todo


class QueueRefusedError(QueueError):
    """The queue is missing or not permitted. The worker parks and retries until an operator has fixed the cause."""


class QueueURLError(QueueError):
    """The URL of the queue, or a secret that belongs to it, is invalid. `todo` says what was expected."""


@dataclass(frozen=True, slots=True)
class QueueWarning:
    """Something about a queue that an operator should change. It does not stop a worker.

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
    direct_dead_letter: bool = False  # dead-letter at once and with a reason, not by the queue's own policy
    port: int = 6789  # to listen on, if messages are pushed and the URL has no port
    connection_string: str = field(default="", repr=False)  # for Azure Service Bus
    dead_letter_url: str = ""  # of the dead-letter queue to read; "": the queue of the policy


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a message is returned or dead-lettered. Holds no personal data."""

    reason: str  # one sentence for an operator
    stage: str  # parse, enrich, transform or send; queue if the queue itself dead-lettered the message
    error: str  # class name of the error
    message_type: str = ""  # this and the next two only if known; dead letters show them
    resource_type: str = ""
    resource_id: str = ""


class Delivery(Protocol):
    """One hand-over of a message by the queue. An adapter adds what it needs to settle it."""

    @property
    def id(self) -> str:
        """The queue's id of the message, for logs. Redeliveries keep it; a queue's own redrive can change it."""

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
    """A queue that delivers at least once, and leases each delivery to one of any number of workers.

    The worker calls `receive` from one thread and `extend` from another. It calls `ack`, `nack` and `dead_letter` from
    several threads at the same time. Settling a delivery whose lease has ended, and extending such a lease, must do
    nothing and raise nothing: the queue redelivers the message.
    """

    @property
    def lease_seconds(self) -> float | None:
        """Seconds for which a delivery stays leased without `extend`, at least; None if leases need no extension.

        The worker reads it before each extension, so the value can change.
        """

    def receive(self, max_messages: int, wait: float) -> Sequence[Delivery]:
        """Return up to `max_messages` deliveries, or [] if none arrives within `wait` seconds.

        Return as soon as one is there, without waiting for others. The worker calls this method in a loop, with at
        least 1 for `max_messages` and a second or less for `wait`. Log transient errors, return [], and retry in a
        later call.

        Raises QueueError if the queue cannot be read: the worker returns its messages and exits. Raises
        QueueRefusedError if credentials or permissions are refused: the worker parks and calls again later.
        """

    def ack(self, deliveries: Sequence[Delivery]) -> None:
        """Remove the messages permanently: their effect is in Klaviyo, or there is none.

        Retry transient errors while the leases last. If that fails, log it: the queue redelivers the messages.
        """

    def nack(self, deliveries: Sequence[Delivery], delay: float = 0.0, failure: Failure | None = None) -> None:
        """Return the messages. The queue redelivers each of them after at least `delay` seconds.

        If `delay` is longer than the queue supports, use its maximum. If the queue can store `failure`, it is the
        reason of the dead letter when the queue's own policy dead-letters the message later. `failure` is None if the
        worker did not process the messages: the delivery must not count as an attempt if the queue can undo that.
        """

    def dead_letter(self, delivery: Delivery, failure: Failure) -> bool:
        """Move a message that can never succeed to the dead-letter queue, with its reason.

        If that is impossible, nack it. Return whether the message is a dead letter now. If not, the queue redelivers it
        until its own policy dead-letters it.
        """

    def extend(self, deliveries: Sequence[Delivery], seconds: float) -> None:
        """Make the leases end `seconds` from now.

        Called after every third of `lease_seconds`, with all deliveries that are not settled. Also extend the messages
        that the adapter holds and `receive` did not return yet. Raises QueueError if some leases could not be extended.
        """

    def backlog(self) -> int | None:
        """Count the messages that are not settled: ready, delayed and leased.

        `run --once` ends when the backlog is 0. A queue that cannot count returns the number of messages that this
        worker returned and that were not redelivered yet, or None instead of 0.
        """

    def check(self) -> Sequence[QueueWarning]:
        """Return what an operator should change about the queue. Raises QueueError unless this process may consume.

        Called at start-up, by `klaviyo-worker check`, and by `run --once` before it ends without knowing the backlog. A
        missing policy has `is_missing_policy`. A policy that this process has no permission to read is reported as
        unreadable, not as missing.
        """

    def stop(self) -> None:
        """Stop pulling, and return the messages to the queue that `receive` did not return to the worker.

        Called after the last `receive`. The worker settles and extends its messages until `close`.
        """

    def close(self) -> None:
        """Stop, unless `stop` was called, and close the connections. Idempotent."""


class InertQueue:
    """A base class for queues whose messages have no lease, and stay where they are unless they are acked."""

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

    Dead letters that `receive` returned stay reserved for this object until they are removed or the object is closed.
    If its process dies, they are still dead letters.
    """

    def receive(self, max_messages: int, wait: float) -> Sequence[DeadLetter]:
        """Return up to `max_messages` dead letters that were not returned before, the oldest first if known.

        Wait up to `wait` seconds for the first; return [] if none is left. Raises QueueError.
        """

    def remove(self, dead_letters: Sequence[DeadLetter]) -> None:
        """Remove dead letters permanently. Raises QueueError if some of them may still exist."""

    def close(self) -> None:
        """Release the dead letters that were not removed, for the next reader. Idempotent."""


class Counts(NamedTuple):
    """The size of a queue; None for a figure that this process has no permission to read."""

    backlog: int | None  # messages not settled: ready, delayed and leased
    dead_letters: int | None


@runtime_checkable
class SupportsPublish(Protocol):
    """A queue that `klaviyo-worker publish` can fill."""

    def publish(self, bodies: Iterable[bytes]) -> int:
        """Store the messages durably and return their number. Raises QueueError with the number stored before."""


@runtime_checkable
class SupportsCounts(Protocol):
    """A queue that can count all its messages, whichever process published or returned them."""

    def counts(self) -> Counts:
        """Count the messages and the dead letters. Raises QueueError."""


@runtime_checkable
class SupportsDeadLetters(Protocol):
    """A queue whose dead letters `klaviyo-worker dlq` can read."""

    def dead_letters(self) -> DeadLetterQueue:
        """Start a pass through the dead letters. Raises QueueError if there is no dead-letter queue or no access."""
