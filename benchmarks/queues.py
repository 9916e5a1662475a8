"""The queues of the rows: a new one each time, on what stands in for its service."""

from __future__ import annotations

from contextlib import contextmanager
from itertools import islice
from typing import TYPE_CHECKING

from tests.rigs import rig_type

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from tests.rigs.base import Rig

_CHUNK = 500  # messages; few enough to hold in memory, whatever their size


class Queue:
    """A queue; `environment` points a worker at it."""

    def __init__(self, rig: Rig) -> None:
        self.environment = rig.environment
        self._rig = rig

    def publish(self, bodies: Iterable[bytes]) -> None:
        """Put messages into the queue."""
        bodies = iter(bodies)
        while chunk := list(islice(bodies, _CHUNK)):
            self._rig.publish(chunk)


@contextmanager
def opened(name: str, directory: Path) -> Iterator[Queue]:
    """Start what stands in for the queue's service, and make a queue."""
    kind = rig_type(name)
    with kind.server() as server:
        rig = kind(server, directory)
        yield Queue(rig)
        rig.close()


def missing(name: str) -> str:
    """Return why there is no such queue here, or nothing."""
    return rig_type(name).missing()
