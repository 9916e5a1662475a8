"""Cuts what is to be sent into calls of a limited size."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

T = TypeVar("T")


def chunked(values: Iterable[T], size: Callable[[T], int], max_bytes: int, most: float) -> Iterator[list[T]]:
    """Yield values in lists of at most `most` and `max_bytes`; one that alone is larger comes alone."""
    chunk: list[T] = []
    total = 0
    for value in values:
        added = size(value)
        if chunk and (len(chunk) == most or total + added > max_bytes):
            yield chunk
            chunk, total = [], 0
        chunk.append(value)
        total += added
    if chunk:
        yield chunk
