"""The causes of failed connections: name, certificate, proxy."""

from __future__ import annotations

import os
import re
import ssl
from http import HTTPStatus
from typing import TYPE_CHECKING

import urllib3

from worker.errors import ProxyMisconfigured, Transient
from worker.network import proxy_for

if TYPE_CHECKING:
    from worker.errors import WorkerError

_PROXY_STATUS = re.compile(r"Tunnel connection failed: (\d{3})")  # the text of http.client's error
_CLOCK = frozenset({9, 10})  # OpenSSL's codes: the certificate is not yet valid, or has expired
_UNKNOWN_ISSUER = frozenset({18, 19, 20, 21})
_MALFORMED = frozenset(range(80, 94))  # an extension that RFC 5280 demands is missing, or breaks its rules


def connection_error(error: urllib3.exceptions.HTTPError, url: str, what: str) -> WorkerError:
    """Return the error for a request to `url` that has no response."""
    if isinstance(error, urllib3.exceptions.ProxyError):
        return _proxy_error(error.original_error, url, what)
    failure = error.args[0] if error.args else None
    if isinstance(failure, ssl.SSLCertVerificationError):
        reason = f"{what}: its certificate is not valid ({failure.verify_message})"
        return Transient(reason, todo=_certificate_advice(failure.verify_code))
    if isinstance(error, urllib3.exceptions.NameResolutionError):
        return Transient(f"{what}: the name of the host is unknown")
    return Transient(f"{what}: {type(error).__name__}")


def _proxy_error(cause: Exception, url: str, what: str) -> WorkerError:
    proxy = proxy_for(url, os.environ)
    name = f"the proxy {proxy.url if proxy else ''}".strip()
    status = _PROXY_STATUS.search(str(cause))
    if status is None:
        return Transient(f"{what}: {name} is not reachable ({type(cause).__name__})", todo="check HTTPS_PROXY")
    if int(status[1]) != HTTPStatus.PROXY_AUTHENTICATION_REQUIRED:
        todo = "check the URL, and that the proxy permits the host"
        return Transient(f"{what}: {name} answered {status[1]}", todo=todo)
    if proxy and proxy.headers:
        todo = "correct them in HTTPS_PROXY, and percent-encode special characters"
        return ProxyMisconfigured(f"{what}: {name} refuses user and password (407)", todo=todo)
    todo = "set HTTPS_PROXY to http://USER:PASSWORD@HOST:PORT"
    return ProxyMisconfigured(f"{what}: {name} requires user and password (407)", todo=todo)


def _certificate_advice(code: int) -> str:
    if code in _CLOCK:
        return "check the clock of this machine"
    if code in _UNKNOWN_ISSUER:
        return "if a proxy intercepts TLS, set SSL_CERT_FILE to a file with public certificate authorities and your own"
    if code in _MALFORMED:
        return "from Python 3.13 on, certificates must follow RFC 5280: renew those of the server, or of your proxy"
    return "check the URL"
