"""What tests need of a queue to run on: something that stands in for its service, and a way in from the back."""

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
    """In what queues differ. tests/contract holds each queue against its own; docs/adapters.md shows them.

    `dead_letter`: whether a message can become a dead letter at once, with its reason: `always` does, `asked` does
    with KLAVIYO_WORKER_DEAD_LETTER_MODE=direct. `gave_up`: whether the last reason is kept with a message that the
    queue itself gave up on. `backlog`: whose word it is.
    """

    in_order: bool  # oldest first, as long as nothing comes again
    lease_seconds: float | None  # seconds, as it is by default; None: the queue's own to decide
    longest_delay: float  # seconds that a nack may ask for
    unhandled_is_free: bool  # a message returned unhandled spends no delivery attempt
    dead_letter: Literal["always", "asked"]
    gave_up: bool
    backlog: Literal["exact", "approximate", "sent back"]
    largest: int  # bytes of a message
    any_bytes: bool  # or text only


@dataclass(frozen=True, slots=True)
class Letter:
    """A dead letter, as the service keeps it: `about` is all it tells besides the body."""

    body: bytes
    about: Mapping[str, str]


class Rig(Protocol):
    """A queue of its own, with dead letters, on a service that others may share.

    `server`: what stands in for the service; None: nothing does. With `kills`, workers on it will be killed, so
    leases are short. Not otherwise: a machine that is busy would lose them.
    """

    guarantees: ClassVar[Guarantees]
    environment: dict[str, str]  # with QUEUE_URL
    missing_url: str  # of a queue that does not exist
    lease_seconds: float  # seconds
    attempts: int  # deliveries after which the queue gives a message up

    def __init__(self, server: Any, directory: Path, *, kills: bool = False) -> None: ...

    @staticmethod
    def missing() -> str:
        """Return why the service's stand-in cannot run here, or nothing."""

    @staticmethod
    def server() -> AbstractContextManager[Any]:
        """Start what stands in for the service."""

    def opener(self, **options: Any) -> Callable[[], QueueAdapter]:
        """Return what opens the queue, in this process or in another; `options` as in QueueOptions."""

    def publish(self, bodies: Sequence[bytes]) -> None:
        """Put messages into the queue, without the adapter."""

    def is_empty(self) -> bool | None:
        """Tell whether every message is settled; None where the service cannot tell."""

    def dead_letters(self, at_least: int = 0) -> list[Letter]:
        """Return all dead letters so far, waiting a while until there are so many."""

    def left(self) -> list[bytes]:
        """Return what was never settled, leased or not. No worker may be running."""

    def worker_died(self) -> None:
        """Let the leases of a worker that was killed end soon."""

    def lose(self, deliveries: Sequence[Delivery]) -> None:
        """Have the leases end that are held."""

    def close(self) -> None:
        """Let go of what is open."""
