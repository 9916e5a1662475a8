"""A figure that costs a call is asked for rarely, and not waited for."""

from __future__ import annotations

from threading import Event

import pytest

from worker.health import cached_reading as sampled
from worker.health.cached_reading import CachedReading


def test_many_who_ask_make_one_call_in_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counting may be a call that costs money, and there may be many viewers; yet the figure follows the queue."""
    monkeypatch.setattr(sampled, "READ_TIMEOUT", 10.0)  # on a machine that is busy
    answers = iter(range(9))
    figure = CachedReading(lambda: next(answers))
    assert [figure.read() for _ in range(20)] == [0] * 20
    monkeypatch.setattr(sampled, "MAX_AGE", 0.0)
    assert figure.read() == 1


def test_a_call_that_takes_long_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A scrape has a second for all. The next one has what the call brings; meanwhile there is no other."""
    monkeypatch.setattr(sampled, "READ_TIMEOUT", 0.01)
    monkeypatch.setattr(sampled, "MAX_AGE", 0.0)
    goes_on = Event()
    asked = []

    def ask() -> bool:
        asked.append(1)
        return goes_on.wait(10)

    figure = CachedReading(ask)
    for _ in range(2):
        with pytest.raises(TimeoutError):
            figure.read()
    monkeypatch.setattr(sampled, "READ_TIMEOUT", 10.0)
    monkeypatch.setattr(sampled, "MAX_AGE", 10.0)
    goes_on.set()
    assert figure.read()
    assert len(asked) == 1
