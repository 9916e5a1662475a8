"""What a queue must do for the worker. Every adapter is a noun in a file of its own and keeps this contract."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, runtime_checkable

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
    """The queue is missing or not permitted. Somebody may mend that while the worker waits."""


class QueueURLError(QueueError):
    """The URL, or a secret for it, names no queue; the text says what was expected."""


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
    """What a worker asks of its queue; an adapter uses what applies to it."""

    max_messages: int = 2_000  # received and not settled, at once
    max_bytes: int = 8_000_000  # of their bodies
    direct_dead_letter: bool = False  # bury with a reason at once, instead of by the queue's own policy
    port: int = 6789  # to listen on, where messages are pushed and the URL names no port
    connection_string: str = field(default="", repr=False)  # where a queue needs one: Azure Service Bus
    dead_letter_url: str = ""  # where dead letters are looked through; "": where the queue's own policy puts them


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a delivery goes back to the queue or to the dead letters. Holds no personal data."""

    reason: str  # one sentence for an operator
    stage: str  # parse, enrich, transform, send; queue when the queue itself gave up
    error: str  # class name of the error
    message_type: str = ""  # as far as it is known; only dead letters need it
    resource_type: str = ""
    resource_id: str = ""


class Delivery(Protocol):
    """One message as the queue handed it over. `id` is for logs only: a replay changes it."""

    @property
    def id(self) -> str:
        """The queue's own name for this message."""

    @property
    def body(self) -> bytes:
        """The message as it was published."""

    @property
    def attributes(self) -> Mapping[str, str]:
        """What the publisher or the queue attached."""

    @property
    def attempt(self) -> int | None:
        """1 for the first delivery; None where the queue does not count."""

    @property
    def published_at(self) -> datetime | None:
        """When the queue took the message; None where it does not tell."""


class QueueAdapter(Protocol):
    """A queue that leases messages, at least once, to any number of workers.

    All methods may be called from several threads. Settling (`ack`, `nack`, `dead_letter`) and `extend` never
    raise for a lease that is lost already: the message will come again, which is no error.
    """

    @property
    def lease(self) -> float | None:
        """Seconds a delivery stays ours without `extend`, as far as is known; None where nothing can extend it."""

    def receive(self, max_messages: int, wait: float) -> Sequence[Delivery]:
        """Return up to `max_messages`, waiting at most `wait` seconds for the first; [] when idle.

        Raises QueueError when the queue can no longer be read, QueueRefusedError when another try may succeed.
        """

    def ack(self, deliveries: Sequence[Delivery]) -> None:
        """Remove the messages for good."""

    def nack(self, deliveries: Sequence[Delivery], delay: float = 0.0, failure: Failure | None = None) -> None:
        """Return the messages, to be redelivered no sooner than `delay` seconds from now.

        `delay` is a hint that a queue clamps to what it can. `failure` is kept with the message where
        the queue can, so that a message the queue's own policy gives up on says why. None: the messages
        were not handled at all, which costs no delivery attempt where the queue can take it back.
        """

    def dead_letter(self, delivery: Delivery, failure: Failure) -> bool:
        """Move the message to the dead letters with its reason; where a queue cannot, nack it.

        Returns whether it is a dead letter now; if not, it comes again until the queue's policy gives up.
        """

    def extend(self, deliveries: Sequence[Delivery], seconds: float) -> None:
        """Keep the leases for `seconds` from now; nothing to do where nothing can extend them.

        Raises QueueError when the queue cannot be told: the leases may end.
        """

    def backlog(self) -> int | None:
        """Count the messages not yet settled: ready, delayed and leased.

        A queue that does not tell answers with what this worker sent back and expects again, or None
        when that is nothing.
        """

    def check(self) -> Sequence[QueueWarning]:
        """Return what an operator should change about the queue. Raises QueueError unless this process may consume.

        A missing policy has `is_missing_policy`. A policy that this process has no permission to read is reported
        as unreadable, not as missing.
        """

    def stop(self) -> None:
        """Stop pulling and return what `receive` never handed out. Settling goes on until `close`."""

    def close(self) -> None:
        """Stop, and let go of the connection. Idempotent."""


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A message given up on."""

    delivery: Delivery
    failure: Failure  # "" for what the queue does not tell
    dead_lettered_at: datetime | None  # None where the queue does not tell


class DeadLetterQueue(Protocol):
    """The dead letters of a queue, looked through once. Methods may be called from several threads.

    What was handed out stays with this object until it is removed or `close` is called; an object that vanishes
    with its process loses nothing, its letters are dead letters still.
    """

    def receive(self, max_messages: int, wait: float) -> Sequence[DeadLetter]:
        """Return letters that were not handed out yet, the oldest first as far as the queue knows.

        Waits at most `wait` seconds for the first; [] when there are no more. Raises QueueError.
        """

    def remove(self, letters: Sequence[DeadLetter]) -> None:
        """Remove letters for good. Raises QueueError when that cannot be told: they may still be there."""

    def close(self) -> None:
        """Leave all others as they were, for whoever looks next. Idempotent."""


@runtime_checkable
class Publisher(Protocol):
    """A queue that `klaviyo-worker publish` can fill."""

    def publish(self, bodies: Iterable[bytes]) -> int:
        """Store the messages durably and return how many. Raises QueueError, saying what of them was stored."""


@runtime_checkable
class Countable(Protocol):
    """A queue that can tell how much it holds, whoever put or sent it there."""

    def counts(self) -> tuple[int | None, int | None]:
        """Return the messages not yet settled, and the dead letters; None for what it is not permitted to tell."""


@runtime_checkable
class DeadLetters(Protocol):
    """A queue whose dead letters `klaviyo-worker dlq` can read."""

    def dead_letters(self) -> DeadLetterQueue:
        """Open the dead letters. Raises QueueError when there are none to be had: no such queue, no right to it."""
