"""Notifications to systemd, as sd_notify(3) describes: ready, status, watchdog, stopping.

Without NOTIFY_SOCKET, nothing is sent.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from math import inf
from textwrap import shorten
from threading import Event, Thread
from typing import TYPE_CHECKING

from worker.telemetry.log import ConditionLog

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from worker.telemetry.state import WorkerState

POLL = 1.0  # seconds between two checks of the state
_MAX_STATUS = 500  # characters: systemd drops a message of more than 4096 bytes


class Notifier:
    """A thread that sends state changes to systemd, and feeds the watchdog unless the worker is stalled.

    While the worker is stopping, it always feeds the watchdog, because TimeoutStopSec limits the time to stop.
    """

    def __init__(self, state: WorkerState, environment: Mapping[str, str]) -> None:
        """Create the thread. `environment` has systemd's variables NOTIFY_SOCKET, WATCHDOG_USEC and WATCHDOG_PID."""
        address = environment.get("NOTIFY_SOCKET", "")
        self._address = "\0" + address[1:] if address.startswith("@") else address
        timeout = _watchdog_timeout(environment)
        self._interval = timeout / 2 if timeout else inf
        self._feed_at = 0.0 if timeout else inf  # monotonic seconds
        self._state = state
        self._sent: list[str] = []
        self._unreachable = ConditionLog("systemd_not_notified", "systemd_notified", logging.WARNING)
        self._stopped = Event()
        self._thread = Thread(target=self._run, name="systemd", daemon=True)

    def start(self) -> None:
        """Start the thread, if the worker runs under systemd."""
        if self._address:
            self._thread.start()

    def stop(self) -> None:
        """Send the last change and end the thread."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join()

    def notify(self, now: float) -> float:
        """Send the lines that have changed. Return the seconds until the next call. `now` is in monotonic seconds."""
        lines = list(self._lines())
        changed = [line for line in lines if line not in self._sent]
        is_fed = now >= self._feed_at and (not self._state.stall_reason() or self._state.is_stopping())
        if is_fed:
            changed.append("WATCHDOG=1")
        if changed and self._send("\n".join(changed)):
            self._sent = lines
            if is_fed:
                self._feed_at = now + self._interval
        wait = self._feed_at - now
        return min(POLL, wait if wait > 0 else self._interval)

    def _lines(self) -> Iterator[str]:
        if self._state.has_received():
            yield "READY=1"
        if self._state.is_stopping():
            yield "STOPPING=1"
        yield f"STATUS={shorten(self._status(), _MAX_STATUS)}"

    def _status(self) -> str:
        if self._state.is_stopping():
            return "stopping"
        if parked_reason := self._state.parked_reason():
            return f"parked: {parked_reason}"
        outages = [f"{service}: {reason}" for service, reason in self._state.outage_reasons().items() if reason]
        if outages:
            return f"outage of {', '.join(outages)}"
        return "running" if self._state.has_received() else "starting"

    def _send(self, message: str) -> bool:
        """Send one datagram and return whether that succeeded. The worker also runs without systemd."""
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as connection:
                connection.settimeout(POLL)
                connection.connect(self._address)  # without it, a full socket would make `send` spin
                connection.send(message.encode(errors="replace"))
        except OSError as error:
            self._unreachable.log(f"NOTIFY_SOCKET: {error.strerror or type(error).__name__}")
            return False
        self._unreachable.log("")
        return True

    def _run(self) -> None:
        while not self._stopped.wait(self.notify(time.monotonic())):
            pass
        self.notify(time.monotonic())


def _watchdog_timeout(environment: Mapping[str, str]) -> float:
    """Return the watchdog's timeout in seconds; 0 if it is off or belongs to another process."""
    microseconds = environment.get("WATCHDOG_USEC", "")
    is_own = environment.get("WATCHDOG_PID", "") in {"", str(os.getpid())}
    return int(microseconds) / 1e6 if is_own and microseconds.isdecimal() else 0.0
