"""A topic and a subscription on Google's emulator."""

from __future__ import annotations

import time
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from adapters import QueueOptions
from adapters.pubsub import queue as pubsub
from adapters.pubsub.settlement import LEASE_SECONDS
from tests.rigs.base import Guarantees, StoredDeadLetter
from tests.support.pubsub_emulator import Emulator, Network, Subscription, missing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from adapters import Delivery, QueueAdapter

DISCONNECT_SECONDS = 1.0  # seconds after which the emulator has noticed the end of a stream
MIN_LEASE = 10  # seconds, Pub/Sub's limit


class PubSub:
    """Implements Rig.

    With `kills`, workers connect through a relay, which ends the stream of a killed worker: the emulator does not
    detect that it is gone.
    """

    guarantees: ClassVar = Guarantees(
        in_order=False,
        lease_seconds=LEASE_SECONDS,
        max_delay=pubsub.MAX_DELAY,
        unhandled_counts_as_attempt=True,
        dead_letter="direct mode",
        keeps_last_reason=False,
        backlog="returned",
        max_message_bytes=10_000_000,
        any_bytes=True,
    )
    attempts = 5

    def __init__(self, server: Emulator, directory: Path, *, kills: bool = False) -> None:
        self._lease = MIN_LEASE if kills else LEASE_SECONDS
        self.lease_seconds = float(self._lease)
        self._subscription = Subscription(server, minimum_backoff=1.0 if kills else None)
        self._network = Network(server) if kills else None
        self._dead: list[StoredDeadLetter] = []
        host = f"127.0.0.1:{self._network.port}" if self._network else server.host
        self.environment = {"QUEUE_URL": self._subscription.url, "PUBSUB_EMULATOR_HOST": host}
        self.missing_url = "pubsub://demo/nowhere"

    @staticmethod
    def missing() -> str:
        return missing()

    @staticmethod
    @contextmanager
    def server() -> Iterator[Emulator]:
        emulator = Emulator()
        try:
            yield emulator
        finally:
            emulator.kill()

    def opener(self, **options: Any) -> Callable[[], QueueAdapter]:
        return partial(pubsub.PubSubQueue, self._subscription.path, QueueOptions(**options), lease_seconds=self._lease)

    def publish(self, bodies: Sequence[bytes]) -> None:
        self._subscription.publish(*bodies)

    def is_empty(self) -> None:
        return None

    def dead_letters(self, at_least: int = 0) -> list[StoredDeadLetter]:
        if at_least:
            found = self._subscription.dead_letters(at_least - len(self._dead))
        else:
            found = [entry.message for entry in self._subscription.pull(0.0, dead=True)]
        self._dead += [StoredDeadLetter(bytes(message.data), dict(message.attributes)) for message in found]
        return self._dead

    def unsettled(self) -> list[bytes]:
        return self._subscription.unacked()

    def expire_leases_of_killed(self) -> None:
        """End the leases now instead of after a minute."""
        assert self._network is not None
        time.sleep(DISCONNECT_SECONDS)
        self._network.end_leases(self._subscription)

    def expire_leases(self, deliveries: Sequence[Delivery]) -> None:
        """End the leases at the server: the client of a running worker extends them."""
        ids = [delivery.message.ack_id for delivery in deliveries if isinstance(delivery, pubsub.PubSubDelivery)]
        self._subscription.subscriber.modify_ack_deadline(
            subscription=self._subscription.path, ack_ids=ids, ack_deadline_seconds=0
        )

    def close(self) -> None:
        if self._network is not None:
            self._network.down()
