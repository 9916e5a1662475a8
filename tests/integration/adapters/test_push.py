"""The push endpoint on a real socket."""

from __future__ import annotations

import base64
import json
import socket
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import TYPE_CHECKING, Any

import jwt
import pytest
import requests
from cryptography.hazmat.primitives.asymmetric import rsa
from hypothesis import given
from hypothesis import strategies as st

from adapters import Failure, QueueError, QueueOptions, QueueURLError, open_queue
from adapters.push import queue as push
from adapters.push.oidc import TokenVerifier
from adapters.push.queue import PushDelivery, PushQueue
from tests.support.ports import free_port

if TYPE_CHECKING:
    from collections.abc import Iterator

FAILURE = Failure("Klaviyo refused the record", "send", "Rejected")
AUDIENCE = "https://worker.example.com"
ACCOUNT = "pubsub@shop.iam.gserviceaccount.com"


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


def received(queue: PushQueue, number: int = 1) -> list[PushDelivery]:
    got: list[PushDelivery] = []
    deadline = time.monotonic() + 60
    while len(got) < number and time.monotonic() < deadline:
        got += queue.receive(number - len(got), 0.2)
    return got


def test_response_is_the_settlement(queue: PushQueue) -> None:
    """The response is sent only after the settlement. 204 means that the effect is in Klaviyo."""
    send = Sender(queue)
    responses = [send(envelope(b"%d" % number)) for number in range(3)]
    done, failed, poison = received(queue, 3)
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
    (delivery,) = received(queue)
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
    (delivery,) = received(queue)
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
    delivery = push._delivery(json.dumps(document).encode(), lambda _: None)
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
    deliveries = received(queue, 3)
    assert send(envelope(b"one too many")).result(10) == 429
    queue.ack(deliveries)
    assert [response.result(10) for response in held] == [204] * 3
    monkeypatch.setattr(push, "MAX_BODY", 2_000_000)
    large = send(b"x" * 900_000)
    deliveries = received(queue)
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


def test_body_without_length_counts_as_the_largest(queue: PushQueue) -> None:
    """The limit of memory applies before the body is read."""
    send = Sender(queue)
    held = send(envelope(b"x"))
    deliveries = received(queue)
    chunked = requests.post(f"http://127.0.0.1:{queue.port}/", iter([b"{}"]), timeout=60)
    assert chunked.status_code == 429
    queue.ack(deliveries)
    assert held.result(5) == 204


def test_incomplete_body_times_out(queue: PushQueue, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise a few stalled clients would cause 429 for all others."""
    monkeypatch.setattr(push, "BODY_TIMEOUT", 0.2)
    send = Sender(queue)
    with socket.create_connection(("127.0.0.1", queue.port), timeout=60) as stalled:
        stalled.sendall(b"POST / HTTP/1.1\r\nHost: worker\r\nContent-Length: 900000\r\n\r\n{")
        assert stalled.recv(1000).startswith(b"HTTP/1.1 408")
    response = send(b"x" * 900_000)
    queue.ack(received(queue))
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
    deliveries = received(queue)
    waiting = send(envelope(b"waiting"))
    deadline = time.monotonic() + 60
    while not queue._inbox.items() and time.monotonic() < deadline:
        time.sleep(0.01)
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
        keys = json.dumps({"keys": [public]}).encode()

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(200)
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
    verifying_queue.ack(received(verifying_queue))
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


def test_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers that pull do not need uvicorn."""
    monkeypatch.delitem(sys.modules, "adapters.push.queue")
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(QueueError, match=r"push:// needs uvicorn, .* pip install 'klaviyo-worker\[push\]'"):
        open_queue("push://127.0.0.1")
