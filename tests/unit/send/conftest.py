"""Fixtures for senders."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from worker.send import jobs

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="module")
def fast_jobs() -> Iterator[None]:
    """The account's jobs end at once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jobs, "FIRST_PAUSE", 0.0)
        patch.setattr(jobs, "MIN_POLL", 0.0)
        yield
