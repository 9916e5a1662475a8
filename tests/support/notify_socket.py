"""Where systemd listens: a datagram socket, by path or abstract."""

from __future__ import annotations

import socket
import time
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Callable


class NotifySocket:
    """Keeps what it is told, line by line."""

    def __init__(self, address: str) -> None:
        """`address`: as in NOTIFY_SOCKET; a leading @ stands for an abstract one."""
        self.address = address
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind("\0" + address[1:] if address.startswith("@") else address)
        self.messages: list[bytes] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Listen no more. Whoever tells something now finds that out."""
        self._socket.close()

    def lines(self) -> list[str]:
        """Return all lines so far."""
        while (message := self._receive(0.0)) is not None:
            self.messages.append(message)
        return [line for message in self.messages for line in message.decode().split("\n")]

    def wait_for(self, condition: Callable[[list[str]], object], seconds: float = 20.0) -> list[str]:
        """Return all lines, once they are what is waited for."""
        deadline = time.monotonic() + seconds
        while not condition(lines := self.lines()):
            message = self._receive(max(0.0, deadline - time.monotonic()))
            assert message is not None, f"waited in vain: {lines}"
            self.messages.append(message)
        return lines

    def _receive(self, seconds: float) -> bytes | None:
        self._socket.settimeout(seconds)
        try:
            return self._socket.recv(65_536)
        except (TimeoutError, BlockingIOError):
            return None
