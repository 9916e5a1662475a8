"""Splits what is published into calls that a queue takes."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator


def batches(bodies: Iterable[bytes], most: int, max_bytes: int) -> Iterator[list[bytes]]:
    """Yield lists of at most `most` bodies and `max_bytes` in all; a body that alone is larger comes alone."""
    batch: list[bytes] = []
    size = 0
    for body in bodies:
        if batch and (len(batch) >= most or size + len(body) > max_bytes):
            yield batch
            batch, size = [], 0
        batch.append(body)
        size += len(body)
    if batch:
        yield batch
