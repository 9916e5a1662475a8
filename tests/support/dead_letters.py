"""Dead letters of the embedded queue."""

from __future__ import annotations

import json
from contextlib import closing
from typing import TYPE_CHECKING, Any

from adapters import Failure
from adapters.embedded.queue import EmbeddedQueue

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

REFUSED = Failure("Klaviyo answered 400: invalid", "send", "Rejected")


def make_dead_letters(queue: EmbeddedQueue, *bodies: bytes | dict[str, Any], failure: Failure = REFUSED) -> list[str]:
    """Publish and dead-letter messages, and return their ids. Also dead-letters other messages on the queue."""
    queue.publish([body if isinstance(body, bytes) else json.dumps(body).encode() for body in bodies])
    ids = []
    while deliveries := queue.receive(500, 0):
        for delivery in deliveries:
            queue.dead_letter(delivery, failure)
            ids.append(delivery.id)
    return ids


def make_dead_letters_at(path: Path, *bodies: bytes | dict[str, Any], failure: Failure = REFUSED) -> list[str]:
    """Make dead letters of the queue at a path."""
    with closing(EmbeddedQueue(path)) as queue:
        return make_dead_letters(queue, *bodies, failure=failure)


def dead_letter_ids_at(path: Path) -> Sequence[str]:
    """Return the ids of the dead letters of the queue at a path."""
    with closing(EmbeddedQueue(path)) as queue:
        return [dead_letter.delivery.id for dead_letter in queue.dead_letters().receive(10_000, 0)]
