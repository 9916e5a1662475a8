"""The messages of one invocation of an AWS Lambda function, which an SQS event source brings."""

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
class Record:
    """A message as Lambda hands it over."""

    id: str
    body: bytes = field(repr=False)
    attributes: Mapping[str, str]
    attempt: int
    published_at: datetime


class SQSEvent(InertQueue):
    """Implements QueueAdapter for a batch that Lambda leases and settles: `left` tells it what must come again.

    `seconds`: how long the function may take. Lambda sees to it that the leases last longer.
    """

    def __init__(self, event: Mapping[str, Any], seconds: float) -> None:
        try:
            records = [_record(entry) for entry in event["Records"]]
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            what = f"expected the event of an SQS event source ({type(error).__name__}: {error})"
            raise QueueError(what, todo="invoke this function by one, not by hand") from None
        self._seconds = seconds
        self._waiting = records
        self._left = {record.id for record in records}
        self._lock = Lock()

    @property
    def lease_seconds(self) -> float:
        """Seconds until Lambda ends the function."""
        return self._seconds

    def receive(self, max_messages: int, wait: float) -> Sequence[Record]:
        """Return what was not handed out yet; once that is nothing, after `wait` seconds."""
        if not self._waiting:
            time.sleep(wait)
        received, self._waiting = self._waiting[:max_messages], self._waiting[max_messages:]
        return received

    def ack(self, deliveries: Sequence[Delivery]) -> None:
        """Note that Lambda may delete them."""
        with self._lock:
            self._left -= {delivery.id for delivery in deliveries}

    def dead_letter(self, delivery: Delivery, failure: Failure) -> bool:
        """Leave it to the queue's redrive policy."""
        del delivery, failure
        return False

    def backlog(self) -> int:
        """Count what was not handed out yet: what comes again does so in another invocation."""
        return len(self._waiting)

    def stop(self) -> None:
        """Hand out no more."""
        self._waiting = []

    def left(self) -> list[str]:
        """Return the ids of the messages that must come again."""
        with self._lock:
            return sorted(self._left)


def _record(entry: Mapping[str, Any]) -> Record:
    told = entry["attributes"]
    attributes = {name: value.get("stringValue") for name, value in entry.get("messageAttributes", {}).items()}
    return Record(
        entry["messageId"],
        entry["body"].encode("utf-8", "surrogatepass"),
        {name: value for name, value in attributes.items() if value is not None},
        int(told["ApproximateReceiveCount"]),
        datetime.fromtimestamp(int(told["SentTimestamp"]) / 1000, UTC),
    )
