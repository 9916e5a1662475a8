"""The queue of docs/examples, beyond the contract of all queues."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.rigs.directory import EXAMPLE

if TYPE_CHECKING:
    from pathlib import Path

    import pytest


def test_other_files_are_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other programs can write into the directory."""
    monkeypatch.syspath_prepend(EXAMPLE)
    from directory_queue import DirectoryQueue

    queue = DirectoryQueue(tmp_path)
    for name in ("2024-orders.json", "2024.orders", "draft-1", "0001764201600.1-KEY"):
        (tmp_path / name).touch()
    assert queue.publish([b"x"]) == 1
    assert [delivery.body for delivery in queue.receive(10, 1)] == [b"x"]
    assert queue.backlog() == 1
