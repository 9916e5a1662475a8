"""The messages of one invocation of an AWS Lambda function, delivered by an SQS event source."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from threading import Lock
from typing import TYPE_CHECKING, Any

from adapters.base import InertQueue, QueueError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from adapters.base import Delivery, Failure


@dataclass(frozen=True, slots=True)
class LambdaDelivery:
    """A message that Lambda received."""

    id: str
    body: bytes = field(repr=False)
    attributes: Mapping[str, str]
    attempt: int
    published_at: datetime


class LambdaQueue(InertQueue):
    """The messages of one invocation, which Lambda leases and settles. Implements QueueAdapter.

    Lambda deletes the messages that are not in `failed_ids`. SQS redelivers the others after the visibility timeout
    until the redrive policy dead-letters them. `seconds`: the time left until Lambda ends the function; the leases last
    longer.
    """

    def __init__(self, event: Mapping[str, Any], seconds: float) -> None:
        try:
            deliveries = [_delivery(record) for record in event["Records"]]
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            reason = f"expected the event of an SQS event source ({type(error).__name__}: {error})"
            raise QueueError(reason, todo="add an SQS event source mapping to the function") from None
        self._seconds = seconds
        self._pending = deliveries
        self._failed = {delivery.id for delivery in deliveries}
        self._lock = Lock()

    @property
    def lease_seconds(self) -> float:
        """Seconds until Lambda ends the function."""
        return self._seconds

    def receive(self, max_messages: int, wait: float) -> Sequence[LambdaDelivery]:
        """Return the next messages; [] after `wait` seconds if none is left."""
        if not self._pending:
            time.sleep(wait)
        received, self._pending = self._pending[:max_messages], self._pending[max_messages:]
        return received

    def ack(self, deliveries: Sequence[Delivery]) -> None:
        """Let Lambda delete the messages."""
        with self._lock:
            self._failed -= {delivery.id for delivery in deliveries}

    def dead_letter(self, delivery: Delivery, failure: Failure) -> bool:  # noqa: ARG002 - the redrive policy does it
        """Return False: the queue's redrive policy dead-letters the message."""
        return False

    def backlog(self) -> int:
        """Return the number of messages that were not received yet. Redeliveries belong to other invocations."""
        return len(self._pending)

    def stop(self) -> None:
        """Return no more messages."""
        self._pending = []

    def failed_ids(self) -> list[str]:
        """Return the ids of the messages that were not acked."""
        with self._lock:
            return sorted(self._failed)


def _delivery(record: Mapping[str, Any]) -> LambdaDelivery:
    system = record["attributes"]
    attributes = {name: value.get("stringValue") for name, value in record.get("messageAttributes", {}).items()}
    return LambdaDelivery(
        record["messageId"],
        record["body"].encode("utf-8", "surrogatepass"),
        {name: value for name, value in attributes.items() if value is not None},
        int(system["ApproximateReceiveCount"]),
        datetime.fromtimestamp(int(system["SentTimestamp"]) / 1000, UTC),
    )
