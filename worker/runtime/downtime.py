"""Whether a service as a whole is down, or only some of its endpoints."""

from __future__ import annotations

import time
from threading import Lock, Thread
from typing import TYPE_CHECKING, Protocol

from worker.errors import WorkerError

if TYPE_CHECKING:
    from collections.abc import Callable

INTERVAL = 10.0  # seconds between two questions during an outage


class Service(Protocol):
    """The questions to the client of a service."""

    def outage_reason(self) -> str:
        """Return why an endpoint has an outage, or "" if none has."""

    def answers(self) -> bool:
        """Return whether the service answers neutral requests, which depend on no message. Can take a minute."""


class Downtime:
    """The downtime of a service. While an endpoint has an outage, a thread asks whether the service answers at all."""

    def __init__(self, service: Service, clock: Callable[[], float] = time.monotonic) -> None:
        self._service = service
        self._clock = clock
        self._lock = Lock()
        self._is_down = False
        self._is_asking = False
        self._ask_at = 0.0  # monotonic seconds

    def reason(self) -> str:
        """Return why the service is down; "" if it is not, or if that is not known yet. Does not block."""
        reason = self._service.outage_reason()
        with self._lock:
            self._is_down = self._is_down and bool(reason)
            if reason and not self._is_asking and self._clock() >= self._ask_at:
                self._is_asking = True
                Thread(target=self._ask, name="downtime", daemon=True).start()
            return reason if self._is_down else ""

    def _ask(self) -> None:
        answers = True  # also if it refuses the worker
        try:
            answers = self._service.answers()
        except WorkerError:
            pass
        finally:
            with self._lock:
                self._is_asking = False
                self._is_down = not answers
                self._ask_at = self._clock() + INTERVAL
