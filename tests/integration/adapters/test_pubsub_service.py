"""The Pub/Sub adapter against a stand-in for what Google's emulator lacks: flow control, permissions, failing calls."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from google.api_core.exceptions import ServiceUnavailable
from google.api_core.retry import Retry, if_exception_type
from google.pubsub_v1.services.subscriber.transports import SubscriberGrpcTransport

from adapters import QueueError, QueueURLError, open_queue
from adapters.pubsub import queue as pubsub
from adapters.pubsub import settlement, streaming_pull
from tests.integration.conftest import FAILURE, receive
from tests.support.pubsub_fake import AckResults, FakeSubscriber

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from adapters.pubsub.queue import PubSubDelivery, PubSubQueue
    from tests.integration.conftest import Open

    Serve = Callable[..., FakeSubscriber]

URL = "pubsub://demo/klaviyo-worker"
UNAVAILABLE = grpc.StatusCode.UNAVAILABLE


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Serve]:
    """Start a service that holds these messages; their ack ids are their bodies."""
    services: list[FakeSubscriber] = []

    def start(*bodies: bytes) -> FakeSubscriber:
        services.append(FakeSubscriber(*bodies))
        monkeypatch.setenv("PUBSUB_EMULATOR_HOST", services[-1].host)
        return services[-1]

    yield start
    for service in services:
        service.stop()


def acknowledged(service: FakeSubscriber) -> list[list[str]]:
    return [list(request.ack_ids) for request in service.requests["Acknowledge"]]


def numbered(number: int) -> list[bytes]:
    return [b"%d" % index for index in range(number)]


def full(queue: PubSubQueue) -> list[PubSubDelivery]:
    """Receive ten messages, which is all that may be held."""
    held = receive(queue, 10)
    assert (len(held), receive(queue, 1, wait=0.5)) == (10, [])
    return held


def test_no_more_is_sent_than_may_be_held_and_acks_make_room(serve: Serve, opened: Open) -> None:
    """The server keeps to what the stream asked for."""
    service = serve(*numbered(25))
    queue = opened(URL, max_messages=10, max_bytes=5000)
    queue.ack(full(queue))
    queue.ack(full(queue))
    assert len(receive(queue, 5)) == 5
    (asked,) = service.requests["StreamingPull"]
    assert (asked.max_outstanding_messages, asked.max_outstanding_bytes) == (10, 5000)


def test_messages_sent_back_make_room_where_a_retry_policy_delays_them(serve: Serve, opened: Open) -> None:
    """After an outage, hundreds that wait for their next try must not keep the new ones out."""
    serve(*numbered(15)).set_retry_policy()
    queue = opened(URL, max_messages=10)
    queue.check()
    queue.nack(full(queue), 600.0, FAILURE)
    assert len(receive(queue, 5)) == 5


def test_without_a_retry_policy_the_lease_is_the_delay(serve: Serve, opened: Open) -> None:
    """Else the message would come again at once, and again."""
    service = serve(*numbered(1))
    queue = opened(URL)
    queue.check()
    got = receive(queue, 1)
    queue.nack(got, 2.2, FAILURE)
    queue.nack(got, 10_000.0, FAILURE)
    told = [request.ack_deadline_seconds for request in service.requests["ModifyAckDeadline"]]
    assert told[-2:] == [3, 600]


@pytest.mark.parametrize("end", [None, UNAVAILABLE, grpc.StatusCode.CANCELLED])
def test_a_stream_that_was_finished_is_not_opened_again(
    end: grpc.StatusCode | None, serve: Serve, opened: Open
) -> None:
    """The client resumes streams that end with a passing error; what that one brought would be out of reach."""
    service = serve(*numbered(3))
    service.end_of_stream = end
    queue = opened(URL)
    receive(queue, 3)
    queue.stop()
    time.sleep(0.5)
    assert len(service.requests["StreamingPull"]) == 1


def test_stopping_takes_no_longer_while_the_service_is_out_of_reach(serve: Serve, opened: Open) -> None:
    """The client sleeps up to ten seconds between its tries, and its connection cannot be closed meanwhile."""
    service = serve()
    queue = opened(URL)
    queue.receive(1, 0.5)
    service.stop()
    deadline = time.monotonic() + 3
    while time.monotonic() < deadline:
        queue.receive(1, 0.3)
    began = time.monotonic()
    queue.stop()
    assert time.monotonic() - began < streaming_pull.SERVER_CLOSE_TIMEOUT + streaming_pull.CLIENT_CLOSE_TIMEOUT + 0.5


def test_a_stream_that_cannot_be_opened_leaves_no_thread(serve: Serve) -> None:
    """Outages last, and each try would leave one."""
    serve()
    client = pubsub._stream_client()
    client.close()
    with pytest.raises(ValueError, match="Channel closed"):
        client.streaming_pull(iter([]))
    assert [thread.name for thread in threading.enumerate() if "_pump" in thread.name] == []


def test_who_may_not_consume_is_told_what_to_grant(serve: Serve, opened: Open) -> None:
    """At the start, not when the first stream is refused."""
    serve().permissions.clear()
    with pytest.raises(QueueError, match=r"not permitted to consume .*/klaviyo-worker: grant roles/pubsub.subscriber"):
        opened(URL).check()


def test_who_may_not_read_the_subscription_is_warned_and_works(serve: Serve, opened: Open) -> None:
    """The policies are unknown, which only direct dead letters cannot do without."""
    serve().answers["GetSubscription"].extend([grpc.StatusCode.PERMISSION_DENIED] * 3)
    queue = opened(URL)
    (warning,) = queue.check()
    assert "grant roles/pubsub.viewer" in warning.todo
    with pytest.raises(QueueError, match=r"KLAVIYO_WORKER_DEAD_LETTER_MODE=direct: .* grant roles/pubsub.viewer"):
        opened(URL, direct_dead_letter=True).check()
    with pytest.raises(QueueError, match=r"grant roles/pubsub.viewer"):
        queue.publish([b"x"])


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


def test_the_service_is_pinged_and_reconnected_to_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client's own options stay: a frozen link is noticed by its pings."""
    seen: dict[str, Any] = {}
    monkeypatch.setattr(SubscriberGrpcTransport, "create_channel", lambda host, **given: seen.update(given))
    kind = pubsub._transport(SubscriberGrpcTransport)
    kind.keywords["channel"]("pubsub.googleapis.com", options=[("grpc.keepalive_time_ms", 30000)], credentials=None)
    assert seen["options"] == [("grpc.keepalive_time_ms", 30000), ("grpc.max_reconnect_backoff_ms", 10_000)]


def test_a_service_out_of_reach_is_a_queue_error(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exit code 3, with what was asked for."""
    monkeypatch.setenv("PUBSUB_EMULATOR_HOST", "127.0.0.1:1")
    monkeypatch.setattr(pubsub, "_RETRY", None)
    with pytest.raises(QueueError, match="cannot reach Pub/Sub for projects/demo/subscriptions/klaviyo-worker"):
        opened(URL).check()


def test_a_lease_that_the_client_cannot_extend_does_not_end_the_stream(
    opened: Open, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The client would: its own extension, failing for a minute, ends all it does. Nor does a closed connection."""
    monkeypatch.setenv("PUBSUB_EMULATOR_HOST", "127.0.0.1:1")
    client = pubsub._stream_client()
    soon = Retry(predicate=if_exception_type(ServiceUnavailable), timeout=0.1)
    request = {"subscription": "s", "ack_ids": ["a"], "ack_deadline_seconds": 60}
    client.modify_ack_deadline(request=request, retry=soon)
    client.close()
    client.modify_ack_deadline(request=request, retry=soon)
    assert [record.message for record in caplog.records] == ["lease_lost"] * 2


def test_an_extension_is_tried_once(serve: Serve, opened: Open, caplog: pytest.LogCaptureFixture) -> None:
    """One that insists could overtake a nack, and what was to come again at once would come in a minute.

    That it failed is said: whether the messages are still ours is not sure any more.
    """
    service = serve(b"a")
    queue = opened(URL)
    held = receive(queue, 1)
    service.answers["ModifyAckDeadline"].append(UNAVAILABLE)
    before = len(service.requests["ModifyAckDeadline"])
    with pytest.raises(QueueError, match="leases"):
        queue.extend(held, 61)
    mine = [r for r in service.requests["ModifyAckDeadline"][before:] if r.ack_deadline_seconds == 61]
    assert len(mine) == 1
    assert [vars(record)["action"] for record in caplog.records] == ["extend"]


def test_acks_insist_while_the_service_is_out_of_reach(serve: Serve, opened: Open) -> None:
    """A message whose ack is lost comes twice."""
    service = serve(b"a")
    service.answers["Acknowledge"].extend([UNAVAILABLE, grpc.StatusCode.INTERNAL])
    queue = opened(URL)
    queue.ack(receive(queue, 1))
    assert acknowledged(service) == [["a"]] * 3


@pytest.mark.parametrize(
    ("code", "again"), [(grpc.StatusCode.FAILED_PRECONDITION, ["a"]), (UNAVAILABLE, ["a", "c"])], ids=str
)
def test_exactly_once_acks_are_told_again_one_by_one(
    code: grpc.StatusCode, again: list[str], serve: Serve, opened: Open, caplog: pytest.LogCaptureFixture
) -> None:
    """Those the service calls transient, or does not name when all may have failed; a lease that ended is counted."""
    service = serve(b"a", b"b", b"c")
    verdicts = AckResults(code, a="TRANSIENT_FAILURE_OTHER", b="PERMANENT_FAILURE_INVALID_ACK_ID")
    service.answers["Acknowledge"].append(verdicts)
    queue = opened(URL)
    queue.ack(receive(queue, 3))
    assert acknowledged(service) == [["a", "b", "c"], again]
    (record,) = caplog.records
    assert (record.message, vars(record)["messages"]) == ("lease_lost", 1)


def test_an_error_about_something_else_is_no_verdict(serve: Serve, opened: Open) -> None:
    """A quota's or a permission's error has metadata too; taken for a success, the ack would be lost in silence."""
    service = serve(b"a")
    quota = AckResults(grpc.StatusCode.RESOURCE_EXHAUSTED, service="pubsub.googleapis.com", consumer="projects/1")
    service.answers["Acknowledge"].append(quota)
    queue = opened(URL)
    queue.ack(receive(queue, 1))
    assert acknowledged(service) == [["a"], ["a"]]


def test_an_ack_that_is_refused_is_told_and_no_error(
    serve: Serve, opened: Open, caplog: pytest.LogCaptureFixture
) -> None:
    """The messages come again; nothing else stops."""
    service = serve(b"a")
    service.answers["Acknowledge"].append(grpc.StatusCode.PERMISSION_DENIED)
    queue = opened(URL)
    queue.ack(receive(queue, 1))
    assert len(acknowledged(service)) == 1
    assert [record.message for record in caplog.records] == ["settlement_failed"]


def test_an_outage_longer_than_the_lease_ends_the_insisting(
    serve: Serve, opened: Open, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By then the message has been given to somebody else."""
    monkeypatch.setattr(settlement, "ACK_TIMEOUT", 0.5)
    service = serve(b"a")
    service.answers["Acknowledge"].extend([UNAVAILABLE] * 50)
    queue = opened(URL)
    queue.ack(receive(queue, 1))
    assert len(acknowledged(service)) > 1
    assert [record.message for record in caplog.records] == ["settlement_failed"]


def test_many_acks_go_in_calls_of_bounded_size(serve: Serve, opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call takes 512 KiB of ids."""
    monkeypatch.setattr(settlement, "MAX_IDS", 2)
    service = serve(*numbered(5))
    queue = opened(URL)
    queue.ack(receive(queue, 5))
    assert acknowledged(service) == [["0", "1"], ["2", "3"], ["4"]]
