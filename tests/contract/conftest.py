"""A queue for every test, of every kind."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import pytest

from tests.rigs import RIGS, Rig

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from adapters import QueueAdapter


@pytest.fixture(params=RIGS)
def rig(request: pytest.FixtureRequest, tmp_path: Path, servers: Callable[[str], Any]) -> Iterator[Rig]:
    """A queue whose leases end late; `@with_short_leases` for one whose leases end soon."""
    kills = request.node.get_closest_marker("short_leases") is not None
    name = request.param
    running = RIGS[name](servers(name), tmp_path, kills=kills)
    with pytest.MonkeyPatch.context() as environment:
        for variable, value in running.environment.items():
            environment.setenv(variable, value)
        yield running
    running.close()


@pytest.fixture
def opened(rig: Rig) -> Iterator[Callable[..., QueueAdapter]]:
    """Open the queue, as often as wanted; all are closed in the end."""
    with ExitStack() as closing:

        def open_(**options: Any) -> QueueAdapter:
            queue = rig.opener(**options)()
            closing.callback(queue.close)
            return queue

        yield open_
