"""The installed worker as a systemd service."""

from __future__ import annotations

import json
import signal
import sqlite3
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING
from uuid import uuid4

from tests.acceptance.conftest import Worker, events_named
from tests.acceptance.test_run import stop, updated
from tests.support.notify_socket import NotifySocket
from tests.support.waiting import wait_for
from worker.sandbox import Fault

if TYPE_CHECKING:
    from pathlib import Path

    from worker.sandbox import Sandbox

RUN = ("run", "--http-port", "0", "--park-retry-interval", "0.2")


def test_status_is_reported_to_systemd(worker: Worker, sandbox: Sandbox) -> None:
    """The statuses are ready, parked, running and stopping. They contain no secret. The socket is abstract."""
    sandbox.klaviyo.faults.add(Fault(status=401, times=None))
    worker.publish(updated(next(iter(sandbox.shop.customers))))
    with NotifySocket(f"@{uuid4()}") as listener:
        process = worker.start(*RUN, env={"NOTIFY_SOCKET": listener.address})
        lines = listener.wait_for(lambda lines: "READY=1" in lines and "STATUS=parked: " in lines[-1])
        assert "KLAVIYO_AUTH_KEY" in lines[-1]
        sandbox.klaviyo.faults.clear()
        listener.wait_for(lambda lines: lines[-1] == "STATUS=running")
        stop(process)
        lines = listener.lines()
    assert lines[-2:] == ["STOPPING=1", "STATUS=stopping"]
    assert lines.count("READY=1") == 1
    assert not any(line.startswith("WATCHDOG") for line in lines)
    secrets = sandbox.environment["KLAVIYO_AUTH_KEY"], json.loads(sandbox.environment["CT_API_CLIENT"])["secret"]
    assert not any(secret in line for secret in secrets for line in lines)


def test_watchdog_is_notified_until_the_end(worker: Worker, sandbox: Sandbox, tmp_path: Path) -> None:
    """Otherwise systemd would kill a worker that finishes its messages."""
    sandbox.klaviyo.faults.add(Fault(action="hang", seconds=2, times=1, match="POST /api/profiles"))
    worker.publish(updated(next(iter(sandbox.shop.customers))))
    with NotifySocket(f"{tmp_path}/notify") as listener:
        process = worker.start(*RUN, env={"NOTIFY_SOCKET": listener.address, "WATCHDOG_USEC": "200000"})
        listener.wait_for(lambda lines: sandbox.klaviyo.faults.triggered and "WATCHDOG=1" in lines)
        process.send_signal(signal.SIGTERM)
        listener.wait_for(lambda lines: "STOPPING=1" in lines and lines[-3:] == ["WATCHDOG=1"] * 3)
    assert process.wait(60) == 0


def test_worker_continues_if_the_socket_is_closed(worker: Worker, sandbox: Sandbox, tmp_path: Path) -> None:
    """The error is logged once."""
    with NotifySocket(f"{tmp_path}/notify") as listener:
        process = worker.start(*RUN, env={"NOTIFY_SOCKET": listener.address, "WATCHDOG_USEC": "100000"})
        listener.wait_for(bool)
    wait_for(lambda: events_named(worker, "systemd_not_notified"))
    worker.publish(updated(next(iter(sandbox.shop.customers))))
    wait_for(lambda: sandbox.account.profiles)
    stop(process)
    assert [line["reason"] for line in events_named(worker, "systemd_not_notified")] == [
        "NOTIFY_SOCKET: Connection refused"
    ]


def test_end_by_error_is_reported_to_systemd(worker: Worker, tmp_path: Path) -> None:
    """Systemd starts TimeoutStopSec at that moment, as no signal was sent."""
    with NotifySocket(f"{tmp_path}/notify") as listener:
        process = worker.start(*RUN, env={"NOTIFY_SOCKET": listener.address})
        listener.wait_for(lambda lines: "READY=1" in lines)
        with closing(sqlite3.connect(tmp_path / "queue.db")) as database:
            database.execute("DROP TABLE messages")
        assert process.wait(60) == 3
        assert "STOPPING=1" in listener.lines()


def test_once_reports_nothing_to_systemd(worker: Worker, tmp_path: Path) -> None:
    """A run that ends by itself is not a service."""
    with NotifySocket(f"{tmp_path}/notify") as listener:
        done = worker("run", "--once", env={"NOTIFY_SOCKET": listener.address, "WATCHDOG_USEC": "100000"})
        assert (done.returncode, listener.lines()) == (0, [])


def test_abort_logs_a_traceback(worker: Worker, tmp_path: Path) -> None:
    """A worker that the watchdog kills must leave a trace of the reason."""
    with NotifySocket(f"{tmp_path}/notify") as listener:
        environment = {"NOTIFY_SOCKET": listener.address, "PYTHONFAULTHANDLER": "1"}
        process = replace(worker, is_forked=False).start(*RUN, env=environment)
        listener.wait_for(bool)
    process.send_signal(signal.SIGABRT)
    process.wait(60)
    assert "Fatal Python error: Aborted" in worker.log.read_text()
