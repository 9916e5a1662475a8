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
from tests.support.pubsub_emulator import free_port

if TYPE_CHECKING:
    from collections.abc import Iterator

FAILURE = Failure("Klaviyo refused the record", "send", "Rejected")
AUDIENCE = "https://worker.example.com"
ACCOUNT = "pubsub@shop.iam.gserviceaccount.com"


def envelope(data: bytes, **more: Any) -> bytes:
    """Return what Pub/Sub posts."""
    message = {
        "data": base64.b64encode(data).decode(),
        "attributes": {"colour": "blue"},
        "messageId": "17",
        "publishTime": "2026-11-24T10:00:00.123Z",
    }
    return json.dumps({"message": message, "subscription": "projects/demo/subscriptions/s", **more}).encode()


class Sender:
    """Posts in the background, as Pub/Sub does, and keeps the answers."""

    def __init__(self, queue: PushQueue) -> None:
        self.queue = queue
        queue.receive(1, 0)  # listens from now on
        self._pool = ThreadPoolExecutor(16)

    def __call__(self, body: bytes, **headers: str) -> Future[int]:
        return self._pool.submit(self._post, body, headers)

    def _post(self, body: bytes, headers: dict[str, str]) -> int:
        url = f"http://127.0.0.1:{self.queue.port}/"
        return requests.post(url, body, headers=headers, timeout=20).status_code


@pytest.fixture
def queue() -> Iterator[PushQueue]:
    queue = PushQueue("127.0.0.1", 0, QueueOptions(max_messages=3, max_bytes=1_000_000))
    yield queue
    queue.close()


def received(queue: PushQueue, number: int = 1) -> list[PushDelivery]:
    got: list[PushDelivery] = []
    deadline = time.monotonic() + 10
    while len(got) < number and time.monotonic() < deadline:
        got += queue.receive(number - len(got), 0.2)
    return got


def test_the_answer_is_the_settlement(queue: PushQueue) -> None:
    """Nothing is answered before; 204 means the effect is in Klaviyo, anything else that it is not."""
    send = Sender(queue)
    answers = [send(envelope(b"%d" % number)) for number in range(3)]
    done, failed, poison = received(queue, 3)
    time.sleep(0.2)
    assert not any(answer.done() for answer in answers)
    queue.ack([done])
    queue.nack([failed], 5.0, FAILURE)
    assert not queue.dead_letter(poison, FAILURE)
    queue.ack([poison])  # too late to change anything
    by_body = {b"%d" % number: answer.result(10) for number, answer in enumerate(answers)}
    assert [by_body[delivery.body] for delivery in (done, failed, poison)] == [204, 503, 500]


def test_metadata_comes_out_of_the_envelope(queue: PushQueue) -> None:
    """Id, attributes, attempt and the time of publishing, as from the other queues."""
    send = Sender(queue)
    answer = send(envelope(b"\xff body", deliveryAttempt=3))
    (delivery,) = received(queue)
    queue.ack([delivery])
    assert answer.result(10) == 204
    assert (delivery.id, delivery.body, delivery.attributes) == ("17", b"\xff body", {"colour": "blue"})
    assert delivery.attempt == 3
    assert delivery.published_at is not None
    assert delivery.published_at.isoformat() == "2026-11-24T10:00:00.123000+00:00"
    assert "body" not in repr(delivery)


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'{"message": 1}', b'{"notificationType": "Message"}'])
def test_what_is_no_envelope_is_a_message_itself(body: bytes, queue: PushQueue) -> None:
    """Payload unwrapping, or rubbish: the pipeline decides, and nothing is lost."""
    answer = Sender(queue)(body)
    (delivery,) = received(queue)
    assert (delivery.body, delivery.attempt) == (body, None)
    queue.nack([delivery])
    assert answer.result(10) == 503


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
    """Whatever is posted."""
    delivery = push._delivery(json.dumps(document).encode(), lambda _: None)
    assert isinstance(delivery.body, bytes)
    assert isinstance(delivery.id, str)
    assert delivery.attempt is None or isinstance(delivery.attempt, int)
    assert delivery.published_at is None or delivery.published_at.tzinfo


def test_only_post_is_answered(queue: PushQueue) -> None:
    """A browser, or a scanner."""
    Sender(queue)
    assert requests.get(f"http://127.0.0.1:{queue.port}/", timeout=5).status_code == 405


def test_bodies_and_load_are_bounded(queue: PushQueue, monkeypatch: pytest.MonkeyPatch) -> None:
    """413 for what no Pub/Sub message can be; 429 when enough is held, by number or bytes."""
    monkeypatch.setattr(push, "MAX_BODY", 5_000)
    send = Sender(queue)
    assert send(b"x" * 5_001).result(10) == 413
    held = [send(envelope(b"x")) for _ in range(3)]
    deliveries = received(queue, 3)
    assert send(envelope(b"one too many")).result(10) == 429
    queue.ack(deliveries)
    assert [answer.result(10) for answer in held] == [204] * 3
    monkeypatch.setattr(push, "MAX_BODY", 2_000_000)
    large = send(b"x" * 900_000)
    deliveries = received(queue)
    assert send(b"x" * 200_000).result(10) == 429
    queue.ack(deliveries)
    assert large.result(10) == 204


def test_a_sender_that_hung_up_is_forgotten(queue: PushQueue) -> None:
    """It sends again: working on both would fill the endpoint with messages whose answers nobody hears."""
    Sender(queue)
    for _ in range(5):  # more than are taken at a time
        with pytest.raises(requests.Timeout):
            requests.post(f"http://127.0.0.1:{queue.port}/", envelope(b"x"), timeout=0.2)
    assert received_for(queue, 1.0) == []


def test_a_body_without_a_length_counts_as_the_largest(queue: PushQueue) -> None:
    """The bound on memory holds before anything is read."""
    send = Sender(queue)
    held = send(envelope(b"x"))
    deliveries = received(queue)
    chunked = requests.post(f"http://127.0.0.1:{queue.port}/", iter([b"{}"]), timeout=5)
    assert chunked.status_code == 429
    queue.ack(deliveries)
    assert held.result(5) == 204


def test_a_body_that_does_not_arrive_holds_no_place(queue: PushQueue, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a few stalled senders would have everybody else answered 429."""
    monkeypatch.setattr(push, "BODY_TIMEOUT", 0.2)
    send = Sender(queue)
    with socket.create_connection(("127.0.0.1", queue.port), timeout=5) as stalled:
        stalled.sendall(b"POST / HTTP/1.1\r\nHost: worker\r\nContent-Length: 900000\r\n\r\n{")
        assert stalled.recv(1000).startswith(b"HTTP/1.1 408")
    answer = send(b"x" * 900_000)
    queue.ack(received(queue))
    assert answer.result(10) == 204


def received_for(queue: PushQueue, seconds: float) -> list[PushDelivery]:
    time.sleep(seconds)
    return list(queue.receive(10, 0))


def late(send: Sender) -> int | None:
    """Send until nobody listens any more; return an answer that is not 503."""
    for _ in range(50):
        try:
            status = send(envelope(b"late")).result(5)
        except requests.RequestException:
            return None
        if status != 503:
            return status
        time.sleep(0.05)
    return 0


def test_stopping_answers_who_was_not_received_and_lets_the_rest_finish(queue: PushQueue) -> None:
    """503 at once for what nobody has begun; no new requests; what is in work gets its answer."""
    send = Sender(queue)
    begun = send(envelope(b"begun"))
    deliveries = received(queue)
    waiting = send(envelope(b"waiting"))
    deadline = time.monotonic() + 10
    while not queue._inbox.items() and time.monotonic() < deadline:
        time.sleep(0.01)
    queue.stop()
    assert waiting.result(5) == 503
    assert late(send) is None
    assert not begun.done()
    queue.ack(deliveries)
    assert begun.result(5) == 204
    queue.close()
    queue.ack(deliveries)  # the server is gone: no error


def test_a_port_in_use_says_so(queue: PushQueue) -> None:
    """Exit code 3, with the port."""
    queue.receive(1, 0)
    with pytest.raises(QueueError, match=f"cannot listen on 127.0.0.1 port {queue.port}: Address already in use"):
        PushQueue("127.0.0.1", queue.port, QueueOptions()).receive(1, 0)


def test_the_url_names_host_port_and_whose_tokens_count() -> None:
    """The port is PUB_SUB_PORT where the URL has none."""
    port = free_port()
    queue = open_queue("push://127.0.0.1", QueueOptions(port=port, direct_dead_letter=True))
    assert isinstance(queue, PushQueue)
    assert (queue.host, queue.port, queue.lease_seconds) == ("127.0.0.1", port, None)
    anybody, direct = map(str, queue.check())
    assert "audience" in anybody
    assert "KLAVIYO_WORKER_DEAD_LETTER_MODE" in direct
    assert open_queue(f"push://[::1]:80?audience={AUDIENCE}&service_account={ACCOUNT}").check() == []
    half = (f"service_account={ACCOUNT}", f"audience={AUDIENCE}", "audience=", "audience=&service_account=")
    rest = ("push://", "push://h:port", "push://h/path", "push://h?x=1")
    for url in (*rest, *(f"push://h?{query}" for query in half)):
        with pytest.raises(QueueURLError, match="expected push://HOST"):
            open_queue(url)


class Google:
    """Signs tokens as Google does, and publishes its keys."""

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
def google() -> Iterator[Google]:
    running = Google()
    yield running
    running.close()


@pytest.fixture
def guarded(google: Google) -> Iterator[PushQueue]:
    queue = PushQueue("127.0.0.1", 0, QueueOptions(), TokenVerifier(AUDIENCE, ACCOUNT, google.url))
    yield queue
    queue.close()


def test_with_an_audience_only_googles_token_opens(
    google: Google, guarded: PushQueue, caplog: pytest.LogCaptureFixture
) -> None:
    """Signature, audience, issuer, time, and service account."""
    send = Sender(guarded)
    answer = send(envelope(b"mine"), Authorization=f"Bearer {google.token()}")
    guarded.ack(received(guarded))
    assert answer.result(10) == 204
    stranger = Google()
    now = int(time.time())
    forged = [
        stranger.token(),
        google.token(aud="https://other.example.com"),
        google.token(iss="https://evil.example.com"),
        google.token(iat=now - 7200, exp=now - 3600),
        google.token(email="somebody@else.example"),
        google.token(email_verified=False),
        jwt.encode({"aud": AUDIENCE}, "secret-of-at-least-thirty-two-bytes", algorithm="HS256", headers={"kid": "1"}),
        jwt.encode({"aud": AUDIENCE}, "", algorithm="none", headers={"kid": "1"}),
        "garbage",
        "",
    ]
    assert [send(b"{}", Authorization=f"Bearer {token}").result(10) for token in forged] == [401] * len(forged)
    assert send(b"{}").result(10) == 401
    assert send(b"{}", Authorization="Basic eDp5").result(10) == 401
    assert guarded.receive(10, 0.1) == []
    assert all(token not in caplog.text for token in forged if token)
    stranger.close()


def test_a_token_whose_signature_cloud_run_removed_proves_nothing(
    google: Google, guarded: PushQueue, caplog: pytest.LogCaptureFixture
) -> None:
    """Cloud Run does so when it has checked the token itself; the log says what to do."""
    token = google.token().rpartition(".")[0] + ".SIGNATURE_REMOVED_BY_GOOGLE"
    assert Sender(guarded)(b"{}", Authorization=f"Bearer {token}").result(10) == 401
    assert "remove audience and service_account from QUEUE_URL" in str([vars(record) for record in caplog.records])


def test_keys_out_of_reach_are_no_refusal() -> None:
    """Pub/Sub sends it again, and the message waits."""
    verifier = TokenVerifier(AUDIENCE, ACCOUNT, f"http://127.0.0.1:{free_port()}/certs")
    queue = PushQueue("127.0.0.1", 0, QueueOptions(), verifier)
    google = Google()
    try:
        assert Sender(queue)(b"{}", Authorization=f"Bearer {google.token()}").result(10) == 503
    finally:
        queue.close()
        google.close()


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who pulls does without uvicorn; who is pushed to is told what to install."""
    monkeypatch.delitem(sys.modules, "adapters.push.queue")
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(QueueError, match=r"push:// needs uvicorn, .* pip install 'klaviyo-worker\[push\]'"):
        open_queue("push://127.0.0.1")
