"""The Pub/Sub adapter on Google's emulator, and its calls against a server that fails as the service may."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from google.api_core.exceptions import ServiceUnavailable
from google.api_core.retry import Retry, if_exception_type
from google.iam.v1 import iam_policy_pb2
from google.protobuf import any_pb2, empty_pb2
from google.pubsub_v1 import types as pubsub_types
from google.pubsub_v1.services.subscriber.transports import SubscriberGrpcTransport
from google.pubsub_v1.types import AcknowledgeRequest
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from adapters import Failure, QueueError, QueueOptions, QueueURLError, open_queue, pubsub, settlement, streaming_pull
from adapters.pubsub import PubSubQueue
from tests.emulator import Emulator, Subscription, bodies

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    Open = Callable[..., PubSubQueue]

FAILURE = Failure("Klaviyo refused the record: " + "é" * 2000, "send", "Rejected")


@pytest.fixture
def subscription(emulator: Emulator, monkeypatch: pytest.MonkeyPatch) -> Subscription:
    monkeypatch.setenv("PUBSUB_EMULATOR_HOST", emulator.host)
    return Subscription(emulator)


@pytest.fixture
def opened() -> Iterator[Callable[..., PubSubQueue]]:
    """Open queues that are closed in the end."""
    queues: list[PubSubQueue] = []

    def open_(url: str, **options: Any) -> PubSubQueue:
        queue = open_queue(url, QueueOptions(**options))
        assert isinstance(queue, PubSubQueue)
        queues.append(queue)
        return queue

    yield open_
    for queue in queues:
        queue.close()


def receive(queue: PubSubQueue, number: int, wait: float = 15.0) -> list[pubsub.PubSubDelivery]:
    """Receive so many messages, or what came in time."""
    deadline = time.monotonic() + wait
    got: list[pubsub.PubSubDelivery] = []
    while len(got) < number and time.monotonic() < deadline:
        got += queue.receive(number - len(got), 0.2)
    return got


def test_messages_come_in_batches_and_are_gone_once_acked(subscription: Subscription, opened: Open) -> None:
    """Any bytes, attributes, the attempt, and the time of publishing arrive."""
    sent = [b"\xff\x00 no text", "é".encode(), b"x" * 9_000_000, *(b"%d" % number for number in range(200))]
    subscription.publish(*sent[:2], colour="blue")
    subscription.publish(sent[2])
    subscription.publish(*sent[3:])
    queue = opened(subscription.url)
    assert queue.check() == []
    got = receive(queue, len(sent))
    assert sorted(delivery.body for delivery in got) == sorted(sent)
    by_body = {delivery.body: delivery for delivery in got}
    assert by_body[sent[0]].attributes == {"colour": "blue"}
    assert {delivery.attempt for delivery in got} == {1}
    assert 0 <= time.time() - got[0].published_at.timestamp() < 60
    assert "no text" not in repr(got)
    queue.ack(got)
    queue.close()
    assert subscription.pull(1.0) == []


def test_receive_waits_no_longer_than_asked(subscription: Subscription, opened: Open) -> None:
    """Idle: an empty batch, in time."""
    queue = opened(subscription.url)
    queue.receive(1, 0)
    began = time.monotonic()
    assert queue.receive(10, 0.3) == []
    assert 0.25 < time.monotonic() - began < 3


def test_nacked_messages_come_again_no_sooner_than_asked(subscription: Subscription, opened: Open) -> None:
    """At once, or after the delay; with the attempt counted up; and they are known to be under way."""
    subscription.publish(b"now", b"later")
    queue = opened(subscription.url)
    first = {delivery.body: delivery for delivery in receive(queue, 2)}
    assert queue.backlog() is None
    nacked = time.monotonic()
    queue.nack([first[b"later"]], 3.0, FAILURE)
    queue.nack([first[b"now"]])
    assert queue.backlog() == 2
    again: dict[bytes, tuple[float, int | None]] = {}
    while len(again) < 2:
        for delivery in receive(queue, 1):
            again[delivery.body] = (time.monotonic() - nacked, delivery.attempt)
    assert again[b"now"][0] < 2
    assert again[b"later"][0] > 2.9
    assert {attempt for _, attempt in again.values()} == {2}
    assert queue.backlog() is None


def test_the_policy_gives_up_on_poison_while_its_neighbours_pass(
    subscription: Subscription, opened: Open, caplog: pytest.LogCaptureFixture
) -> None:
    """`dead_letter` says when the message really is one; nothing waits for it any more."""
    subscription.publish(b"poison", b"good")
    queue = opened(subscription.url)
    queue.check()
    endings: list[tuple[int | None, bool]] = []
    while not (endings and endings[-1][1]):
        for delivery in receive(queue, 1):
            if delivery.body == b"good":
                queue.ack([delivery])
            else:
                endings.append((delivery.attempt, queue.dead_letter(delivery, FAILURE)))
    assert endings == [(1, False), (2, False), (3, False), (4, False), (5, True)]
    assert bodies(subscription.dead_letters(1)) == [b"poison"]
    assert queue.backlog() is None
    assert "queue_gave_up" in [record.message for record in caplog.records]


def test_direct_dead_letters_carry_their_reason(subscription: Subscription, opened: Open) -> None:
    """Buried at the first attempt, its own attributes kept, whatever their names; values cut to Pub/Sub's limit."""
    subscription.publish(b"poison", topic="mine", retry="é" * 512)
    queue = opened(subscription.url, direct_dead_letter=True)
    queue.check()
    (delivery,) = receive(queue, 1)
    assert queue.dead_letter(delivery, FAILURE)
    (letter,) = subscription.dead_letters(1)
    assert letter.data == b"poison"
    reason = letter.attributes.pop("reason")
    assert FAILURE.reason.startswith(reason)
    assert 1000 < len(reason.encode()) <= 1024
    assert dict(letter.attributes) == {
        "topic": "mine",
        "retry": "é" * 512,
        "stage": "send",
        "error": "Rejected",
        "subscription": subscription.path,
        "message_id": delivery.id,
        "attempt": "1",
    }
    queue.close()
    assert subscription.pull(1.0) == []


def test_a_dead_letter_that_cannot_be_published_is_not_lost(subscription: Subscription, opened: Open) -> None:
    """Without the topic the message comes again."""
    subscription.publish(b"poison")
    queue = opened(subscription.url, direct_dead_letter=True)
    queue.check()
    (delivery,) = receive(queue, 1)
    subscription.publisher.delete_topic(topic=f"projects/demo/topics/{subscription.name}-dead")
    assert not queue.dead_letter(delivery, FAILURE)
    (again,) = receive(queue, 1)
    assert (again.body, again.attempt) == (b"poison", 2)
    queue.ack([again])


def test_poison_without_a_policy_comes_seldom(
    emulator: Emulator, opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody counts attempts, so nothing may spin."""
    monkeypatch.setenv("PUBSUB_EMULATOR_HOST", emulator.host)
    subscription = Subscription(emulator, bare=True)
    subscription.publish(b"poison")
    queue = opened(subscription.url)
    (delivery,) = receive(queue, 1)
    assert delivery.attempt is None
    assert not queue.dead_letter(delivery, FAILURE)
    assert receive(queue, 1, wait=2) == []


def test_check_names_what_the_subscription_lacks(
    emulator: Emulator, opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One sentence each, with the command that mends it."""
    monkeypatch.setenv("PUBSUB_EMULATOR_HOST", emulator.host)
    bare = Subscription(emulator, bare=True)
    update = {"name": bare.path, "ack_deadline_seconds": 10}
    bare.subscriber.update_subscription(
        request={"subscription": update, "update_mask": {"paths": ["ack_deadline_seconds"]}}
    )
    dead, retry, deadline = opened(bare.url).check()
    assert "no dead-letter policy" in dead
    assert "no retry policy" in retry
    assert "10 s" in deadline
    assert all("gcloud pubsub subscriptions update" in warning for warning in (dead, retry, deadline))
    with pytest.raises(QueueError, match=r"KLAVIYO_WORKER_DEAD_LETTER=direct: .* has no dead-letter topic"):
        opened(bare.url, direct_dead_letter=True).check()
    pushed = Subscription(emulator, push="http://127.0.0.1:1/")
    with pytest.raises(QueueError, match="is a push subscription: use push://HOST:PORT"):
        opened(pushed.url).check()
    with pytest.raises(QueueError, match="projects/demo/subscriptions/nowhere does not exist"):
        opened("pubsub://demo/nowhere").check()


@pytest.mark.parametrize(
    "url", ["pubsub://", "pubsub://demo", "pubsub://demo/", "pubsub://demo/a/b", "pubsub://demo/sub?lease=3"]
)
def test_a_malformed_url_says_what_was_expected(url: str) -> None:
    """Exit code 2, not a call that fails later."""
    with pytest.raises(QueueURLError, match="pubsub://PROJECT/SUBSCRIPTION"):
        open_queue(url)


def test_without_credentials_the_error_says_what_to_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """No traceback from the depths of google-auth."""
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "none.json"))
    with pytest.raises(QueueError, match="set GOOGLE_APPLICATION_CREDENTIALS"):
        open_queue("pubsub://demo/klaviyo-worker")


def test_stopping_returns_what_was_not_received_and_settles_the_rest(subscription: Subscription, opened: Open) -> None:
    """At once, not when the leases end; acks after the stop count."""
    subscription.publish(*(b"%d" % number for number in range(100)))
    queue = opened(subscription.url, max_messages=50)
    held = receive(queue, 10)
    time.sleep(1)  # more are on their way
    queue.stop()
    queue.ack(held)
    queue.close()
    time.sleep(1)  # nobody pulls: nothing may go to a stream that is no more
    back = subscription.pull(5.0, at_most=90)
    assert len(held) == 10
    assert sorted(entry.message.data for entry in back) == sorted(
        {b"%d" % number for number in range(100)} - {delivery.body for delivery in held}
    )


def test_a_stream_takes_its_connection_with_it(subscription: Subscription, opened: Open) -> None:
    """Whatever ends it: a worker of many months must not collect connections, nor dead streams messages."""
    queue = opened(subscription.url)
    queue.receive(1, 0.5)
    client = queue._stream._client
    assert client is not None
    queue.stop()
    with pytest.raises(ValueError, match="closed channel"):
        client.get_subscription(subscription=subscription.path)


def test_leases_outlive_the_stream(subscription: Subscription, opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client extends nothing once its stream has ended; held and waiting messages stay ours all the same."""
    monkeypatch.setattr(pubsub, "LEASE", 10)
    queue = opened(subscription.url)
    subscription.publish(b"held")
    held = receive(queue, 1)
    subscription.publish(b"waiting")
    deadline = time.monotonic() + 10
    while not queue._stream.waiting() and time.monotonic() < deadline:
        time.sleep(0.05)
    queue._stream._close()
    for _ in range(4):
        queue.extend(held, 10)
        assert subscription.pull(3.0) == []
    queue.ack([*held, *receive(queue, 1)])
    queue.close()
    assert subscription.pull(1.0) == []


def test_a_stream_that_hangs_is_opened_anew(
    subscription: Subscription, opened: Open, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A defect in the client's consumer thread leaves a stream that runs for ever and brings nothing."""
    from google.cloud.pubsub_v1.subscriber._protocol.streaming_pull_manager import StreamingPullManager

    original = StreamingPullManager._on_response
    seen: list[object] = []

    def broken_once(self: Any, response: Any) -> None:
        seen.append(response)
        if len(seen) == 1:
            raise RuntimeError("zombie")
        original(self, response)

    monkeypatch.setattr(StreamingPullManager, "_on_response", broken_once)
    queue = opened(subscription.url)
    queue.receive(1, 0)
    subscription.publish(b"lost on a dead stream")
    deadline = time.monotonic() + 10
    while not seen and time.monotonic() < deadline:
        time.sleep(0.05)
    with monkeypatch.context() as impatient, caplog.at_level("INFO"):
        impatient.setattr(streaming_pull, "SILENCE", 0.5)
        assert receive(queue, 1, wait=1) == []
    assert "stream_renewed" in [record.message for record in caplog.records]
    deadline = time.monotonic() + 20
    while not (got := receive(queue, 1, wait=1)) and time.monotonic() < deadline:
        subscription.publish(b"news")  # the emulator gives some to streams that were closed a moment ago
    assert got[0].body == b"news"


def test_a_subscription_that_is_gone_for_a_while_is_waited_for(
    subscription: Subscription, opened: Open, caplog: pytest.LogCaptureFixture
) -> None:
    """Somebody makes it anew: the worker goes on by itself."""
    queue = opened(subscription.url)
    queue.receive(1, 0.5)
    subscription.subscriber.delete_subscription(subscription=subscription.path)
    assert receive(queue, 1, wait=3) == []
    topic = f"projects/demo/topics/{subscription.name}"
    subscription.subscriber.create_subscription(name=subscription.path, topic=topic)
    subscription.publish(b"back")
    assert [delivery.body for delivery in receive(queue, 1, wait=30)] == [b"back"]
    assert "stream_ended" in [record.message for record in caplog.records]


def test_a_subscription_that_stays_away_ends_the_run(
    subscription: Subscription, opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit code 3, and the supervisor tries again."""
    monkeypatch.setattr(streaming_pull, "REFUSED_FOR", 1.0)
    queue = opened("pubsub://demo/nowhere")
    with pytest.raises(QueueError, match="Pub/Sub refuses the subscription: 404"):
        receive(queue, 1, wait=30)


def test_publish_fills_the_topic(subscription: Subscription, opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    """In calls that Pub/Sub takes; what it does not take is an error that says how far it came."""
    monkeypatch.setattr(pubsub, "MAX_BATCH", 100)
    queue = opened(subscription.url)
    assert queue.publish(b"%d" % number for number in range(250)) == 250
    assert queue.publish([b"x" * 4_000_000] * 3) == 3
    assert len(subscription.pull(5.0)) == 253
    with pytest.raises(QueueError, match="100 messages were published, then: line 102 is empty"):
        queue.publish([*[b"fine"] * 101, b""])

    def until_the_topic_is_gone() -> Iterator[bytes]:
        yield from [b"fine"] * 101  # the first call is made when the second one's first message comes
        subscription.publisher.delete_topic(topic=f"projects/demo/topics/{subscription.name}")

    with pytest.raises(QueueError, match="100 messages were published, then: 404"):
        queue.publish(until_the_topic_is_gone())


def test_the_service_is_pinged_and_reconnected_to_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client's own options stay: a frozen link is noticed by its pings."""
    seen: dict[str, Any] = {}
    monkeypatch.setattr(SubscriberGrpcTransport, "create_channel", lambda host, **given: seen.update(given))
    kind = pubsub._transport(SubscriberGrpcTransport)
    kind.keywords["channel"]("pubsub.googleapis.com", options=[("grpc.keepalive_time_ms", 30000)], credentials=None)
    assert seen["options"] == [("grpc.keepalive_time_ms", 30000), ("grpc.max_reconnect_backoff_ms", 10_000)]


class Service(grpc.GenericRpcHandler):
    """A Subscriber service that answers acknowledgements as it is told."""

    def __init__(self, *answers: dict[str, str] | grpc.StatusCode | None) -> None:
        self.answers = list(answers)
        self.acknowledged: list[list[str]] = []
        self.status = 9  # FAILED_PRECONDITION

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[Any, Any] | None:
        if details.method != "/google.pubsub.v1.Subscriber/Acknowledge":
            return None
        return grpc.unary_unary_rpc_method_handler(self._acknowledge, AcknowledgeRequest.deserialize)

    def _acknowledge(self, request: Any, context: grpc.ServicerContext) -> bytes:
        self.acknowledged.append(list(request.ack_ids))
        answer = self.answers.pop(0)
        if isinstance(answer, grpc.StatusCode):
            context.abort(answer, "as told")
        if answer is not None:
            detail = any_pb2.Any()
            detail.Pack(error_details_pb2.ErrorInfo(reason="EXACTLY_ONCE_ACKID_FAILURE", metadata=answer))
            status = status_pb2.Status(code=self.status, message="some failed", details=[detail])
            context.abort_with_status(rpc_status.to_status(status))
        return empty_pb2.Empty().SerializeToString()


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Service]]:
    server = grpc.server(ThreadPoolExecutor(2))

    def start(*answers: Any) -> Service:
        service = Service(*answers)
        server.add_generic_rpc_handlers((service,))
        monkeypatch.setenv("PUBSUB_EMULATOR_HOST", f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}")
        server.start()
        return service

    yield start
    server.stop(None).wait()


class Permissions(grpc.GenericRpcHandler):
    """A Subscriber service that lets a worker consume, or read the subscription, or neither."""

    def __init__(self, *, consume: bool = True, read: bool = True) -> None:
        self._consume, self._read = consume, read

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[Any, Any] | None:
        method = details.method.rpartition("/")[2]
        answers = {"GetSubscription": self._get, "TestIamPermissions": self._test}
        return grpc.unary_unary_rpc_method_handler(answers[method]) if method in answers else None

    def _get(self, _: bytes, context: grpc.ServicerContext) -> bytes:
        if not self._read:
            context.abort(grpc.StatusCode.PERMISSION_DENIED, "as told")
        subscription = pubsub_types.Subscription(name="s", ack_deadline_seconds=60)
        return bytes(pubsub_types.Subscription.serialize(subscription))

    def _test(self, _: bytes, context: grpc.ServicerContext) -> bytes:
        allowed = ["pubsub.subscriptions.consume"] if self._consume else []
        return bytes(iam_policy_pb2.TestIamPermissionsResponse(permissions=allowed).SerializeToString())


@pytest.fixture
def allow(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    server = grpc.server(ThreadPoolExecutor(2))

    def start(**allowed: bool) -> None:
        server.add_generic_rpc_handlers((Permissions(**allowed),))
        monkeypatch.setenv("PUBSUB_EMULATOR_HOST", f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}")
        server.start()

    yield start
    server.stop(None).wait()


def test_who_may_not_consume_is_told_what_to_grant(allow: Callable[..., None], opened: Open) -> None:
    """At the start, not when the first stream is refused."""
    allow(consume=False)
    with pytest.raises(QueueError, match=r"not permitted to consume .*/klaviyo-worker: grant roles/pubsub.subscriber"):
        opened("pubsub://demo/klaviyo-worker").check()


def test_who_may_not_read_the_subscription_is_warned_and_works(allow: Callable[..., None], opened: Open) -> None:
    """The policies are unknown, which only direct dead letters cannot do without."""
    allow(read=False)
    queue = opened("pubsub://demo/klaviyo-worker")
    (warning,) = queue.check()
    assert "grant roles/pubsub.viewer" in warning
    with pytest.raises(QueueError, match=r"KLAVIYO_WORKER_DEAD_LETTER=direct: .* grant roles/pubsub.viewer"):
        opened("pubsub://demo/klaviyo-worker", direct_dead_letter=True).check()
    with pytest.raises(QueueError, match=r"grant roles/pubsub.viewer"):
        queue.publish([b"x"])


def test_a_service_out_of_reach_is_a_queue_error(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exit code 3, with what was asked for."""
    monkeypatch.setenv("PUBSUB_EMULATOR_HOST", "127.0.0.1:1")
    monkeypatch.setattr(pubsub, "_RETRY", None)
    with pytest.raises(QueueError, match="cannot reach Pub/Sub for projects/demo/subscriptions/klaviyo-worker"):
        opened("pubsub://demo/klaviyo-worker").check()


def test_a_lease_that_cannot_be_extended_does_not_end_the_stream(
    opened: Open, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The client would: its own extension, failing for a minute, ends all it does."""
    monkeypatch.setenv("PUBSUB_EMULATOR_HOST", "127.0.0.1:1")
    client = pubsub._stream_client()
    soon = Retry(predicate=if_exception_type(ServiceUnavailable), timeout=0.1)
    request = {"subscription": "s", "ack_ids": ["a"], "ack_deadline_seconds": 60}
    client.modify_ack_deadline(request=request, retry=soon)
    client.close()
    assert [record.message for record in caplog.records] == ["lease_lost"]


class Message:
    """What the client hands over, as far as settling needs it."""

    def __init__(self, ack_id: str) -> None:
        self.ack_id = ack_id
        self.dropped = False

    def drop(self) -> None:
        self.dropped = True


def deliveries(*ack_ids: str) -> list[Any]:
    return [pubsub.PubSubDelivery("1", b"", {}, 1, None, Message(name)) for name in ack_ids]  # type: ignore[arg-type]


def ack(queue: PubSubQueue, given: Sequence[Any]) -> None:
    queue.ack(given)
    assert all(delivery.message.dropped for delivery in given)


def test_acks_insist_while_the_service_is_out_of_reach(serve: Callable[..., Service], opened: Open) -> None:
    """A message whose ack is lost comes twice."""
    service = serve(grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.INTERNAL, None)
    ack(opened("pubsub://demo/klaviyo-worker"), deliveries("a", "b"))
    assert service.acknowledged == [["a", "b"]] * 3


def test_exactly_once_acks_are_told_again_one_by_one(
    serve: Callable[..., Service], opened: Open, caplog: pytest.LogCaptureFixture
) -> None:
    """Those the service calls transient are repeated; those whose lease had ended come again and are counted."""
    verdicts = {"a": "TRANSIENT_FAILURE_OTHER", "b": "PERMANENT_FAILURE_INVALID_ACK_ID"}
    service = serve(verdicts, None)
    ack(opened("pubsub://demo/klaviyo-worker"), deliveries("a", "b", "c"))
    assert service.acknowledged == [["a", "b", "c"], ["a"]]
    (record,) = [record for record in caplog.records if record.message == "lease_lost"]
    assert vars(record)["messages"] == 1


def test_an_error_about_something_else_is_no_verdict(serve: Callable[..., Service], opened: Open) -> None:
    """A quota's or a permission's error has metadata too; taken for a success, the ack would be lost in silence."""
    service = serve({"service": "pubsub.googleapis.com", "consumer": "projects/1"}, None)
    queue = opened("pubsub://demo/klaviyo-worker")
    service.status = 8  # RESOURCE_EXHAUSTED
    ack(queue, deliveries("a"))
    assert service.acknowledged == [["a"], ["a"]]


def test_an_ack_that_is_refused_is_told_and_no_error(
    serve: Callable[..., Service], opened: Open, caplog: pytest.LogCaptureFixture
) -> None:
    """The messages come again; nothing else stops."""
    service = serve(grpc.StatusCode.PERMISSION_DENIED)
    ack(opened("pubsub://demo/klaviyo-worker"), deliveries("a"))
    assert len(service.acknowledged) == 1
    assert [record.message for record in caplog.records] == ["lease_lost"]


def test_an_outage_longer_than_the_lease_ends_the_insisting(
    serve: Callable[..., Service], opened: Open, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By then the message has been given to somebody else."""
    monkeypatch.setattr(settlement, "ACK_PATIENCE", 0.5)
    service = serve(*[grpc.StatusCode.UNAVAILABLE] * 50)
    ack(opened("pubsub://demo/klaviyo-worker"), deliveries("a"))
    assert len(service.acknowledged) > 1
    assert [record.message for record in caplog.records] == ["lease_lost"]


def test_many_acks_go_in_calls_of_bounded_size(
    serve: Callable[..., Service], opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call takes 512 KiB of ids."""
    monkeypatch.setattr(settlement, "MAX_IDS", 2)
    service = serve(None, None, None)
    ack(opened("pubsub://demo/klaviyo-worker"), deliveries("a", "b", "c", "d", "e"))
    assert service.acknowledged == [["a", "b"], ["c", "d"], ["e"]]
