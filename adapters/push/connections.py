"""Limits of the connections to the push endpoint, which every host that reaches the port can open."""

from __future__ import annotations

import resource
from typing import TYPE_CHECKING, ClassVar

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

if TYPE_CHECKING:
    import asyncio

HEAD_TIMEOUT = 10.0  # seconds to send the head of a request, or the rest of a body whose response was sent
SPARE_CONNECTIONS = 64  # beyond one per message: idle connections of Pub/Sub


def limited_protocol(max_requests: int) -> type[H11Protocol]:
    """Return the protocol of a server with `max_requests` open requests.

    Its connections use at most half of the file descriptors of the process.
    """
    maximum = max_requests + SPARE_CONNECTIONS
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files != resource.RLIM_INFINITY:
        maximum = min(maximum, files // 2)
    return type("LimitedConnection", (_Connection,), {"maximum": maximum, "idle": {}})


class _Connection(H11Protocol):
    """A connection with limits that uvicorn does not have: of the time until a request, and of the connections.

    One connection too many closes the one that is idle for the longest time: itself, if all others have a request.
    """

    maximum: ClassVar[int]
    idle: ClassVar[dict[_Connection, None]]  # the longest idle first
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as uvicorn does
        """Start the timer of the first request."""
        super().connection_made(transport)
        self.idle[self] = None
        self._start_timer()
        if len(self.connections) > self.maximum:
            oldest = next(iter(self.idle))
            del self.idle[oldest]  # it is lost only later, possibly after many more connections were made
            oldest.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        self._stop_timer()
        self.idle.pop(self, None)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Handle a part of a request."""
        super().data_received(data)
        self._update()

    def on_response_complete(self) -> None:
        """Wait for the next request."""
        super().on_response_complete()
        self._update()

    def _update(self) -> None:
        """Record whether the connection is idle, which is so if no request waits for its response."""
        if self.transport.is_closing():
            return
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_timer()
            self.idle.pop(self, None)
            return
        self.idle.setdefault(self)
        if self.conn.their_state is h11.IDLE and not self.conn.trailing_data[0]:
            self._stop_timer()  # uvicorn limits the time until the next request begins
        elif self._timer is None:
            self._start_timer()

    def _start_timer(self) -> None:
        self._timer = self.loop.call_later(HEAD_TIMEOUT, self.transport.abort)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
