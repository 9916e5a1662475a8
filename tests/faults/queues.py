"""The two queues that the scenarios run on, as the harness sees them."""

from __future__ import annotations

import sqlite3
import time
from contextlib import closing
from typing import TYPE_CHECKING, Protocol

from adapters.embedded import EmbeddedQueue
from tests.emulator import Emulator, Network, Subscription, bodies

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

NAMES = ("embedded", "pubsub")
NOTICED = 1.0  # seconds in which the emulator has noticed that a worker's stream is gone


class Queue(Protocol):
    """A queue, from outside."""

    environment: dict[str, str]

    def publish(self, bodies: Sequence[bytes]) -> None:
        """Put messages into the queue."""

    def is_empty(self) -> bool | None:
        """Tell whether every message is settled; None where the queue cannot tell."""

    def dead_letters(self, at_least: int = 0) -> list[bytes]:
        """Return all dead letters so far, waiting a while until there are so many."""

    def left(self) -> list[bytes]:
        """Return what was never settled. No worker may be running."""

    def worker_died(self) -> None:
        """Let the leases of a worker that was killed end soon."""

    def close(self) -> None:
        """Let go of what is open."""


class Embedded:
    """The embedded queue, in a file of its own; with `kills`, with leases that end soon."""

    def __init__(self, directory: Path, *, kills: bool) -> None:
        self._path = directory / "queue.db"
        self._queue = EmbeddedQueue(self._path)
        self.environment = {"QUEUE_URL": f"embedded://{self._path}?lease={2 if kills else 60}"}

    def publish(self, bodies: Sequence[bytes]) -> None:
        self._queue.publish(bodies)

    def is_empty(self) -> bool:
        return self._queue.backlog() == 0

    def dead_letters(self, at_least: int = 0) -> list[bytes]:
        return [letter.delivery.body for letter in self._queue.dead_letters()]

    def left(self) -> list[bytes]:
        with closing(sqlite3.connect(self._path)) as database:
            return [body for (body,) in database.execute("SELECT body FROM messages")]

    def worker_died(self) -> None:
        """Do nothing: its leases are short."""

    def close(self) -> None:
        self._queue.close()


class PubSub:
    """A subscription of its own on Google's emulator.

    With `kills` behind a relay, which ends the stream of a worker that died; the emulator would believe in it.
    """

    def __init__(self, emulator: Emulator, *, kills: bool) -> None:
        self._subscription = Subscription(emulator)
        self._network = Network(emulator) if kills else None
        self._dead: list[bytes] = []
        host = f"127.0.0.1:{self._network.port}" if self._network else emulator.host
        self.environment = {"QUEUE_URL": self._subscription.url, "PUBSUB_EMULATOR_HOST": host}

    def publish(self, bodies: Sequence[bytes]) -> None:
        self._subscription.publish(*bodies)

    def is_empty(self) -> None:
        return None

    def dead_letters(self, at_least: int = 0) -> list[bytes]:
        if at_least:
            self._dead += bodies(self._subscription.dead_letters(at_least - len(self._dead)))
        else:
            self._dead += bodies([entry.message for entry in self._subscription.pull(0.0, dead=True)])
        return self._dead

    def left(self) -> list[bytes]:
        return self._subscription.unacked()

    def worker_died(self) -> None:
        """End its leases, as a minute of waiting would."""
        assert self._network is not None
        time.sleep(NOTICED)
        self._network.end_leases(self._subscription)

    def close(self) -> None:
        if self._network is not None:
            self._network.down()
