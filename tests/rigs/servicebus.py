"""A queue on the Service Bus broker of tests/support, accessed with Azure's client."""

from __future__ import annotations

import time
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from adapters import QueueOptions, open_queue
from tests.rigs.base import Guarantees, StoredDeadLetter
from tests.support.servicebus_broker.broker import Broker, Queue, bodies, missing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from adapters import Delivery, QueueAdapter


class ServiceBus:
    """Implements Rig."""

    guarantees: ClassVar = Guarantees(
        in_order=False,
        lease_seconds=None,
        max_delay=float("inf"),
        unhandled_counts_as_attempt=True,
        dead_letter="always",
        keeps_last_reason=False,
        backlog="returned",
        max_message_bytes=256 * 1024,
        any_bytes=True,
    )
    attempts = 10

    def __init__(self, server: Broker, directory: Path, *, kills: bool = False) -> None:
        self.lease_seconds = 4.0 if kills else 60.0
        self._queue = Queue(server, lock=self.lease_seconds, attempts=self.attempts)
        self._connection_string = server.connection_string
        self.environment = {
            "QUEUE_URL": self._queue.url,
            "SERVICEBUS_CONNECTION_STRING": self._connection_string,
        }
        self.missing_url = f"servicebus://{server.host}/nowhere"

    @staticmethod
    def missing() -> str:
        return missing()

    @staticmethod
    @contextmanager
    def server() -> Iterator[Broker]:
        broker = Broker()
        try:
            yield broker
        finally:
            broker.kill()

    def opener(self, **options: Any) -> Callable[[], QueueAdapter]:
        return partial(open_queue, self._queue.url, QueueOptions(connection_string=self._connection_string, **options))

    def publish(self, bodies: Sequence[bytes]) -> None:
        self._queue.publish(*bodies)

    def is_empty(self) -> bool:
        ready, locked, _ = self._queue.counts()
        return ready + locked == 0

    def dead_letters(self, at_least: int = 0) -> list[StoredDeadLetter]:
        deadline = time.monotonic() + 20.0
        while (dead := self._queue.counts()[2]) < at_least and time.monotonic() < deadline:
            time.sleep(0.05)
        if not dead:
            return []
        dead_letters = self._queue.read(dead=True)
        return [
            StoredDeadLetter(body, _details(dead_letter))
            for body, dead_letter in zip(bodies(dead_letters), dead_letters, strict=True)
        ]

    def unsettled(self) -> list[bytes]:
        return [] if self.is_empty() else bodies(self._queue.read())

    def expire_leases_of_killed(self) -> None:
        """Do nothing, because the leases are short."""

    def expire_leases(self, deliveries: Sequence[Delivery]) -> None:
        self._queue.broker("expire", name=self._queue.address)

    def close(self) -> None:
        self._queue.close()


def _details(dead_letter: Any) -> dict[str, str]:
    return {"reason": dead_letter.dead_letter_reason, "description": dead_letter.dead_letter_error_description}
