"""A fake of systemd's notification socket: a datagram socket with a path or an abstract name."""

from __future__ import annotations

import socket
import time
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Callable


class NotifySocket:
    """A socket that records the lines it receives."""

    def __init__(self, address: str) -> None:
        """`address` is a value of NOTIFY_SOCKET. A leading @ means an abstract name."""
        self.address = address
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind("\0" + address[1:] if address.startswith("@") else address)
        self.messages: list[bytes] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop listening. Later notifications fail."""
        self._socket.close()

    def lines(self) -> list[str]:
        """Return all lines so far."""
        while (message := self._receive(0.0)) is not None:
            self.messages.append(message)
        return [line for message in self.messages for line in message.decode().split("\n")]

    def wait_for(self, condition: Callable[[list[str]], object], seconds: float = 60.0) -> list[str]:
        """Return all lines when they satisfy a condition."""
        deadline = time.monotonic() + seconds
        while not condition(lines := self.lines()):
            message = self._receive(max(0.0, deadline - time.monotonic()))
            assert message is not None, f"timed out: {lines}"
            self.messages.append(message)
        return lines

    def _receive(self, seconds: float) -> bytes | None:
        self._socket.settimeout(seconds)
        try:
            return self._socket.recv(65_536)
        except (TimeoutError, BlockingIOError):
            return None
