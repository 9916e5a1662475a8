"""The HTTP transport, against servers that respond slowly, partly or not at all."""

from __future__ import annotations

import gzip
import socket
import threading
import time
from typing import TYPE_CHECKING

import pytest

from tests.unit.runtime.test_runner import settings_for
from worker.errors import Transient
from worker.http.transport import Transport, pool

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
