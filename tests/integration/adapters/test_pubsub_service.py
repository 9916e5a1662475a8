"""The Pub/Sub adapter with a fake service: flow control, permissions, and failing calls, which the emulator lacks."""

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
from adapters.base import Interruption
from adapters.pubsub import queue as pubsub
from adapters.pubsub import settlement, streaming_pull
from adapters.pubsub.transport import open_transport
from tests.integration.conftest import FAILURE
from tests.support.pubsub_fake import AckResults, FakeSubscriber
from tests.support.waiting import receive

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from adapters.pubsub.queue import PubSubDelivery, PubSubQueue
    from tests.integration.conftest import Open

    Serve = Callable[..., FakeSubscriber]

URL = "pubsub://demo/klaviyo-worker"
UNAVAILABLE = grpc.StatusCode.UNAVAILABLE


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Serve]:
    """Start a service with these messages; their ack ids are their bodies."""
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


def receive_all_allowed(queue: PubSubQueue) -> list[PubSubDelivery]:
    """Receive ten messages, the maximum that can be outstanding."""
    held = receive(queue, 10)
    assert (len(held), receive(queue, 1, wait=0.5)) == (10, [])
    return held


def test_outstanding_messages_are_limited_and_acks_make_room(serve: Serve, opened: Open) -> None:
    """The server respects the limits of the stream's request."""
    service = serve(*numbered(25))
    queue = opened(URL, max_messages=10, max_bytes=5000)
    queue.ack(receive_all_allowed(queue))
    queue.ack(receive_all_allowed(queue))
    assert len(receive(queue, 5)) == 5
    (request,) = service.requests["StreamingPull"]
    assert (request.max_outstanding_messages, request.max_outstanding_bytes) == (10, 5000)


def test_nacked_messages_make_room_if_a_retry_policy_delays_them(serve: Serve, opened: Open) -> None:
    """After an outage, hundreds of delayed messages must not keep new ones out."""
    serve(*numbered(15)).set_retry_policy()
    queue = opened(URL, max_messages=10)
    queue.check()
    queue.nack(receive_all_allowed(queue), 600.0, FAILURE)
    assert len(receive(queue, 5)) == 5


@pytest.mark.parametrize("interruption", [None, Interruption("stopped", "send", "JobUnfinished")])
def test_returned_messages_keep_their_delay_despite_a_retry_policy(
    interruption: Interruption | None, serve: Serve, opened: Open
) -> None:
    """A bulk job of the stopped worker can still write, so no other worker must receive them earlier."""
    service = serve(*numbered(1))
    service.set_retry_policy()
    queue = opened(URL)
    queue.check()
    returned = receive(queue, 1)
    queue.stop()
    queue.nack(returned, 300.0, interruption)
    assert service.requests["ModifyAckDeadline"][-1].ack_deadline_seconds == 300


def test_lease_is_the_delay_without_a_retry_policy(serve: Serve, opened: Open) -> None:
    """Otherwise the message would be redelivered immediately."""
    service = serve(*numbered(1))
    queue = opened(URL)
    queue.check()
    got = receive(queue, 1)
    queue.nack(got, 2.2, FAILURE)
    queue.nack(got, 10_000.0, FAILURE)
    deadlines = [request.ack_deadline_seconds for request in service.requests["ModifyAckDeadline"]]
    assert deadlines[-2:] == [3, 600]


@pytest.mark.parametrize("end", [None, UNAVAILABLE, grpc.StatusCode.CANCELLED])
def test_closed_stream_is_not_reopened(end: grpc.StatusCode | None, serve: Serve, opened: Open) -> None:
    """The client resumes streams after a transient error. Messages of that stream would stay leased."""
    service = serve(*numbered(3))
    service.end_of_stream = end
    queue = opened(URL)
    receive(queue, 3)
    queue.stop()
    time.sleep(0.5)
    assert len(service.requests["StreamingPull"]) == 1


def test_stop_is_not_delayed_by_unreachable_service(serve: Serve, opened: Open) -> None:
    """The client sleeps up to ten seconds before it reconnects. Its connection cannot be closed during that time."""
    service = serve()
    queue = opened(URL)
    queue.receive(1, 0.5)
    service.stop()
    deadline = time.monotonic() + 3
    while time.monotonic() < deadline:
        queue.receive(1, 0.3)
    started_at = time.monotonic()
    queue.stop()
    assert (
        time.monotonic() - started_at < streaming_pull.SERVER_CLOSE_TIMEOUT + streaming_pull.CLIENT_CLOSE_TIMEOUT + 0.5
    )


def test_failed_stream_leaves_no_thread(serve: Serve) -> None:
    """Otherwise each reconnect in a long outage would leave a thread."""
    serve()
    client = pubsub._open_stream_client()
    client.close()
    with pytest.raises(ValueError, match="Channel closed"):
        client.streaming_pull(iter([]))
    assert [thread.name for thread in threading.enumerate() if "_forward" in thread.name] == []


def test_check_reports_missing_permission_to_consume(serve: Serve, opened: Open) -> None:
    """The error is reported at startup, not when the first stream is refused."""
    serve().permissions.clear()
    with pytest.raises(QueueError, match=r"not permitted to consume .*/klaviyo-worker: grant roles/pubsub.subscriber"):
        opened(URL).check()


def test_refused_credentials_are_reported(serve: Serve, opened: Open) -> None:
    """With a wrong clock, Google refuses the tokens that the worker signs."""
    serve().answers["GetSubscription"].append(grpc.StatusCode.UNAUTHENTICATED)
    with pytest.raises(QueueError) as error:
        opened(URL).check()
    assert str(error.value) == (
        "QUEUE_URL: Google refuses the credentials for projects/demo/subscriptions/klaviyo-worker: check "
        "GOOGLE_APPLICATION_CREDENTIALS, and the clock of this machine"
    )


def test_destination_of_an_unreadable_subscription_is_unknown(serve: Serve, opened: Open) -> None:
    """The worker needs no permission to read it."""
    serve().answers["GetSubscription"].append(grpc.StatusCode.PERMISSION_DENIED)
    queue = opened(URL)
    queue.check()
    assert queue.destination() == ""


def test_missing_permission_to_read_the_subscription_is_a_warning(serve: Serve, opened: Open) -> None:
    """The policies are unknown. Only direct mode requires them."""
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
def test_malformed_url_error_has_the_expected_form(url: str) -> None:
    """The exit code is 2; no call is made."""
    with pytest.raises(QueueURLError, match="pubsub://PROJECT/SUBSCRIPTION"):
        open_queue(url)


def test_missing_credentials_are_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """The error is one line, without a traceback of google-auth."""
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "none.json"))
    with pytest.raises(QueueError, match="set GOOGLE_APPLICATION_CREDENTIALS"):
        open_queue("pubsub://demo/klaviyo-worker")


def test_channel_keeps_pings_and_reconnects_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client's own options are kept: its pings detect a frozen connection."""
    options: dict[str, Any] = {}
    monkeypatch.setattr(SubscriberGrpcTransport, "create_channel", lambda host, **given: options.update(given))
    kind = open_transport(SubscriberGrpcTransport)
    kind.keywords["channel"]("pubsub.googleapis.com", options=[("grpc.keepalive_time_ms", 30000)], credentials=None)
    assert options["options"] == [("grpc.keepalive_time_ms", 30000), ("grpc.max_reconnect_backoff_ms", 10_000)]


def test_unreachable_service_is_a_queue_error(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    """The exit code is 3; the error names the subscription."""
    monkeypatch.setenv("PUBSUB_EMULATOR_HOST", "127.0.0.1:1")
    monkeypatch.setattr(pubsub, "_RETRY", None)
    with pytest.raises(QueueError, match="cannot reach Pub/Sub for projects/demo/subscriptions/klaviyo-worker"):
        opened(URL).check()


def test_failed_extension_of_the_client_does_not_end_the_stream(
    opened: Open, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """In the client, an extension that fails for a minute, or on a closed connection, would end the stream."""
    monkeypatch.setenv("PUBSUB_EMULATOR_HOST", "127.0.0.1:1")
    client = pubsub._open_stream_client()
    short = Retry(predicate=if_exception_type(ServiceUnavailable), timeout=0.1)
    request = {"subscription": "s", "ack_ids": ["a"], "ack_deadline_seconds": 60}
    client.modify_ack_deadline(request=request, retry=short)
    client.close()
    client.modify_ack_deadline(request=request, retry=short)
    assert [record.message for record in caplog.records] == ["lease_lost"] * 2


def test_extension_is_not_retried(serve: Serve, opened: Open, caplog: pytest.LogCaptureFixture) -> None:
    """A retry could take effect after a nack. The message would then be redelivered a minute late.

    The caller gets an error, because the leases can end.
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


def test_ack_is_retried_while_service_is_unreachable(serve: Serve, opened: Open) -> None:
    """A message whose ack is lost is processed twice."""
    service = serve(b"a")
    service.answers["Acknowledge"].extend([UNAVAILABLE, grpc.StatusCode.INTERNAL])
    queue = opened(URL)
    queue.ack(receive(queue, 1))
    assert acknowledged(service) == [["a"]] * 3


@pytest.mark.parametrize(
    ("code", "retried"), [(grpc.StatusCode.FAILED_PRECONDITION, ["a"]), (UNAVAILABLE, ["a", "c"])], ids=str
)
def test_only_transient_failures_of_exactly_once_acks_are_retried(
    code: grpc.StatusCode, retried: list[str], serve: Serve, opened: Open, caplog: pytest.LogCaptureFixture
) -> None:
    """Ids without a result are retried if the error is transient. Lost leases are counted."""
    service = serve(b"a", b"b", b"c")
    results = AckResults(code, a="TRANSIENT_FAILURE_OTHER", b="PERMANENT_FAILURE_INVALID_ACK_ID")
    service.answers["Acknowledge"].append(results)
    queue = opened(URL)
    queue.ack(receive(queue, 3))
    assert acknowledged(service) == [["a", "b", "c"], retried]
    (record,) = caplog.records
    assert (record.message, vars(record)["messages"]) == ("lease_lost", 1)


def test_error_metadata_about_other_things_is_ignored(serve: Serve, opened: Open) -> None:
    """Errors of quotas and permissions have metadata too. Treating them as a success would lose the ack."""
    service = serve(b"a")
    quota = AckResults(grpc.StatusCode.RESOURCE_EXHAUSTED, service="pubsub.googleapis.com", consumer="projects/1")
    service.answers["Acknowledge"].append(quota)
    queue = opened(URL)
    queue.ack(receive(queue, 1))
    assert acknowledged(service) == [["a"], ["a"]]


def test_failed_ack_is_logged(serve: Serve, opened: Open, caplog: pytest.LogCaptureFixture) -> None:
    """Pub/Sub redelivers the message; nothing else fails."""
    service = serve(b"a")
    service.answers["Acknowledge"].append(grpc.StatusCode.PERMISSION_DENIED)
    queue = opened(URL)
    queue.ack(receive(queue, 1))
    assert len(acknowledged(service)) == 1
    assert [record.message for record in caplog.records] == ["settlement_failed"]


def test_retries_of_ack_end_with_the_lease(
    serve: Serve, opened: Open, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At that time, Pub/Sub has redelivered the message."""
    monkeypatch.setattr(settlement, "ACK_TIMEOUT", 0.5)
    service = serve(b"a")
    service.answers["Acknowledge"].extend([UNAVAILABLE] * 50)
    queue = opened(URL)
    queue.ack(receive(queue, 1))
    assert len(acknowledged(service)) > 1
    assert [record.message for record in caplog.records] == ["settlement_failed"]


def test_acks_are_split_into_calls(serve: Serve, opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call accepts 512 KiB of ids."""
    monkeypatch.setattr(settlement, "MAX_IDS", 2)
    service = serve(*numbered(5))
    queue = opened(URL)
    queue.ack(receive(queue, 5))
    assert acknowledged(service) == [["0", "1"], ["2", "3"], ["4"]]
