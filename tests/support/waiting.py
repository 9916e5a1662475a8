"""Waiting for a condition and for messages."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Protocol, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

T_co = TypeVar("T_co", covariant=True)
T = TypeVar("T")


class Receives(Protocol[T_co]):
    """A queue or its dead letters."""

    def receive(self, max_messages: int, wait: float) -> Sequence[T_co]: ...


def wait_for(condition: Callable[..., object], seconds: float = 60.0) -> None:
    """Poll a condition until it is true. Slow conditions are polled less often, to leave the CPU to the worker."""
    deadline = time.monotonic() + seconds
    polled_at = time.monotonic()
    while not condition():
        assert time.monotonic() < deadline, "the condition did not become true"
        time.sleep(max(0.01, 10 * (time.monotonic() - polled_at)))
        polled_at = time.monotonic()


def receive(queue: Receives[T], number: int, wait: float = 20.0, poll: float = 0.2) -> list[T]:
    """Receive `number` messages, or those that arrive within `wait` seconds. `poll`: seconds of each attempt."""
    deadline = time.monotonic() + wait
    got: list[T] = []
    while len(got) < number and time.monotonic() < deadline:
        got += queue.receive(number - len(got), poll)
    return got
