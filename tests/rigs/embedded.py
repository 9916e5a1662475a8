"""The embedded queue, in a file of its own."""

from __future__ import annotations

import sqlite3
import time
from contextlib import closing, nullcontext
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from adapters import QueueOptions, open_queue
from adapters.embedded.queue import EmbeddedQueue
from tests.rigs.base import Guarantees, StoredDeadLetter
from worker.commands.dlq.dead_letters import iter_dead_letters

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AbstractContextManager
    from pathlib import Path

    from adapters import Delivery, QueueAdapter


class Embedded:
    """Implements Rig."""

    guarantees: ClassVar = Guarantees(
        in_order=True,
        lease_seconds=EmbeddedQueue.LEASE_SECONDS,
        max_delay=float("inf"),
        unhandled_counts_as_attempt=False,
        dead_letter="always",
        keeps_last_reason=True,
        backlog="exact",
        max_message_bytes=100_000_000,
        any_bytes=True,
    )
    attempts = EmbeddedQueue.MAX_ATTEMPTS

    def __init__(self, server: None, directory: Path, *, kills: bool = False) -> None:
        self.lease_seconds = 2.0 if kills else EmbeddedQueue.LEASE_SECONDS
        self._path = directory / "queue.db"
        self._queue = EmbeddedQueue(self._path)
        self.environment = {"QUEUE_URL": f"embedded://{self._path}?lease={self.lease_seconds}"}
        self.missing_url = "embedded:///proc/nowhere/queue.db"

    @staticmethod
    def missing() -> str:
        return ""

    @staticmethod
    def server() -> AbstractContextManager[None]:
        return nullcontext()

    def opener(self, **options: Any) -> Callable[[], QueueAdapter]:
        return partial(open_queue, self.environment["QUEUE_URL"], QueueOptions(**options))

    def publish(self, bodies: Sequence[bytes]) -> None:
        self._queue.publish(bodies)

    def is_empty(self) -> bool:
        return self._queue.backlog() == 0

    def dead_letters(self, at_least: int = 0) -> list[StoredDeadLetter]:
        return [
            StoredDeadLetter(dead_letter.delivery.body, asdict(dead_letter.failure))
            for dead_letter in iter_dead_letters(self._queue)
        ]

    def unsettled(self) -> list[bytes]:
        with closing(sqlite3.connect(self._path)) as database:
            return [body for (body,) in database.execute("SELECT body FROM messages")]

    def expire_leases_of_killed(self) -> None:
        """Do nothing, because the leases are short."""

    def expire_leases(self, deliveries: Sequence[Delivery]) -> None:
        time.sleep(self.lease_seconds)

    def close(self) -> None:
        self._queue.close()
