"""Free ports that stay free for the server that is to listen on them."""

from __future__ import annotations

import socket

_reservations: list[socket.socket] = []


def free_port() -> int:
    """Return a port on loopback that no other process is given until this process ends.

    A socket that is bound, but does not listen, reserves the port. A server with SO_REUSEADDR can listen on it.
    """
    reservation = socket.socket()
    reservation.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    reservation.bind(("127.0.0.1", 0))
    _reservations.append(reservation)
    return int(reservation.getsockname()[1])
