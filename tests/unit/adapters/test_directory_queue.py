"""The queue of docs/examples: what the contract of all queues does not ask for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.rigs.directory import EXAMPLE

if TYPE_CHECKING:
    from pathlib import Path

    import pytest


def test_files_that_are_no_messages_are_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever can write into the directory may have put them there."""
    monkeypatch.syspath_prepend(EXAMPLE)
    from directory_queue import DirectoryQueue

    queue = DirectoryQueue(tmp_path)
    for name in ("2024-orders.json", "2024.orders", "draft-1", "0001764201600.1-KEY"):
        (tmp_path / name).touch()
    assert queue.publish([b"x"]) == 1
    assert [delivery.body for delivery in queue.receive(10, 1)] == [b"x"]
    assert queue.backlog() == 1
