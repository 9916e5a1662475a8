"""The interface of a rig: a queue on an emulator, with access that does not use the adapter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from contextlib import AbstractContextManager
    from pathlib import Path

    from adapters import Delivery, QueueAdapter


@dataclass(frozen=True, slots=True)
class Guarantees:
    """The differences between queues. tests/contract asserts them, and docs/adapters.md lists them.

    `dead_letter`: when a message can be dead-lettered immediately with its reason: `always`, or only in `direct mode`
    (KLAVIYO_WORKER_DEAD_LETTER_MODE=direct). `keeps_last_reason`: whether a message that the queue's policy
    dead-letters keeps the reason of the last failure.
    """

    in_order: bool  # oldest first, except for redeliveries
    lease_seconds: float | None  # by default; None if the queue sets it
    max_delay: float  # seconds, of a nack
    unhandled_counts_as_attempt: bool  # a nack without a failure counts as an attempt
    dead_letter: Literal["always", "direct mode"]
    keeps_last_reason: bool
    backlog: Literal["exact", "approximate", "returned"]
    max_message_bytes: int
    any_bytes: bool  # False: text only


@dataclass(frozen=True, slots=True)
class StoredDeadLetter:
    """A dead letter as the service stores it: `details` is everything except the body."""

    body: bytes
    details: Mapping[str, str]


class Rig(Protocol):
    """A queue with its own dead-letter queue, on a service that other rigs can share.

    `server`: the emulator of the service; None if the queue needs none. With `kills`, workers are killed, so leases are
    short. Otherwise leases are long, because a busy machine would lose short ones.
    """

    guarantees: ClassVar[Guarantees]
    environment: dict[str, str]  # with QUEUE_URL
    missing_url: str  # of a queue that does not exist
    lease_seconds: float
    attempts: int  # deliveries after which the policy dead-letters a message

    def __init__(self, server: Any, directory: Path, *, kills: bool = False) -> None: ...

    @staticmethod
    def missing() -> str:
        """Return why the emulator cannot run on this machine, or ""."""

    @staticmethod
    def server() -> AbstractContextManager[Any]:
        """Start the emulator."""

    def opener(self, **options: Any) -> Callable[[], QueueAdapter]:
        """Return a function that opens the queue, in this process or in another; `options` as in QueueOptions."""

    def publish(self, bodies: Sequence[bytes]) -> None:
        """Publish messages without the adapter."""

    def is_empty(self) -> bool | None:
        """Return whether every message is settled; None if the service does not report it."""

    def dead_letters(self, at_least: int = 0) -> list[StoredDeadLetter]:
        """Return all dead letters so far. Wait for a limited time until there are `at_least`."""

    def unsettled(self) -> list[bytes]:
        """Return the messages that were never settled, whether leased or not. No worker must be running."""

    def expire_leases_of_killed(self) -> None:
        """Make the leases of a killed worker end soon."""

    def expire_leases(self, deliveries: Sequence[Delivery]) -> None:
        """Make the leases of these deliveries end now."""

    def close(self) -> None:
        """Close the connections."""
