"""The HTTP transport, against servers that respond slowly, partly or not at all."""

from __future__ import annotations

import gzip
import socket
import threading
import time
import tracemalloc
import zlib
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.runtime.test_runner import settings_for
from worker.errors import ResponseTooLarge, Transient
from worker.http.transport import MAX_RETRY_AFTER, Transport, pool, retry_after

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener


def transport(listener: socket.socket, serve: Callable[[socket.socket], None]) -> tuple[Transport, str]:
    """Return a transport, and the URL of a server that handles one connection with `serve`."""

    def run() -> None:
        connection, _ = listener.accept()
        with connection:
            serve(connection)

    threading.Thread(target=run, daemon=True).start()
    url = f"http://127.0.0.1:{listener.getsockname()[1]}/"
    return Transport(pool(url, 1), settings_for(read_timeout=0.5), lambda *_: None), url


def test_slow_response_times_out(listener: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each byte arrives within the read timeout, so the whole response needs its own timeout."""
    monkeypatch.setattr("worker.http.transport.BODY_TIMEOUT_FACTOR", 1)
    disconnected = threading.Event()

    def respond_slowly(connection: socket.socket) -> None:
        connection.recv(9999)
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 40\r\n\r\n")
        try:
            for _ in range(40):
                time.sleep(0.1)
                connection.sendall(b" ")
        except OSError:
            disconnected.set()

    transport_, url = transport(listener, respond_slowly)
    with pytest.raises(Transient, match=r"^no response to GET 127.0.0.1:\d+/: TimeoutError$"):
        transport_.request("x", "GET", url, {})
    assert disconnected.wait(60)


def test_error_names_the_endpoint_without_ids(listener: socket.socket) -> None:
    """With ids, an outage would have a different reason for each record."""
    transport_, url = transport(listener, lambda connection: connection.close())
    with pytest.raises(Transient, match=r"^no response to PATCH 127.0.0.1:\d+/api/catalog-items/{id}/variants: "):
        transport_.request("x", "PATCH", f"{url}api/catalog-items/$custom:::1/variants?page=2", {})


@pytest.mark.parametrize("size", [0, 1, 65_536, 300_000])
@pytest.mark.parametrize("way", ["plain", "gzip", "chunked"])
def test_connection_is_reused_after_every_kind_of_response(way: str, size: int, listener: socket.socket) -> None:
    """Opening a connection takes longer than most requests."""
    content = b"x" * size
    body = gzip.compress(content) if way == "gzip" else content
    length = b"Transfer-Encoding: chunked" if way == "chunked" else b"Content-Length: %d" % len(body)
    encoding = b"Content-Encoding: gzip\r\n" if way == "gzip" else b""
    chunked = (b"%x\r\n%s\r\n" % (size, content) if content else b"") + b"0\r\n\r\n"

    def respond(connection: socket.socket) -> None:
        for _ in range(3):
            connection.recv(9999)
            head = b"HTTP/1.1 200 OK\r\n" + encoding + length + b"\r\n\r\n"
            connection.sendall(head + (chunked if way == "chunked" else body))

    transport_, url = transport(listener, respond)
    assert [transport_.request("x", "GET", url, {}).body == content for _ in range(3)] == [True] * 3


def bomb(size: int) -> bytes:
    """Return gzip-encoded spaces that decode to `size` bytes."""
    compressor = zlib.compressobj(9, zlib.DEFLATED, 31)
    parts = [compressor.compress(b" " * 1_000_000) for _ in range(size // 1_000_000)]
    return b"".join(parts) + compressor.flush()


@pytest.mark.parametrize("way", ["gzip", "chunked", "identity"])
def test_endless_response_is_transient(way: str, listener: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit applies to decoded bytes: a few kilobytes can decode to gigabytes."""
    monkeypatch.setattr("worker.http.transport.MAX_BODY_BYTES", 3_000_000)
    compressed = bomb(200_000_000)
    head = {
        "gzip": b"Content-Encoding: gzip\r\nContent-Length: %d" % len(compressed),
        "chunked": b"Transfer-Encoding: chunked",
        "identity": b"Content-Length: 200000000",
    }[way]

    def respond(connection: socket.socket) -> None:
        connection.recv(9999)
        with suppress(OSError):
            connection.sendall(b"HTTP/1.1 200 OK\r\n" + head + b"\r\n\r\n")
            if way == "gzip":
                connection.sendall(compressed)
            while way != "gzip":
                connection.sendall(b"186a0\r\n" + b" " * 100_000 + b"\r\n")

    transport_, url = transport(listener, respond)
    tracemalloc.start()
    try:
        with pytest.raises(
            ResponseTooLarge, match=r"^the response to GET 127.0.0.1:\d+/ has more than 3,000,000 bytes$"
        ):
            transport_.request("x", "GET", url, {})
        assert tracemalloc.get_traced_memory()[1] < 20_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("0", 0.0),
        ("1.5", 1.5),
        ("7200", MAX_RETRY_AFTER),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 0.0),
        ("Wed, 21 Oct 2015 07:28:00 -0000 GMT", 0.0),
        ("Wed, 21 Oct 9999 07:28:00 GMT", MAX_RETRY_AFTER),
        ("Wed, 21 Oct 99999999999 07:28:00 GMT", None),
        ("Wed, 21 Oct 2015 07:28:00 +9999", None),
        ("-5", None),
        ("nan", None),
        ("1e9", None),
        ("soon", None),
        ("", None),
    ],
)
def test_retry_after_is_a_number_or_a_date(header: str, seconds: float | None) -> None:
    """Anything else is ignored."""
    assert retry_after({"Retry-After": header}) == seconds


_WORDS = st.sampled_from(
    [
        "Wed,",
        "21",
        "Oct",
        "2026",
        "99999999999",
        "07:28:00",
        "25:61:61",
        "GMT",
        "-0000",
        "+9999",
        "-",
        ":",
        ",",
        "(",
        "T",
    ]
)


@given(st.one_of(st.text(), st.lists(_WORDS).map(" ".join)))
def test_malformed_retry_after_raises_no_error(header: str) -> None:
    """An exception would fail the whole batch."""
    seconds = retry_after({"Retry-After": header})
    assert seconds is None or 0 <= seconds <= MAX_RETRY_AFTER
