"""Splits values into chunks of a limited size."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

T = TypeVar("T")


def chunked(values: Iterable[T], size: Callable[[T], int], max_bytes: int, max_items: float) -> Iterator[list[T]]:
    """Yield lists of at most `max_items` values and `max_bytes` bytes.

    A value that is larger than `max_bytes` is yielded in a list of its own.
    """
    chunk: list[T] = []
    total = 0
    for value in values:
        added = size(value)
        if chunk and (len(chunk) == max_items or total + added > max_bytes):
            yield chunk
            chunk, total = [], 0
        chunk.append(value)
        total += added
    if chunk:
        yield chunk
