"""The clock of a service."""

from __future__ import annotations

import time
from email.utils import formatdate

import pytest

from worker.http.clock import INTERVAL, Clock, describe


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level("INFO")
    return caplog


def headers(ahead: float) -> dict[str, str]:
    return {"Date": formatdate(time.time() + ahead, usegmt=True)}


@pytest.mark.parametrize(
    "value", ["", "yesterday", "Mon, 99 Nov 2026 10:00:00 GMT", f"Mon, 30 Nov {10**20} 10:00:00 GMT"]
)
def test_invalid_date_is_ignored(value: str, log: pytest.LogCaptureFixture) -> None:
    """The next response is read."""
    clock = Clock()
    clock.update({"Date": value})
    clock.update({})
    assert (clock.offset, log.records) == (0.0, [])
    clock.update(headers(600))
    assert clock.offset == pytest.approx(600, abs=60)


def test_skew_is_logged_until_it_is_over(log: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock is read once per minute."""
    now = time.monotonic()
    monkeypatch.setattr("worker.http.clock.time.monotonic", lambda: now)
    clock = Clock()
    clock.update(headers(-600))
    clock.update(headers(0))
    assert [record.message for record in log.records] == ["clock_skew"]
    now += INTERVAL
    clock.update(headers(0))
    assert [record.message for record in log.records] == ["clock_skew", "clock_skew_over"]


def test_small_difference_is_no_skew() -> None:
    """A slow response makes the clock of the service seem slow."""
    assert (describe(100.0), describe(-100.0)) == ("", "")
    assert describe(600.2) == "the clock of this machine is 600 s slow: synchronize it"
    assert describe(-600.2) == "the clock of this machine is 600 s fast: synchronize it"
