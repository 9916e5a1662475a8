"""A cached reading calls its function rarely and does not block for long."""

from __future__ import annotations

from threading import Event

import pytest

from worker.health import cached_reading
from worker.health.cached_reading import CachedReading


def test_function_is_called_again_only_after_max_age(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call can cost money, and there can be many viewers."""
    monkeypatch.setattr(cached_reading, "READ_TIMEOUT", 10.0)  # for a busy machine
    values = iter(range(9))
    reading = CachedReading(lambda: next(values))
    assert [reading.read() for _ in range(20)] == [0] * 20
    monkeypatch.setattr(cached_reading, "MAX_AGE", 0.0)
    assert reading.read() == 1


def test_slow_call_raises_timeout_and_is_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    """A scrape has one second in total. The call continues, and a later read returns its result."""
    monkeypatch.setattr(cached_reading, "READ_TIMEOUT", 0.01)
    monkeypatch.setattr(cached_reading, "MAX_AGE", 0.0)
    release = Event()
    calls = []

    def slow() -> bool:
        calls.append(1)
        return release.wait(60)

    reading = CachedReading(slow)
    for _ in range(2):
        with pytest.raises(TimeoutError):
            reading.read()
    monkeypatch.setattr(cached_reading, "READ_TIMEOUT", 10.0)
    monkeypatch.setattr(cached_reading, "MAX_AGE", 10.0)
    release.set()
    assert reading.read()
    assert len(calls) == 1
