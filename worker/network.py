"""The proxy and the certificate authority of all requests, from the environment.

Each library reads variables of its own: urllib3 none, boto3 no ALL_PROXY, gRPC only lower-case names, requests no
SSL_CERT_FILE. `configure` therefore sets the variables of all of them:
docs/decisions/0028-one-network-for-all-libraries.md.
"""

from __future__ import annotations

import ssl
from base64 import b64encode
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from urllib.parse import quote, unquote, urlsplit

from requests.utils import should_bypass_proxies

from worker.errors import SettingsError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, MutableMapping
    from pathlib import Path
    from urllib.parse import SplitResult

_PROXY = ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY")  # in order of precedence, which is curl's
_HTTP_PROXY = ("http_proxy", "HTTP_PROXY")  # the worker sends http:// requests only to this machine
_NO_PROXY = ("no_proxy", "NO_PROXY")
_THIS_MACHINE = "localhost,127.0.0.1,::1"
_BUNDLE = ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE")  # in order of precedence
_OWN_BUNDLE = ("AWS_CA_BUNDLE", "GRPC_DEFAULT_SSL_ROOTS_FILE_PATH")  # of one library; kept if they are set
VARIABLES = (*_PROXY, *_HTTP_PROXY, *_NO_PROXY, *_BUNDLE, *_OWN_BUNDLE)

_EXPECTED = "expected [http://][USER:PASSWORD@]HOST:PORT"
_ENCODE = f"{_EXPECTED}; percent-encode special characters of the password: @ as %40, : as %3A, / as %2F, # as %23"


@dataclass(frozen=True, slots=True)
class Proxy:
    """A proxy. `url` has scheme, host and port. `headers` contains the credentials, if it has some."""

    url: str
    headers: Mapping[str, str] = field(repr=False)


def proxy_for(url: str, environment: Mapping[str, str]) -> Proxy | None:
    """Return the proxy for a URL; None for an http:// URL, which names this machine. Raises SettingsError."""
    name, value = _first(_PROXY, environment)
    no_proxy = _first(_NO_PROXY, environment)[1]
    if not value or not url.startswith("https:") or should_bypass_proxies(url, no_proxy or None):
        return None
    parts = _parse(name, value)
    credentials = ":".join(unquote(text or "") for text in (parts.username, parts.password))
    headers = {"Proxy-Authorization": f"Basic {b64encode(credentials.encode()).decode()}"}
    return Proxy(f"{parts.scheme}://{_address(parts)}", headers if parts.username is not None else {})


def configure(environment: MutableMapping[str, str]) -> None:
    """Make all libraries use the same proxy, exceptions and certificate authority. Raises SettingsError."""
    if problems := list(_problems(environment)):
        raise SettingsError.joined(problems)
    name, value = _first(_PROXY, environment)
    if value:
        environment["https_proxy"] = environment["HTTPS_PROXY"] = _with_credentials(_parse(name, value))
    if value or _first(_HTTP_PROXY, environment)[1]:
        hosts = _first(_NO_PROXY, environment)[1].removesuffix(_THIS_MACHINE).rstrip(",")
        hosts = ",".join(filter(None, (hosts, _THIS_MACHINE)))
        environment["no_proxy"] = environment["NO_PROXY"] = hosts
    if bundle := _first(_BUNDLE, environment)[1]:
        environment.update(dict.fromkeys(_BUNDLE, bundle))
        for own in _OWN_BUNDLE:
            environment[own] = environment.get(own) or bundle


def _problems(environment: Mapping[str, str]) -> Iterator[SettingsError]:
    for check, names in ((_parse, _PROXY), (_check_bundle, _BUNDLE)):
        name, value = _first(names, environment)
        try:
            if value:
                check(name, value)
        except SettingsError as error:
            yield error


def _first(names: tuple[str, ...], environment: Mapping[str, str]) -> tuple[str, str]:
    """Return name and value of the first variable that is not empty."""
    return next(((name, value) for name in names if (value := environment.get(name, "").strip())), ("", ""))


def _parse(name: str, value: str) -> SplitResult:
    """Return the parts of a proxy's URL. Raises SettingsError, whose text does not quote the value."""
    url = value if "://" in value else f"http://{value}"
    try:
        parts = urlsplit(url)
        is_complete = bool(parts.hostname) and (parts.port is None or parts.port > 0)
        unquote(f"{parts.username}{parts.password}").encode("ascii")  # libraries encode others differently
    except ValueError:
        raise SettingsError(f"{name} is malformed", todo=_ENCODE) from None
    if parts.scheme.startswith("socks"):
        raise SettingsError(f"{name} names a SOCKS proxy", todo=f"{_EXPECTED}, because only HTTP proxies are supported")
    if "@" in f"{parts.path}{parts.query}{parts.fragment}":
        raise SettingsError(f"{name} is malformed", todo=_ENCODE)
    if parts.scheme not in {"http", "https"} or not is_complete or parts.path.strip("/") or parts.query:
        raise SettingsError(f"{name} is malformed", todo=_EXPECTED)
    return parts


def _address(parts: SplitResult) -> str:
    return parts.netloc.rpartition("@")[2]


def _with_credentials(parts: SplitResult) -> str:
    """Return the URL with percent-encoded credentials, which all libraries decode."""
    if parts.username is None:
        return f"{parts.scheme}://{_address(parts)}"
    user, password = (quote(unquote(text or ""), safe="") for text in (parts.username, parts.password))
    return f"{parts.scheme}://{user}:{password}@{_address(parts)}"


def _check_bundle(name: str, path: str) -> None:
    """Raise SettingsError if a file has no certificates. OpenSSL ignores such a file."""
    expected = "expected a file with certificates in PEM: those of public authorities and of your company"
    try:
        ssl.create_default_context(cafile=path)
    except (ssl.SSLError, OSError) as error:
        reason = "it contains no certificate" if isinstance(error, ssl.SSLError) else error.strerror
        raise SettingsError(f"{name}: cannot read {path}: {reason}", todo=expected) from None


def server_tls(certificate: Path, key: Path) -> ssl.SSLContext:
    """Return the TLS of a server with these files in PEM. Raises OSError."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_cert_chain(certificate, key)
    return context
