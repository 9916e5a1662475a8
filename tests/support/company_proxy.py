"""A company's proxy on loopback: it demands credentials and intercepts TLS with certificates of its own authority."""

from __future__ import annotations

import asyncio
import socket
import ssl
from base64 import b64encode
from contextlib import closing, suppress
from datetime import UTC, datetime, timedelta
from http import HTTPStatus
from threading import Thread
from typing import TYPE_CHECKING, Self

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

ENCODED = "worker:p%40ss%2Fw%3Ard%23%25"
_AUTHORIZED = f"Basic {b64encode(b'worker:p@ss/w:rd#%').decode()}"

_SIGNS_CERTIFICATES = x509.KeyUsage(
    key_cert_sign=True,
    crl_sign=False,
    digital_signature=False,
    content_commitment=False,
    key_encipherment=False,
    data_encipherment=False,
    key_agreement=False,
    encipher_only=False,
    decipher_only=False,
)


class Authority:
    """A certificate authority. `bundle` is the file that clients trust.

    Its certificates have the extensions that Python demands from 3.13 on.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Company")])
        builder = _builder(name, name, self._key, is_authority=True).add_extension(_SIGNS_CERTIFICATES, critical=True)
        self._certificate = builder.sign(self._key, hashes.SHA256())
        self.bundle = directory / "company.pem"
        self.bundle.write_bytes(self._certificate.public_bytes(serialization.Encoding.PEM))

    def certificate(self, host: str) -> Path:
        """Return a file with the private key and the certificate of a server with this name."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, host)])
        alternative = x509.SubjectAlternativeName([x509.DNSName(host)])
        issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())
        builder = _builder(subject, self._certificate.subject, key, is_authority=False)
        builder = builder.add_extension(alternative, critical=False).add_extension(issuer, critical=False)
        certificate = builder.sign(self._key, hashes.SHA256())
        file = self._directory / f"{host}.pem"
        private = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        file.write_bytes(private + certificate.public_bytes(serialization.Encoding.PEM))
        return file

    def context(self, host: str) -> ssl.SSLContext:
        """Return the TLS context of a server with this name, for HTTP/1.1 and HTTP/2."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.certificate(host))
        context.set_alpn_protocols(["h2", "http/1.1"])
        return context


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, *, is_authority: bool
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=is_authority, path_length=None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


class CompanyProxy:
    """A proxy that connects hosts by name to ports of this machine, which speak no TLS.

    `statuses` has an entry for each CONNECT: the host, and the status of the response. `scheme` is that of the proxy:
    with https, clients reach the proxy itself over TLS.
    """

    def __init__(self, authority: Authority, ports: Mapping[str, int], *, scheme: str = "http") -> None:
        self._ports = dict(ports)
        self._contexts = {host: authority.context(host) for host in ports}
        self._own_context = authority.context("localhost") if scheme == "https" else None
        self._scheme = scheme
        self._loop = asyncio.new_event_loop()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._port = self._listener.getsockname()[1]
        self._thread = Thread(target=self._run, daemon=True)
        self.statuses: list[tuple[str, int]] = []

    @property
    def address(self) -> str:
        """Return host and port."""
        host = "localhost" if self._own_context else "127.0.0.1"  # the certificate names localhost
        return f"{host}:{self._port}"

    def url(self, credentials: str = ENCODED) -> str:
        """Return the value for HTTPS_PROXY."""
        return f"{self._scheme}://{credentials}@{self.address}" if credentials else f"{self._scheme}://{self.address}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._listener.close()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        serving = asyncio.start_server(self._serve, sock=self._listener, ssl=self._own_context)
        server = self._loop.run_until_complete(serving)
        self._loop.run_forever()
        server.close()
        tasks = asyncio.all_tasks(self._loop)
        for task in tasks:
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        self._loop.run_until_complete(asyncio.sleep(0.1))  # transports close in callbacks
        self._loop.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError, asyncio.IncompleteReadError, asyncio.CancelledError), closing(writer):
            host = await self._connect(reader, writer)
            if host in self._ports:
                await writer.start_tls(self._contexts[host])
                upstream, upstream_writer = await asyncio.open_connection("127.0.0.1", self._ports[host])
                with closing(upstream_writer):
                    await asyncio.gather(_copy(reader, upstream_writer), _copy(upstream, writer))

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> str:
        """Answer a CONNECT request, and return its host; "" if the request is refused."""
        request, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().splitlines()
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
        host = request.split()[1].partition(":")[0]
        status = 200 if host in self._ports else 403
        if headers.get("proxy-authorization", "") != _AUTHORIZED:
            status = 407
        self.statuses.append((host, status))
        writer.write(f"HTTP/1.1 {status} From the proxy\r\nContent-Length: 0\r\n\r\n".encode())
        await writer.drain()
        return host if status == HTTPStatus.OK else ""


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(OSError):
        while part := await reader.read(65_536):
            writer.write(part)
            await writer.drain()
    writer.close()
