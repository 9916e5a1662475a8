"""A new queue for each row, on an emulator of its service."""

from __future__ import annotations

from contextlib import contextmanager
from itertools import islice
from typing import TYPE_CHECKING

from tests.rigs import rig_type

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from tests.rigs.base import Rig

_CHUNK = 500  # messages; small enough for memory even if they are large


class Queue:
    """A queue; `environment` points a worker at it."""

    def __init__(self, rig: Rig) -> None:
        self.environment = rig.environment
        self._rig = rig

    def publish(self, bodies: Iterable[bytes]) -> None:
        """Publish messages."""
        bodies = iter(bodies)
        while chunk := list(islice(bodies, _CHUNK)):
            self._rig.publish(chunk)


@contextmanager
def open_queue(name: str, directory: Path) -> Iterator[Queue]:
    """Start the emulator of the queue's service, and create a queue."""
    kind = rig_type(name)
    with kind.server() as server:
        rig = kind(server, directory)
        yield Queue(rig)
        rig.close()


def missing_requirement(name: str) -> str:
    """Return what is not installed for this queue; "" if nothing is missing."""
    return rig_type(name).missing()
