"""A queue and its dead-letter queue on an SQS emulator."""

from __future__ import annotations

from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from adapters import QueueOptions
from adapters.sqs import client as aws
from adapters.sqs.long_polling import SQSDelivery
from adapters.sqs.queue import SQSQueue
from adapters.sqs.sending import MAX_BYTES
from adapters.sqs.settlement import LEASE_SECONDS, MAX_HOLD
from tests.rigs.base import Guarantees, StoredDeadLetter
from tests.support.sqs_fakes import Network, Queue, Server, environment, missing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from adapters import Delivery, QueueAdapter


class SQS:
    """Implements Rig.

    With `kills`, workers connect through a relay, which records the messages delivered to a killed worker.
    """

    guarantees: ClassVar = Guarantees(
        in_order=False,
        lease_seconds=LEASE_SECONDS,
        max_delay=MAX_HOLD,
        unhandled_counts_as_attempt=True,
        dead_letter="direct mode",
        keeps_last_reason=False,
        backlog="approximate",
        max_message_bytes=MAX_BYTES,
        any_bytes=False,
    )
    attempts = 5

    def __init__(self, server: Server, directory: Path, *, kills: bool = False) -> None:
        self.lease_seconds = 2.0 if kills else LEASE_SECONDS
        self._queue = Queue(server, receives=self.attempts)
        self._network = Network(server) if kills else None
        port = self._network.port if self._network else server.port
        self.environment = {"QUEUE_URL": self._queue.url, **environment(port)}
        self.missing_url = "sqs://nowhere"

    @staticmethod
    def missing() -> str:
        return missing("fauxqs")

    @staticmethod
    @contextmanager
    def server() -> Iterator[Server]:
        server = Server("fauxqs")
        try:
            yield server
        finally:
            server.kill()

    def opener(self, **options: Any) -> Callable[[], QueueAdapter]:
        return partial(_open, self._queue.queue_url, self.lease_seconds, options)

    def publish(self, bodies: Sequence[bytes]) -> None:
        self._queue.publish(*bodies)

    def is_empty(self) -> bool:
        return self._queue.count() == 0

    def dead_letters(self, at_least: int = 0) -> list[StoredDeadLetter]:
        url = self._queue.dead_url
        self._queue.wait_for(url, at_least)
        return [StoredDeadLetter(body, details) for body, details in self._queue.read_all(url)]

    def unsettled(self) -> list[bytes]:
        return [body for body, _ in self._queue.read_all(self._queue.queue_url)]

    def expire_leases_of_killed(self) -> None:
        """End the leases now instead of after a minute."""
        assert self._network is not None
        self._network.end_leases()

    def expire_leases(self, deliveries: Sequence[Delivery]) -> None:
        for delivery in deliveries:
            assert isinstance(delivery, SQSDelivery)
            self._queue.client.change_message_visibility(
                QueueUrl=self._queue.queue_url, ReceiptHandle=delivery.receipt, VisibilityTimeout=0
            )

    def close(self) -> None:
        if self._network is not None:
            self._network.down()


def _open(url: str, lease_seconds: float, options: dict[str, Any]) -> QueueAdapter:
    return SQSQueue(aws.connect(), url, QueueOptions(**options), lease_seconds=lease_seconds, poll_seconds=1)
