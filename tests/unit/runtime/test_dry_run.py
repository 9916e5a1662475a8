"""A dry run prints operations until its reader ends."""

from __future__ import annotations

import os
import signal
import sys
from typing import TYPE_CHECKING

from worker.model import Operation, OperationKind
from worker.runtime.dry_run import print_instead

if TYPE_CHECKING:
    import pytest


def test_dry_run_stops_normally_when_its_reader_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """If `| head` ends, the process stops normally: it sends itself a signal, and later output is discarded."""
    signals: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: signals.append(number))
    read, write = os.pipe()
    os.close(read)
    try:
        with os.fdopen(write, "w") as closed:
            monkeypatch.setattr(sys, "stdout", closed)
            for _ in range(2):
                (sent,) = print_instead([Operation(OperationKind.DELETE_CATEGORY, "k")])
                assert sent.error is None
    finally:
        signal.signal(signal.SIGTERM, before)
    assert signals == [signal.SIGTERM]
