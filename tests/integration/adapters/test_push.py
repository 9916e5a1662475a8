"""The push endpoint on a real socket."""

from __future__ import annotations

import base64
import json
import select
import socket
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Thread
from typing import TYPE_CHECKING, Any

import jwt
import pytest
import requests
from cryptography.hazmat.primitives.asymmetric import rsa
from hypothesis import given
from hypothesis import strategies as st

from adapters import Failure, QueueError, QueueOptions, QueueURLError, open_queue
from adapters.push import connections, oidc
from adapters.push import queue as push
from adapters.push.delivery import PushDelivery, parse_request
from adapters.push.oidc import KeysUnavailableError, TokenRefusedError, TokenVerifier
from adapters.push.queue import PushQueue
from tests.support.ports import free_port
from tests.support.waiting import receive, wait_for

if TYPE_CHECKING:
    from collections.abc import Iterator

FAILURE = Failure("Klaviyo refused the record", "send", "Rejected")
AUDIENCE = "https://worker.example.com"
ACCOUNT = "pubsub@shop.iam.gserviceaccount.com"


REFUSED = b"GET / HTTP/1.1\r\nHost: worker\r\nContent-Length: 100\r\n\r\n"
ANSWERED = b"GET / HTTP/1.1\r\nHost: worker\r\n\r\n"


def envelope(data: bytes, **more: Any) -> bytes:
    """Return the body of a push request of Pub/Sub."""
    message = {
        "data": base64.b64encode(data).decode(),
        "attributes": {"colour": "blue"},
        "messageId": "17",
        "publishTime": "2026-11-24T10:00:00.123Z",
    }
    return json.dumps({"message": message, "subscription": "projects/demo/subscriptions/s", **more}).encode()


class Sender:
    """Posts in the background, like Pub/Sub, and keeps the responses."""

    def __init__(self, queue: PushQueue) -> None:
        self.queue = queue
        queue.receive(1, 0)  # starts to listen
        self._pool = ThreadPoolExecutor(16)

    def __call__(self, body: bytes, **headers: str) -> Future[int]:
        return self._pool.submit(self._post, body, headers)

    def _post(self, body: bytes, headers: dict[str, str]) -> int:
        url = f"http://127.0.0.1:{self.queue.port}/"
        return requests.post(url, body, headers=headers, timeout=60).status_code


@pytest.fixture
def queue() -> Iterator[PushQueue]:
    queue = PushQueue("127.0.0.1", 0, QueueOptions(max_messages=3, max_bytes=1_000_000))
    yield queue
    queue.close()


def test_response_is_the_settlement(queue: PushQueue) -> None:
    """The response is sent only after the settlement. 204 means that the effect is in Klaviyo."""
    send = Sender(queue)
    responses = [send(envelope(b"%d" % number)) for number in range(3)]
    done, failed, poison = receive(queue, 3)
    time.sleep(0.2)
    assert not any(response.done() for response in responses)
    queue.ack([done])
    queue.nack([failed], 5.0, FAILURE)
    assert not queue.dead_letter(poison, FAILURE)
    queue.ack([poison])  # too late to change anything
    by_body = {b"%d" % number: response.result(10) for number, response in enumerate(responses)}
    assert [by_body[delivery.body] for delivery in (done, failed, poison)] == [204, 503, 500]


def test_envelope_has_the_metadata(queue: PushQueue) -> None:
    """A delivery has id, attributes, attempt and the time of publishing, as on other queues."""
    send = Sender(queue)
    response = send(envelope(b"\xff body", deliveryAttempt=3))
    (delivery,) = receive(queue, 1)
    queue.ack([delivery])
    assert response.result(10) == 204
    assert (delivery.id, delivery.body, delivery.attributes) == ("17", b"\xff body", {"colour": "blue"})
    assert delivery.attempt == 3
    assert delivery.published_at is not None
    assert delivery.published_at.isoformat() == "2026-11-24T10:00:00.123000+00:00"
    assert "body" not in repr(delivery)


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'{"message": 1}', b'{"notificationType": "Message"}'])
def test_body_without_envelope_is_the_message(body: bytes, queue: PushQueue) -> None:
    """This is the case with payload unwrapping. The pipeline rejects an invalid body."""
    response = Sender(queue)(body)
    (delivery,) = receive(queue, 1)
    assert (delivery.body, delivery.attempt) == (body, None)
    queue.nack([delivery])
    assert response.result(10) == 503


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "deliveryAttempt": json_values,
            "message": json_values
            | st.fixed_dictionaries(
                {"messageId": json_values},
                optional={"data": json_values, "attributes": json_values, "publishTime": json_values},
            ),
        },
    )
)
def test_any_envelope_becomes_a_delivery(document: dict[str, Any]) -> None:
    """No request body causes an error."""
    delivery = parse_request(json.dumps(document).encode(), lambda _: None)
    assert isinstance(delivery.body, bytes)
    assert isinstance(delivery.id, str)
    assert delivery.attempt is None or isinstance(delivery.attempt, int)
    assert delivery.published_at is None or delivery.published_at.tzinfo


def test_only_post_is_accepted(queue: PushQueue) -> None:
    """Other methods come from browsers and scanners."""
    Sender(queue)
    assert requests.get(f"http://127.0.0.1:{queue.port}/", timeout=60).status_code == 405


def test_size_and_number_of_requests_are_limited(queue: PushQueue, monkeypatch: pytest.MonkeyPatch) -> None:
    """The response is 413 for a body larger than any Pub/Sub message, and 429 at the limit of messages or bytes."""
    monkeypatch.setattr(push, "MAX_BODY", 5_000)
    send = Sender(queue)
    assert send(b"x" * 5_001).result(10) == 413
    held = [send(envelope(b"x")) for _ in range(3)]
    deliveries = receive(queue, 3)
    assert send(envelope(b"one too many")).result(10) == 429
    queue.ack(deliveries)
    assert [response.result(10) for response in held] == [204] * 3
    monkeypatch.setattr(push, "MAX_BODY", 2_000_000)
    large = send(b"x" * 900_000)
    deliveries = receive(queue, 1)
    assert send(b"x" * 200_000).result(10) == 429
    queue.ack(deliveries)
    assert large.result(10) == 204


def test_message_of_disconnected_client_is_dropped(queue: PushQueue) -> None:
    """Pub/Sub sends the message again, and does not receive the response of the first request."""
    Sender(queue)
    for _ in range(5):  # more than the limit
        with pytest.raises(requests.Timeout):
            requests.post(f"http://127.0.0.1:{queue.port}/", envelope(b"x"), timeout=0.2)
    assert received_for(queue, 1.0) == []


def test_body_without_length_counts_as_it_arrives(queue: PushQueue) -> None:
    """A small chunked body is accepted beside other requests, and a large one is refused as soon as it is too large."""
    send = Sender(queue)
    held = [send(envelope(b"x"))]
    deliveries = receive(queue, 1)
    url = f"http://127.0.0.1:{queue.port}/"
    pool = ThreadPoolExecutor(1)
    chunked = pool.submit(lambda: requests.post(url, iter([b"{", b"}"]), timeout=60).status_code)
    deliveries += receive(queue, 1)
    with socket.create_connection(("127.0.0.1", queue.port), timeout=60) as endless:
        endless.sendall(b"POST / HTTP/1.1\r\nHost: worker\r\nTransfer-Encoding: chunked\r\n\r\n")
        for _ in range(10):
            endless.sendall(b"30D40\r\n" + bytes(200_000) + b"\r\n")
        assert endless.recv(1000).startswith(b"HTTP/1.1 429")
    queue.ack(deliveries)
    assert [response.result(10) for response in (*held, chunked)] == [204, 204]


def test_body_without_length_has_the_same_limit(queue: PushQueue, monkeypatch: pytest.MonkeyPatch) -> None:
    """The response is 413 as soon as the body is larger than any Pub/Sub message."""
    monkeypatch.setattr(push, "MAX_BODY", 5_000)
    Sender(queue)
    url = f"http://127.0.0.1:{queue.port}/"
    assert requests.post(url, iter([b"x" * 3_000] * 2), timeout=60).status_code == 413


@pytest.mark.parametrize(
    "sent", [b"", b"POST / HTTP/1.1\r\nHost: worker\r\n", REFUSED, REFUSED + b"{", ANSWERED + b"POST"]
)
def test_connection_that_completes_no_request_is_closed(
    queue: PushQueue, monkeypatch: pytest.MonkeyPatch, sent: bytes
) -> None:
    """It has no request, a part of a head, a part of a body whose response was sent, or a part of a second head."""
    monkeypatch.setattr(connections, "HEAD_TIMEOUT", 0.3)
    Sender(queue)
    with socket.create_connection(("127.0.0.1", queue.port), timeout=60) as slow:
        slow.sendall(sent)
        with suppress(ConnectionResetError):
            while slow.recv(1000):
                slow.sendall(b"x" if sent else b"")


def test_oldest_idle_connections_are_closed_if_there_are_too_many(
    queue: PushQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client that opens connections without end takes none of the files that the worker needs."""
    monkeypatch.setattr(connections, "SPARE_CONNECTIONS", 1)  # 4 in total
    monkeypatch.setattr(connections, "HEAD_TIMEOUT", 600.0)
    Sender(queue)
    with ExitStack() as stack:
        idle = [stack.enter_context(socket.create_connection(("127.0.0.1", queue.port), timeout=60)) for _ in range(12)]
        for connection in idle[:8]:
            with suppress(ConnectionResetError):
                assert connection.recv(1) == b""
        assert select.select(idle[8:], [], [], 0) == ([], [], [])  # open, and nothing to read


def test_connection_with_a_request_is_not_idle(queue: PushQueue, monkeypatch: pytest.MonkeyPatch) -> None:
    """An additional connection closes the one that is idle for the longest time; requests in progress go on."""
    monkeypatch.setattr(connections, "SPARE_CONNECTIONS", 1)  # 4 in total
    monkeypatch.setattr(connections, "HEAD_TIMEOUT", 0.5)
    send = Sender(queue)
    held = [send(envelope(b"x")) for _ in range(2)]
    deliveries = receive(queue, 2)
    idle = [socket.create_connection(("127.0.0.1", queue.port), timeout=60) for _ in range(8)]
    time.sleep(0.6)
    assert requests.get(f"http://127.0.0.1:{queue.port}/", timeout=60).status_code == 405
    with suppress(ConnectionResetError):
        assert idle[0].recv(1) == b""
    queue.ack(deliveries)
    assert [response.result(10) for response in held] == [204, 204]
    for connection in idle:
        connection.close()


def test_incomplete_body_times_out(queue: PushQueue, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise a few stalled clients would cause 429 for all others."""
    monkeypatch.setattr(push, "BODY_TIMEOUT", 0.2)
    send = Sender(queue)
    with socket.create_connection(("127.0.0.1", queue.port), timeout=60) as stalled:
        stalled.sendall(b"POST / HTTP/1.1\r\nHost: worker\r\nContent-Length: 900000\r\n\r\n{")
        assert stalled.recv(1000).startswith(b"HTTP/1.1 408")
    response = send(b"x" * 900_000)
    queue.ack(receive(queue, 1))
    assert response.result(10) == 204


def received_for(queue: PushQueue, seconds: float) -> list[PushDelivery]:
    time.sleep(seconds)
    return list(queue.receive(10, 0))


def first_other_status(send: Sender) -> int | None:
    """Send until the endpoint is closed; return the first status other than 503, or None."""
    for _ in range(50):
        try:
            status = send(envelope(b"first_other_status")).result(5)
        except requests.RequestException:
            return None
        if status != 503:
            return status
        time.sleep(0.05)
    return 0


def test_stop_rejects_pending_requests_and_waits_for_others(queue: PushQueue) -> None:
    """Pending and new requests get 503; a received message gets the response of its settlement."""
    send = Sender(queue)
    in_work = send(envelope(b"in work"))
    deliveries = receive(queue, 1)
    waiting = send(envelope(b"waiting"))
    wait_for(queue._inbox.items)
    queue.stop()
    assert waiting.result(5) == 503
    assert first_other_status(send) is None
    assert not in_work.done()
    queue.ack(deliveries)
    assert in_work.result(5) == 204
    queue.close()
    queue.ack(deliveries)  # the server is closed: no error


def test_port_in_use_is_reported(queue: PushQueue) -> None:
    """The exit code is 3; the error names the port."""
    queue.receive(1, 0)
    with pytest.raises(QueueError, match=f"cannot listen on 127.0.0.1 port {queue.port}: Address already in use"):
        PushQueue("127.0.0.1", queue.port, QueueOptions()).receive(1, 0)


def test_url_has_host_port_audience_and_account() -> None:
    """Without a port in the URL, the port is PUB_SUB_PORT."""
    port = free_port()
    queue = open_queue("push://127.0.0.1", QueueOptions(port=port, direct_dead_letter=True))
    assert isinstance(queue, PushQueue)
    assert (queue.host, queue.port, queue.lease_seconds) == ("127.0.0.1", port, None)
    no_token, direct = map(str, queue.check())
    assert "audience" in no_token
    assert "KLAVIYO_WORKER_DEAD_LETTER_MODE" in direct
    assert open_queue(f"push://[::1]:80?audience={AUDIENCE}&service_account={ACCOUNT}").check() == []
    half = (f"service_account={ACCOUNT}", f"audience={AUDIENCE}", "audience=", "audience=&service_account=")
    rest = ("push://", "push://h:port", "push://h/path", "push://h?x=1")
    for url in (*rest, *(f"push://h?{query}" for query in half)):
        with pytest.raises(QueueURLError, match="expected push://HOST"):
            open_queue(url)


class FakeGoogle:
    """A fake of Google that signs tokens and serves its public keys."""

    def __init__(self) -> None:
        self.key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        public = json.loads(jwt.algorithms.RSAAlgorithm.to_jwk(self.key.public_key())) | {"kid": "1", "alg": "RS256"}
        self.keys = keys = json.dumps({"keys": [public]}).encode()

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(302 if self.path.endswith("/moved") else 200)
                self.send_header("Location", "/certs")
                self.send_header("Content-Length", str(len(keys)))
                self.end_headers()
                self.wfile.write(keys)

            def log_message(self, *_: object) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}/certs"

    def token(self, **claims: Any) -> str:
        now = int(time.time())
        defaults = {
            "iss": "https://accounts.google.com",
            "aud": AUDIENCE,
            "email": ACCOUNT,
            "email_verified": True,
            "iat": now,
            "exp": now + 600,
        }
        return jwt.encode(defaults | claims, self.key, algorithm="RS256", headers={"kid": "1"})

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def google() -> Iterator[FakeGoogle]:
    running = FakeGoogle()
    yield running
    running.close()


@pytest.fixture
def verifying_queue(google: FakeGoogle) -> Iterator[PushQueue]:
    queue = PushQueue("127.0.0.1", 0, QueueOptions(), TokenVerifier(AUDIENCE, ACCOUNT, google.url))
    yield queue
    queue.close()


def test_only_valid_token_is_accepted(
    google: FakeGoogle, verifying_queue: PushQueue, caplog: pytest.LogCaptureFixture
) -> None:
    """Signature, audience, issuer, time and service account are verified."""
    send = Sender(verifying_queue)
    response = send(envelope(b"mine"), Authorization=f"Bearer {google.token()}")
    verifying_queue.ack(receive(verifying_queue, 1))
    assert response.result(10) == 204
    other = FakeGoogle()
    now = int(time.time())
    forged = [
        other.token(),
        google.token(aud="https://other.example.com"),
        google.token(iss="https://evil.example.com"),
        google.token(iat=now - 7200, exp=now - 3600),
        google.token(email="other@example.com"),
        google.token(email_verified=False),
        jwt.encode({"aud": AUDIENCE}, "secret-of-at-least-thirty-two-bytes", algorithm="HS256", headers={"kid": "1"}),
        jwt.encode({"aud": AUDIENCE}, "", algorithm="none", headers={"kid": "1"}),
        "garbage",
        "",
    ]
    assert [send(b"{}", Authorization=f"Bearer {token}").result(10) for token in forged] == [401] * len(forged)
    assert send(b"{}").result(10) == 401
    assert send(b"{}", Authorization="Basic eDp5").result(10) == 401
    assert verifying_queue.receive(10, 0.1) == []
    assert all(token not in caplog.text for token in forged if token)
    other.close()


def test_token_without_signature_is_rejected(
    google: FakeGoogle, verifying_queue: PushQueue, caplog: pytest.LogCaptureFixture
) -> None:
    """Cloud Run removes the signature after it has verified the token; the log says what to do."""
    token = google.token().rpartition(".")[0] + ".SIGNATURE_REMOVED_BY_GOOGLE"
    assert Sender(verifying_queue)(b"{}", Authorization=f"Bearer {token}").result(10) == 401
    assert "remove audience and service_account from QUEUE_URL" in str([vars(record) for record in caplog.records])


def test_unavailable_keys_cause_redelivery() -> None:
    """Pub/Sub sends the message again."""
    verifier = TokenVerifier(AUDIENCE, ACCOUNT, f"http://127.0.0.1:{free_port()}/certs")
    queue = PushQueue("127.0.0.1", 0, QueueOptions(), verifier)
    google = FakeGoogle()
    try:
        assert Sender(queue)(b"{}", Authorization=f"Bearer {google.token()}").result(10) == 503
    finally:
        queue.close()
        google.close()


class KeyServer:
    """A server of public keys that counts its requests and answers when it is allowed to."""

    def __init__(self, google: FakeGoogle) -> None:
        self.google = google
        self.requests = 0
        self.may_answer = Event()
        self.may_answer.set()
        self.body: bytes | None = google.keys

        def download(url: str) -> bytes:
            self.requests += 1
            assert self.may_answer.wait(60)
            if self.body is None:
                raise OSError
            return self.body

        self.download = download


@pytest.fixture
def keys(monkeypatch: pytest.MonkeyPatch, google: FakeGoogle) -> KeyServer:
    server = KeyServer(google)
    monkeypatch.setattr(oidc, "_download", server.download)
    return server


def test_keys_are_fetched_once_for_all_requests(keys: KeyServer) -> None:
    """While they are fetched, all requests wait for the same response; after a failure, the next fetch has to wait."""
    verifier = TokenVerifier(AUDIENCE, ACCOUNT)
    token = f"Bearer {keys.google.token()}"
    keys.body = None
    keys.may_answer.clear()
    with ThreadPoolExecutor(8) as pool:
        waiting = [pool.submit(verifier.verify, token) for _ in range(8)]
        keys.may_answer.set()
        assert all(isinstance(each.exception(60), KeysUnavailableError) for each in waiting)
    with pytest.raises(KeysUnavailableError):
        verifier.verify(token)
    assert keys.requests == 1


def test_forged_tokens_do_not_delay_valid_ones(keys: KeyServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A token with an unknown key causes at most one fetch in 30 seconds, and no other token waits for it."""
    monkeypatch.setattr(oidc, "_PAUSE", 0.0)
    verifier = TokenVerifier(AUDIENCE, ACCOUNT)
    valid = f"Bearer {keys.google.token()}"
    verifier.verify(valid)
    forged = jwt.encode({}, keys.google.key, algorithm="RS256", headers={"kid": "2"})
    keys.may_answer.clear()
    with ThreadPoolExecutor(1) as pool:
        fetching = pool.submit(verifier.verify, f"Bearer {forged}")
        while keys.requests < 2:
            time.sleep(0.01)
        verifier.verify(valid)
        with pytest.raises(TokenRefusedError, match="unknown key"):
            verifier.verify(f"Bearer {forged}")
        keys.may_answer.set()
        assert isinstance(fetching.exception(60), TokenRefusedError)
    monkeypatch.setattr(oidc, "_PAUSE", 30.0)
    for _ in range(3):
        with pytest.raises(TokenRefusedError, match="unknown key"):
            verifier.verify(f"Bearer {forged}")
    assert keys.requests == 3
    verifier.verify(valid)


@pytest.mark.parametrize(
    "body",
    [b"", b"[]", b"{}", b'{"keys": 1}', b'{"keys": [{"kty": "RSA", "kid": "1"}]}', b'{"keys": ' + b"[" * 9_999],
)
def test_malformed_keys_are_unavailable_keys(keys: KeyServer, body: bytes) -> None:
    """Pub/Sub sends the message again."""
    keys.body = body
    with pytest.raises(KeysUnavailableError, match="no public keys from Google"):
        TokenVerifier(AUDIENCE, ACCOUNT).verify(f"Bearer {keys.google.token()}")


def test_keys_of_another_host_or_of_any_size_are_not_read(google: FakeGoogle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Redirects are not followed."""
    with pytest.raises(KeysUnavailableError, match="HTTPError"):
        TokenVerifier(AUDIENCE, ACCOUNT, google.url + "/moved").verify(f"Bearer {google.token()}")
    monkeypatch.setattr(oidc, "MAX_KEYS_BYTES", 100)
    with pytest.raises(KeysUnavailableError, match="ValueError"):
        TokenVerifier(AUDIENCE, ACCOUNT, google.url).verify(f"Bearer {google.token()}")


def test_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers that pull do not need uvicorn."""
    monkeypatch.delitem(sys.modules, "adapters.push.queue")
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(QueueError, match=r"push:// needs uvicorn, .* pip install 'klaviyo-worker\[push\]'"):
        open_queue("push://127.0.0.1")
