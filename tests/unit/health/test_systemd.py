"""What systemd is told, and when."""

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


def test_ready_is_told_once_the_loop_has_come_round(listener: NotifySocket) -> None:
    """`systemctl start` waits for it, so it has to mean something; it is told once."""
    state = FakeWorkerState(has_polled=False)
    told = notifier(listener, state)
    told.tell(0.0)
    assert listener.lines() == ["STATUS=starting"]
    state.values["has_polled"] = True
    for now in (1.0, 2.0):
        told.tell(now)
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
def test_the_status_says_what_is_in_the_way(listener: NotifySocket, state: dict[str, Any], status: str) -> None:
    """A parked worker is ready all the same: it is up, and goes on by itself."""
    notifier(listener, FakeWorkerState(**state)).tell(0.0)
    lines = listener.lines()
    assert {"READY=1", f"STATUS={status}"} <= set(lines)
    assert ("STOPPING=1" in lines) == (status == "stopping")


def test_the_status_follows_the_state(listener: NotifySocket) -> None:
    """Also back to what it was."""
    state = FakeWorkerState()
    told = notifier(listener, state)
    for now, parked in enumerate(["", "no", "no", ""]):
        state.values["parked_reason"] = parked
        told.tell(now)
    assert listener.lines() == ["READY=1", "STATUS=running", "STATUS=parked: no", "STATUS=running"]


def test_a_status_is_one_short_line(listener: NotifySocket) -> None:
    """Systemd drops more than 4096 bytes and what is no UTF-8, and would obey what stands on a line of its own."""
    notifier(listener, FakeWorkerState(parked_reason="a\udcff\nMAINPID=1\n" + "ü𝄞 " * 2_000)).tell(0.0)
    assert [line.partition("=")[0] for line in listener.lines()] == ["READY", "STATUS"]
    assert len(listener.messages[0]) < 4096


def test_the_watchdog_is_fed_at_half_its_time(listener: NotifySocket) -> None:
    """Whatever else is told meanwhile. No pause between two looks is longer than until then, or than a second."""
    state = FakeWorkerState()
    told = notifier(listener, state, WATCHDOG_USEC="30000000", WATCHDOG_PID=str(os.getpid()))
    fed, pauses = [], []
    for now in (100.0, 101.0, 114.5, 115.0, 116.0, 130.0):
        state.values["parked_reason"] = str(now)
        before = listener.lines().count("WATCHDOG=1")
        pauses.append(told.tell(now))
        fed.append(listener.lines().count("WATCHDOG=1") - before)
    assert fed == [1, 0, 0, 1, 0, 1]
    assert pauses == [1.0, 1.0, 0.5, 1.0, 1.0, 1.0]


def test_a_loop_that_hangs_feeds_no_watchdog(listener: NotifySocket) -> None:
    """That is what the watchdog is for. Looking goes on, without spinning, and so does feeding."""
    state = FakeWorkerState(is_alive=False)
    told = notifier(listener, state, WATCHDOG_USEC="500000")
    assert [told.tell(now) for now in (0.0, 1.0, 2.0)] == [0.25] * 3
    assert "WATCHDOG=1" not in listener.lines()
    state.values["is_alive"] = True
    told.tell(3.0)
    assert "WATCHDOG=1" in listener.lines()


def test_a_worker_that_stops_is_left_to_the_stop_timeout(listener: NotifySocket) -> None:
    """A queue that does not answer may take longer than the watchdog has patience."""
    notifier(listener, FakeWorkerState(is_alive=False, is_stopping=True), WATCHDOG_USEC="500000").tell(0.0)
    assert "WATCHDOG=1" in listener.lines()


@pytest.mark.parametrize(
    "environment",
    [{}, {"WATCHDOG_USEC": "1000000", "WATCHDOG_PID": "1"}, {"WATCHDOG_USEC": "soon"}, {"WATCHDOG_USEC": "0"}],
    ids=["off", "of another process", "malformed", "zero"],
)
def test_no_watchdog_is_not_fed(listener: NotifySocket, environment: dict[str, Any]) -> None:
    """What is told of the state does not depend on it."""
    assert notifier(listener, **environment).tell(0.0) == 1.0
    assert listener.lines() == ["READY=1", "STATUS=running"]


def test_without_systemd_nothing_happens() -> None:
    """No thread either: most workers run elsewhere."""
    before = threading.active_count()
    told = Notifier(FakeWorkerState(), {"WATCHDOG_USEC": "500000"})
    told.start()
    assert threading.active_count() == before
    told.stop()


def test_a_socket_that_is_gone_is_said_once_and_told_later(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The worker works on, and systemd misses nothing when it is back, least of all READY."""
    path = f"{tmp_path}/notify"
    told = Notifier(FakeWorkerState(), {"NOTIFY_SOCKET": path, "WATCHDOG_USEC": "10000000"})
    with caplog.at_level(logging.INFO, "klaviyo_worker"):
        assert [told.tell(now) for now in (0.0, 1.0, 2.0)] == [1.0] * 3
        with NotifySocket(path) as listener:
            told.tell(3.0)
            assert listener.lines() == ["READY=1", "STATUS=running", "WATCHDOG=1"]
    assert [record.getMessage() for record in caplog.records] == ["systemd_not_notified", "systemd_notified"]
    assert vars(caplog.records[0])["reason"] == "NOTIFY_SOCKET: No such file or directory"


def test_a_systemd_that_reads_nothing_holds_up_nothing(
    listener: NotifySocket, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A socket that is full is given up on for now, so that the worker can end."""
    monkeypatch.setattr(systemd, "POLL", 0.01)
    state = FakeWorkerState()
    told = notifier(listener, state)
    for now in range(5_000):
        state.values["parked_reason"] = str(now)
        told.tell(now)
        if caplog.records:
            break
    assert [vars(record)["reason"] for record in caplog.records] == ["NOTIFY_SOCKET: TimeoutError"]


def test_what_changes_is_told_as_it_changes_and_in_the_end(listener: NotifySocket) -> None:
    """A worker that stops at once has stopped before the next look."""
    state = FakeWorkerState(has_polled=False)
    told = notifier(listener, state)
    told.start()
    listener.wait_for(lambda lines: "STATUS=starting" in lines)
    state.values["has_polled"] = True
    listener.wait_for(lambda lines: "STATUS=running" in lines)
    state.values["is_stopping"] = True
    told.stop()
    assert listener.lines()[-2:] == ["STOPPING=1", "STATUS=stopping"]
