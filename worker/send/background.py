"""Background events: those of carts, which change with every click.

They have threads and a part of the rate limits of their own, so that no order waits for them.
"""

from __future__ import annotations

from hashlib import blake2b
from threading import Lock
from typing import TYPE_CHECKING, Protocol

import cachetools

from worker.model import SendResult

if TYPE_CHECKING:
    from collections.abc import Sequence

    from worker.model import Operation

MAX_REMEMBERED = 50_000  # events; each takes about 150 bytes


class _Sender(Protocol):
    """A sender of operations."""

    def send(self, operations: Sequence[Operation]) -> Sequence[SendResult]:
        """Send operations and return their results in the same order."""

    def close(self) -> None:
        """Cancel the operations that have not started."""


class SenderWithBackground:
    """Sends background events with `background`, each of them once, and all other operations with `sender`.

    It remembers the last MAX_REMEMBERED events that Klaviyo accepted. Klaviyo ignores an event that is sent again
    after that, or by another process. Safe for many threads.
    """

    def __init__(self, sender: _Sender, background: _Sender) -> None:
        self._sender = sender
        self._background = background
        self._accepted: cachetools.LRUCache[bytes, bool] = cachetools.LRUCache(MAX_REMEMBERED)
        self._lock = Lock()

    def send(self, operations: Sequence[Operation]) -> list[SendResult]:
        """Send the operations and return their results in the same order."""
        events = [operation for operation in operations if operation.background]
        if not events:
            return list(self._sender.send(operations))
        results_of_events = iter(self._send_events(events))
        others = iter(self._sender.send([operation for operation in operations if not operation.background]))
        return [next(results_of_events if operation.background else others) for operation in operations]

    def close(self) -> None:
        """Cancel the operations that have not started. Do not wait for the others."""
        self._background.close()
        self._sender.close()

    def _send_events(self, events: Sequence[Operation]) -> list[SendResult]:
        """Send the events that Klaviyo has not accepted yet."""
        digests = [blake2b(event.key.encode("utf-8", "surrogatepass"), digest_size=16).digest() for event in events]
        with self._lock:
            known = {digest for digest in digests if self._accepted.get(digest)}
        due = [event for event, digest in zip(events, digests, strict=True) if digest not in known]
        results = iter(self._background.send(due)) if due else iter(())
        found = [SendResult(None, 0) if digest in known else next(results) for digest in digests]
        with self._lock:
            self._accepted.update({d: True for d, result in zip(digests, found, strict=True) if result.error is None})
        return found
