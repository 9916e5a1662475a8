"""The messages that were given up on: what an operator sees of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from adapters import DeadLetter, DeadLetters

AT_ONCE = 500  # letters asked for at a time
PATIENCE = 5.0  # seconds without a letter after which there are no more


def each(queue: DeadLetters) -> Iterator[DeadLetter]:
    """Yield all dead letters of a queue, and leave them. Raises QueueError."""
    letters = queue.dead_letters()
    try:
        while found := letters.receive(AT_ONCE, PATIENCE):
            yield from found
    finally:
        letters.close()
