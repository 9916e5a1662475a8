"""`run --dry-run`: everything but the writes, to Klaviyo and to the queue."""

from __future__ import annotations

import os
import signal
import sys
import time
from threading import Lock
from typing import TYPE_CHECKING

import click
import orjson

from adapters import InertQueue
from worker.json_access import printable
from worker.model import SendResult
from worker.send import request_for

if TYPE_CHECKING:
    from collections.abc import Sequence

    from adapters import Delivery, QueueAdapter, QueueWarning
    from worker.model import Operation

_PRINTING = Lock()


def operation_line(operation: Operation) -> str:
    """Return an operation as the JSON line that `transform` and `--dry-run` print."""
    request = request_for(operation)
    line = {
        "operation": operation.kind.value,
        "method": request.method,
        "path": request.path,
        "body": request.body,
    }
    return printable(orjson.dumps(line).decode())


def print_instead(operations: Sequence[Operation]) -> Sequence[SendResult]:
    """Print what would be sent: the send stage of a dry run."""
    with _PRINTING:
        try:
            for operation in operations:
                click.echo(operation_line(operation))
        except BrokenPipeError:  # `| head` has seen enough: stop in order, so that what is leased goes back
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            os.kill(os.getpid(), signal.SIGTERM)
    return [SendResult(None, 0)] * len(operations)


class DryRunQueue(InertQueue):
    """A queue whose messages are looked at once and then all returned, as if they had not been received."""

    def __init__(self, queue: QueueAdapter, at_most: int) -> None:
        self._queue = queue
        self._left = at_most
        self._seen: list[Delivery] = []

    @property
    def lease_seconds(self) -> float | None:
        """The queue's own."""
        return self._queue.lease_seconds

    def receive(self, max_messages: int, wait: float) -> Sequence[Delivery]:
        """Receive what was not seen yet."""
        if not self._left:
            time.sleep(wait)
            return ()
        deliveries = self._queue.receive(min(max_messages, self._left), wait)
        nothing_left = not deliveries and self._queue.backlog() is not None
        self._left = 0 if nothing_left else self._left - len(deliveries)
        self._seen += deliveries
        return deliveries

    def ack(self, deliveries: Sequence[Delivery]) -> None:
        """Keep the messages leased until `close`."""

    def extend(self, deliveries: Sequence[Delivery], seconds: float) -> None:
        """Extend all that was seen, whatever is still in work."""
        del deliveries
        self._queue.extend(self._seen, seconds)

    def backlog(self) -> int | None:
        """Count what will still be looked at: nothing, once the queue had no more."""
        return None if self._left and self._queue.backlog() is None else self._left

    def check(self) -> Sequence[QueueWarning]:
        """Check the queue."""
        return self._queue.check()

    def stop(self) -> None:
        """Stop the queue."""
        self._queue.stop()

    def close(self) -> None:
        """Return everything."""
        self._queue.nack(self._seen)
        self._queue.close()
