"""What systemd is told, by sd_notify(3): ready, how it goes, alive, stopping. Nothing without NOTIFY_SOCKET."""

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

POLL = 1.0  # seconds; how soon a change is told
_LONGEST = 500  # characters of a status: systemd drops a message of more than 4096 bytes


class Notifier:
    """Tells systemd what changes, in a thread of its own, and feeds its watchdog while the receive loop comes round.

    While the worker stops the watchdog is fed in any case: TimeoutStopSec is the limit then.
    """

    def __init__(self, state: WorkerState, environment: Mapping[str, str]) -> None:
        """`environment` has what systemd sets: NOTIFY_SOCKET, and WATCHDOG_USEC with WATCHDOG_PID."""
        address = environment.get("NOTIFY_SOCKET", "")
        self._address = "\0" + address[1:] if address.startswith("@") else address
        watchdog = _watchdog(environment)
        self._interval = watchdog / 2 if watchdog else inf
        self._feed_at = 0.0 if watchdog else inf  # monotonic seconds
        self._state = state
        self._told: list[str] = []
        self._unheard = ConditionLog("systemd_not_notified", "systemd_notified", logging.WARNING)
        self._ended = Event()
        self._thread = Thread(target=self._run, name="systemd", daemon=True)

    def start(self) -> None:
        """Begin, if there is somebody to tell."""
        if self._address:
            self._thread.start()

    def stop(self) -> None:
        """Tell what has changed, and end."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()

    def tell(self, now: float) -> float:
        """Tell what is news at `now`, in monotonic seconds; return the seconds until the next look."""
        lines = list(self._lines())
        news = [line for line in lines if line not in self._told]
        feeds = now >= self._feed_at and (self._state.is_alive() or self._state.is_stopping())
        if feeds:
            news.append("WATCHDOG=1")
        if news and self._send("\n".join(news)):
            self._told = lines
            self._feed_at = now + self._interval if feeds else self._feed_at
        pause = self._feed_at - now
        return min(POLL, pause if pause > 0 else self._interval)

    def _lines(self) -> Iterator[str]:
        if self._state.has_polled():
            yield "READY=1"
        if self._state.is_stopping():
            yield "STOPPING=1"
        yield f"STATUS={shorten(self._status(), _LONGEST)}"

    def _status(self) -> str:
        if self._state.is_stopping():
            return "stopping"
        if parked := self._state.parked_reason():
            return f"parked: {parked}"
        outages = [f"{service}: {reason}" for service, reason in self._state.outage_reasons().items() if reason]
        if outages:
            return f"outage of {', '.join(outages)}"
        return "running" if self._state.has_polled() else "starting"

    def _send(self, message: str) -> bool:
        """Send one datagram; tell whether it was taken. Work goes on without systemd."""
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as connection:
                connection.settimeout(POLL)
                connection.connect(self._address)  # or waiting for room would take all of a CPU
                connection.send(message.encode(errors="replace"))
        except OSError as error:
            self._unheard.log(f"NOTIFY_SOCKET: {error.strerror or type(error).__name__}")
            return False
        self._unheard.log("")
        return True

    def _run(self) -> None:
        while not self._ended.wait(self.tell(time.monotonic())):
            pass
        self.tell(time.monotonic())


def _watchdog(environment: Mapping[str, str]) -> float:
    """Return the seconds in which the watchdog wants to be fed; 0 when it is not on, or another process's."""
    microseconds = environment.get("WATCHDOG_USEC", "")
    is_ours = environment.get("WATCHDOG_PID", "") in {"", str(os.getpid())}
    return int(microseconds) / 1e6 if is_ours and microseconds.isdecimal() else 0.0
