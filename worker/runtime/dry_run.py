"""`run --dry-run`: processes messages without writing to Klaviyo and without settling the messages."""

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
    """Print the operations instead of sending them. This is the send stage of a dry run."""
    with _PRINTING:
        try:
            for operation in operations:
                click.echo(operation_line(operation))
        except BrokenPipeError:  # the reader has ended (`head` for example): stop, which returns the messages
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            os.kill(os.getpid(), signal.SIGTERM)
    return [SendResult(None, 0)] * len(operations)


class DryRunQueue(InertQueue):
    """A queue that delivers each message once. `close` gives all of them back to the underlying queue."""

    def __init__(self, queue: QueueAdapter, at_most: int) -> None:
        self._queue = queue
        self._remaining = at_most
        self._delivered: list[Delivery] = []

    @property
    def lease_seconds(self) -> float | None:
        """The lease of the queue."""
        return self._queue.lease_seconds

    def receive(self, max_messages: int, wait: float) -> Sequence[Delivery]:
        """Receive messages until `at_most` have been delivered or the queue is empty."""
        if not self._remaining:
            time.sleep(wait)
            return ()
        deliveries = self._queue.receive(min(max_messages, self._remaining), wait)
        is_empty = not deliveries and self._queue.backlog() is not None
        self._remaining = 0 if is_empty else self._remaining - len(deliveries)
        self._delivered += deliveries
        return deliveries

    def ack(self, deliveries: Sequence[Delivery]) -> None:
        """Keep the messages leased until `close`."""

    def extend(self, deliveries: Sequence[Delivery], seconds: float) -> None:  # noqa: ARG002 - extends all
        """Extend the leases of all delivered messages, including those that the worker has processed."""
        self._queue.extend(self._delivered, seconds)

    def backlog(self) -> int | None:
        """Return how many messages are still to be delivered, at most: 0 after the queue was empty, None if unknown."""
        return None if self._remaining and self._queue.backlog() is None else self._remaining

    def check(self) -> Sequence[QueueWarning]:
        """Check the queue."""
        return self._queue.check()

    def stop(self) -> None:
        """Stop the queue."""
        self._queue.stop()

    def close(self) -> None:
        """Give all messages back to the queue."""
        self._queue.nack(self._delivered)
        self._queue.close()
