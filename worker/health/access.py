"""The access to the HTTP port: the names of the machine, a password, and TLS."""

from __future__ import annotations

import base64
import binascii
import hmac
import ipaddress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from worker.network import server_tls

if TYPE_CHECKING:
    import socket
    from pathlib import Path

ALL_INTERFACES = "0.0.0.0"  # noqa: S104 - the setting in a container


@dataclass(frozen=True, slots=True)
class Access:
    """The rules for a request. `host`: the address that the port listens on. No password: everybody can read it."""

    host: str = "127.0.0.1"
    password: str = field(default="", repr=False)
    certificate: Path | None = None
    key: Path | None = None

    def allows_name(self, host_header: str | None) -> bool:
        """Return whether a request names this machine, and not a domain to which a website has given its address.

        Such a domain makes the browser of an operator send a website's requests to this port (DNS rebinding). A port
        that other machines can reach has names that only its network knows.
        """
        if host_header is None or self.host in {ALL_INTERFACES, "::"}:
            return True
        name = ""
        try:
            name = urlsplit(f"//{host_header}").hostname or ""  # in lower case
            ipaddress.ip_address(name)
        except ValueError:
            return name in {"localhost", self.host.lower()}
        return True

    def allows_reading(self, authorization: str | None) -> bool:
        """Return whether a request has the password (basic authentication, RFC 7617), if there is one."""
        if not self.password:
            return True
        scheme, _, encoded = (authorization or "").partition(" ")
        try:
            credentials = base64.b64decode(encoded, validate=True) if scheme.lower() == "basic" else b""
        except (binascii.Error, ValueError):
            return False
        return hmac.compare_digest(credentials.partition(b":")[2], self.password.encode())

    def wrap(self, connection: socket.socket) -> socket.socket:
        """Return a connection with TLS, if there is a certificate. Raises OSError.

        The handshake is part of the first reading. The files are read each time, because certificates are renewed.
        """
        if self.certificate is None or self.key is None:
            return connection
        context = server_tls(self.certificate, self.key)
        return context.wrap_socket(connection, server_side=True, do_handshake_on_connect=False)
