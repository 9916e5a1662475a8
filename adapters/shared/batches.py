"""Splits messages into batches for publishing."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator


def batches(bodies: Iterable[bytes], max_messages: int, max_bytes: int) -> Iterator[list[bytes]]:
    """Yield lists of up to `max_messages` bodies and `max_bytes` in total; a larger body is a batch of its own."""
    batch: list[bytes] = []
    size = 0
    for body in bodies:
        if batch and (len(batch) >= max_messages or size + len(body) > max_bytes):
            yield batch
            batch, size = [], 0
        batch.append(body)
        size += len(body)
    if batch:
        yield batch
