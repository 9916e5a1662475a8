"""The notifications to systemd, and when they are sent."""

from __future__ import annotations

import logging
import os
import threading
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.notify_socket import NotifySocket
from tests.support.worker_state import FakeWorkerState
from worker.health import systemd
from worker.health.systemd import Notifier

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

OUTAGE = {"klaviyo": "503 to POST a.klaviyo.com/api/events", "commercetools": ""}


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[NotifySocket]:
    with NotifySocket(f"{tmp_path}/notify") as listening:
        yield listening


def notifier(listener: NotifySocket, state: FakeWorkerState | None = None, **environment: Any) -> Notifier:
    return Notifier(state or FakeWorkerState(), {"NOTIFY_SOCKET": listener.address} | environment)


def test_ready_is_sent_once_when_the_queue_has_answered(listener: NotifySocket) -> None:
    """`systemctl start` waits for READY=1."""
    state = FakeWorkerState(has_received=False)
    systemd_notifier = notifier(listener, state)
    systemd_notifier.notify(0.0)
    assert listener.lines() == ["STATUS=starting"]
    state.values["has_received"] = True
    for now in (1.0, 2.0):
        systemd_notifier.notify(now)
    assert listener.lines()[1:] == ["READY=1", "STATUS=running"]


@pytest.mark.parametrize(
    ("state", "status"),
    [
        ({"parked_reason": "check KLAVIYO_AUTH_KEY"}, "parked: check KLAVIYO_AUTH_KEY"),
        ({"outage_reasons": OUTAGE}, "outage of klaviyo: 503 to POST a.klaviyo.com/api/events"),
        ({"parked_reason": "check CT_API_CLIENT", "outage_reasons": OUTAGE}, "parked: check CT_API_CLIENT"),
        ({"is_stopping": True, "parked_reason": "check CT_API_CLIENT"}, "stopping"),
    ],
)
def test_status_names_the_reason(listener: NotifySocket, state: dict[str, Any], status: str) -> None:
    """A parked worker is ready: it is up and resumes by itself."""
    notifier(listener, FakeWorkerState(**state)).notify(0.0)
    lines = listener.lines()
    assert {"READY=1", f"STATUS={status}"} <= set(lines)
    assert ("STOPPING=1" in lines) == (status == "stopping")


def test_status_is_sent_when_it_changes(listener: NotifySocket) -> None:
    """An earlier status is sent again if the state returns to it."""
    state = FakeWorkerState()
    systemd_notifier = notifier(listener, state)
    for now, parked in enumerate(["", "no", "no", ""]):
        state.values["parked_reason"] = parked
        systemd_notifier.notify(now)
    assert listener.lines() == ["READY=1", "STATUS=running", "STATUS=parked: no", "STATUS=running"]


def test_status_is_one_short_line(listener: NotifySocket) -> None:
    """Systemd drops messages over 4096 bytes and invalid UTF-8, and would obey a command on a separate line."""
    notifier(listener, FakeWorkerState(parked_reason="a\udcff\nMAINPID=1\n" + "ü𝄞 " * 2_000)).notify(0.0)
    assert [line.partition("=")[0] for line in listener.lines()] == ["READY", "STATUS"]
    assert len(listener.messages[0]) < 4096


def test_watchdog_is_fed_at_half_its_timeout(listener: NotifySocket) -> None:
    """Other notifications do not affect it. The wait is at most a second, and never longer than until the next feed."""
    state = FakeWorkerState()
    systemd_notifier = notifier(listener, state, WATCHDOG_USEC="30000000", WATCHDOG_PID=str(os.getpid()))
    fed, waits = [], []
    for now in (100.0, 101.0, 114.5, 115.0, 116.0, 130.0):
        state.values["parked_reason"] = str(now)
        before = listener.lines().count("WATCHDOG=1")
        waits.append(systemd_notifier.notify(now))
        fed.append(listener.lines().count("WATCHDOG=1") - before)
    assert fed == [1, 0, 0, 1, 0, 1]
    assert waits == [1.0, 1.0, 0.5, 1.0, 1.0, 1.0]


def test_watchdog_is_not_fed_while_the_loop_hangs(listener: NotifySocket) -> None:
    """The notifier continues without spinning, and feeds the watchdog again if the loop recovers."""
    state = FakeWorkerState(stall_reason="the receive loop hangs")
    systemd_notifier = notifier(listener, state, WATCHDOG_USEC="500000")
    assert [systemd_notifier.notify(now) for now in (0.0, 1.0, 2.0)] == [0.25] * 3
    assert "WATCHDOG=1" not in listener.lines()
    state.values["stall_reason"] = ""
    systemd_notifier.notify(3.0)
    assert "WATCHDOG=1" in listener.lines()


def test_watchdog_is_fed_while_the_worker_stops(listener: NotifySocket) -> None:
    """Closing an unreachable queue can take longer than the watchdog's timeout. TimeoutStopSec limits it."""
    notifier(
        listener, FakeWorkerState(stall_reason="the receive loop hangs", is_stopping=True), WATCHDOG_USEC="500000"
    ).notify(0.0)
    assert "WATCHDOG=1" in listener.lines()


@pytest.mark.parametrize(
    "environment",
    [{}, {"WATCHDOG_USEC": "1000000", "WATCHDOG_PID": "1"}, {"WATCHDOG_USEC": "soon"}, {"WATCHDOG_USEC": "0"}],
    ids=["off", "of another process", "malformed", "zero"],
)
def test_watchdog_that_is_off_is_not_fed(listener: NotifySocket, environment: dict[str, Any]) -> None:
    """The state is also sent without a watchdog."""
    assert notifier(listener, **environment).notify(0.0) == 1.0
    assert listener.lines() == ["READY=1", "STATUS=running"]


def test_no_thread_is_started_without_systemd() -> None:
    """Most workers run in containers."""
    before = threading.active_count()
    systemd_notifier = Notifier(FakeWorkerState(), {"WATCHDOG_USEC": "500000"})
    systemd_notifier.start()
    assert threading.active_count() == before
    systemd_notifier.stop()


def test_missing_socket_is_logged_once_and_notified_later(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """When the socket is back, everything is sent, including READY=1."""
    path = f"{tmp_path}/notify"
    systemd_notifier = Notifier(FakeWorkerState(), {"NOTIFY_SOCKET": path, "WATCHDOG_USEC": "10000000"})
    with caplog.at_level(logging.INFO, "klaviyo_worker"):
        assert [systemd_notifier.notify(now) for now in (0.0, 1.0, 2.0)] == [1.0] * 3
        with NotifySocket(path) as listener:
            systemd_notifier.notify(3.0)
            assert listener.lines() == ["READY=1", "STATUS=running", "WATCHDOG=1"]
    assert [record.getMessage() for record in caplog.records] == ["systemd_not_notified", "systemd_notified"]
    assert vars(caplog.records[0])["reason"] == "NOTIFY_SOCKET: No such file or directory"


def test_full_socket_does_not_block_the_notifier(
    listener: NotifySocket, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A send to a full socket times out, so that the worker can end."""
    monkeypatch.setattr(systemd, "POLL", 0.01)
    state = FakeWorkerState()
    systemd_notifier = notifier(listener, state)
    for now in range(5_000):
        state.values["parked_reason"] = str(now)
        systemd_notifier.notify(now)
        if caplog.records:
            break
    assert [vars(record)["reason"] for record in caplog.records] == ["NOTIFY_SOCKET: TimeoutError"]


def test_thread_sends_changes_and_a_last_one_at_stop(listener: NotifySocket) -> None:
    """A worker can stop before the next check of the state."""
    state = FakeWorkerState(has_received=False)
    systemd_notifier = notifier(listener, state)
    systemd_notifier.start()
    listener.wait_for(lambda lines: "STATUS=starting" in lines)
    state.values["has_received"] = True
    listener.wait_for(lambda lines: "STATUS=running" in lines)
    state.values["is_stopping"] = True
    systemd_notifier.stop()
    assert listener.lines()[-2:] == ["STOPPING=1", "STATUS=stopping"]
