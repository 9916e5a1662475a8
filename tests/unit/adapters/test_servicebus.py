"""Service Bus without a broker: URLs, connection strings, bodies, locks and settlement."""

from __future__ import annotations

import json
import traceback
from datetime import UTC, datetime, timedelta
from threading import Event, Semaphore, Thread
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import quote

import pytest
from azure.core.exceptions import ClientAuthenticationError
from azure.servicebus import ServiceBusReceiver
from azure.servicebus.amqp import AmqpMessageBodyType
from azure.servicebus.exceptions import MessageLockLostError, ServiceBusConnectionError, ServiceBusError
from hypothesis import given
from hypothesis import strategies as st

from adapters import QueueError, QueueOptions, QueueURLError, open_queue
from adapters.servicebus.connections import first_line, is_refusal
from adapters.servicebus.lock_duration import LockDuration
from adapters.servicebus.message import body_of, delivery_of
from adapters.servicebus.queue import Entity, check_connection_string, parse_url
from adapters.servicebus.receiver import Receiver
from adapters.servicebus.settlement import Settlement

if TYPE_CHECKING:
    from azure.servicebus import ServiceBusReceivedMessage

HOST = "shop.servicebus.windows.net"
KEY = "SharedAccessKeyName=reader;SharedAccessKey=c2VjcmV0"
QUEUE = Entity(HOST, "orders")
names = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._~/-]{0,40}", fullmatch=True)
amqp_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary() | st.uuids() | st.datetimes(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.binary() | st.integers(), inner),
    max_leaves=20,
)


@given(names, st.none() | names)
def test_url_can_hold_every_allowed_name(name: str, subscription: str | None) -> None:
    """Names are percent-encoded, because a queue's name can contain a slash."""
    path = "/".join(quote(part, safe="") for part in (name, subscription) if part is not None)
    assert parse_url(f"servicebus://{HOST}/{path}") == Entity(HOST, name, subscription or "")


def test_url_of_an_emulator_has_a_port() -> None:
    """Its connection string has one too."""
    assert parse_url("servicebus://127.0.0.1:5672/orders") == Entity("127.0.0.1:5672", "orders")
    assert parse_url("servicebus://localhost/orders") == Entity("localhost", "orders")
    assert parse_url(f"servicebus://{HOST.upper()}/Orders") == Entity(HOST, "Orders")


@pytest.mark.parametrize(
    "url",
    [
        "servicebus://",
        f"servicebus://{HOST}",
        f"servicebus://{HOST}/",
        f"servicebus://{HOST}/a/",
        f"servicebus://{HOST}//a",
        f"servicebus://{HOST}/topic/Subscriptions/a",
        f"servicebus://{HOST}/a?b=c",
        f"servicebus://{HOST}/a#b",
        f"servicebus://{HOST}/%20",
        f"servicebus://{HOST}/{'a' * 261}",
        f"servicebus://{HOST}:port/a",
        f"servicebus://key:secret@{HOST}/a",
        "servicebus://shop/a",
        "servicebus:///a",
    ],
)
def test_invalid_url_is_rejected_and_not_quoted(url: str) -> None:
    """The error says what was expected."""
    with pytest.raises(QueueURLError, match="QUEUE_URL is malformed: expected servicebus://NAMESPACE") as caught:
        open_queue(url)
    assert "secret" not in str(caught.value)


@given(st.text())
def test_any_text_is_parsed_or_rejected(text: str) -> None:
    """No text causes another error."""
    try:
        entity = parse_url(f"servicebus://{text}")
    except QueueURLError:
        return
    assert entity.host
    assert entity.name


@pytest.mark.parametrize(
    "connection_string",
    [
        f"Endpoint=sb://{HOST}/;{KEY}",
        f"Endpoint=sb://{HOST.upper()};{KEY};",
        f"Endpoint=sb://{HOST}/;{KEY};EntityPath=orders",
    ],
)
def test_matching_connection_string_is_accepted(connection_string: str) -> None:
    """It can be for the namespace, or for this queue only."""
    check_connection_string(connection_string, QUEUE)


@pytest.mark.parametrize(
    ("connection_string", "expected"),
    [
        (f"Endpoint=sb://other.servicebus.windows.net/;{KEY}", "is not for the namespace of QUEUE_URL"),
        (f"Endpoint=sb://{HOST}/;{KEY};EntityPath=customers", "is not for the queue or topic of QUEUE_URL"),
        (f"Endpoint=sb://{HOST}/", "is malformed"),
        (f"Endpoint={HOST};{KEY}", "is malformed"),
        (KEY, "is malformed"),
        ("c2VjcmV0", "is malformed"),
    ],
)
def test_other_connection_string_is_rejected_and_not_quoted(connection_string: str, expected: str) -> None:
    """It is a secret, and must not be in the traceback."""
    with pytest.raises(
        QueueURLError, match=f"SERVICEBUS_CONNECTION_STRING is .*{expected.removeprefix('is ')}"
    ) as caught:
        open_queue(f"servicebus://{HOST}/orders", QueueOptions(connection_string=connection_string))
    assert "c2VjcmV0" not in "".join(traceback.format_exception_only(caught.value))


def test_connection_without_tls_is_rejected() -> None:
    """Messages contain personal data. An emulator on this machine needs no certificate."""
    emulated = f"{KEY};usedevelopmentemulator=TRUE"
    check_connection_string(f"Endpoint=sb://127.0.0.1:5672;{emulated}", Entity("127.0.0.1:5672", "orders"))
    with pytest.raises(QueueError, match="SERVICEBUS_CONNECTION_STRING: UseDevelopmentEmulator, which turns TLS off"):
        check_connection_string(f"Endpoint=sb://{HOST};{emulated}", QUEUE)


@given(st.text())
def test_any_connection_string_is_accepted_or_rejected(text: str) -> None:
    """No other error occurs, and none quotes it."""
    try:
        check_connection_string(f"{text};{KEY}", QUEUE)
    except QueueError as error:
        assert "c2VjcmV0" not in str(error)


@given(st.lists(st.binary()))
def test_data_sections_are_joined(sections: list[bytes]) -> None:
    """The publisher's client can split a body anywhere."""
    assert body_of(AmqpMessageBodyType.DATA, iter(sections)) == b"".join(sections)


@given(amqp_values)
def test_any_value_is_converted_to_bytes(value: Any) -> None:
    """Every message must reach the pipeline. Otherwise it could not be dead-lettered."""
    body = body_of(AmqpMessageBodyType.VALUE, value)
    assert isinstance(body, bytes)
    if isinstance(value, bytes):
        assert body == value
    assert isinstance(body_of(AmqpMessageBodyType.SEQUENCE, [[value], [value]]), bytes)


def test_amqp_map_is_converted_to_json() -> None:
    """The SDK decodes its keys and texts as bytes."""
    value = {b"id": b"1", b"tags": [b"\xc3\xa9", None, True, 1.5], 3: {"a": "b"}}
    assert json.loads(body_of(AmqpMessageBodyType.VALUE, value)) == {
        "id": "1",
        "tags": ["é", None, True, 1.5],
        "3": {"a": "b"},
    }


@given(st.sampled_from(AmqpMessageBodyType), amqp_values)
def test_invalid_body_is_empty(kind: AmqpMessageBodyType, value: Any) -> None:
    """In AMQP a data section can contain a number. Such a message does not prevent others from being received."""
    assert isinstance(body_of(kind, value), bytes)
    assert isinstance(body_of(kind, [value]), bytes)
    assert body_of(AmqpMessageBodyType.DATA, [3]) == b""


def test_deeply_nested_value_is_empty() -> None:
    """The message is dead-lettered with its original body."""
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    assert body_of(AmqpMessageBodyType.VALUE, deep) == b""


def test_receiving_continues_if_closing_fails() -> None:
    """The thread survives any error of the SDK."""
    closed = Event()

    class FakeReceiver:
        def receive_messages(self, _: int, __: float) -> list[ServiceBusReceivedMessage]:
            raise ServiceBusConnectionError(message="reset")

        def close(self) -> None:
            closed.set()
            raise RuntimeError("an error of its own")

    receiver = Receiver(cast("Any", FakeReceiver), 1000)
    receiver.receive(1, 0.0)
    assert closed.wait(60)
    closed.clear()
    assert closed.wait(60)
    receiver.close()


def _locked(seconds: float, enqueued_ago: float) -> Any:
    now = datetime.now(UTC)
    return SimpleNamespace(
        locked_until_utc=now + timedelta(seconds=seconds), enqueued_time_utc=now - timedelta(seconds=enqueued_ago)
    )


@pytest.mark.parametrize(
    ("seconds", "enqueued_ago", "expected", "warnings"),
    [
        (60.0, 3600.0, 60.0, 0),
        (160.0, -100.0, 60.0, 0),  # the local clock is behind, by as much as the time of enqueueing shows
        (660.0, 3600.0, 5.0, 1),  # the local clock is behind by an unknown offset
        (-540.0, 3600.0, 5.0, 1),  # the local clock is ahead
    ],
)
def test_implausible_lock_duration_is_ignored(
    seconds: float, enqueued_ago: float, expected: float, warnings: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Locks are renewed by this duration, and end if it is overestimated. The warning is logged once."""
    duration = LockDuration()
    duration.update([])
    assert duration.seconds == 5.0
    for _ in range(2):
        duration.update([_locked(seconds - 2.0, enqueued_ago), _locked(seconds, enqueued_ago)])
    assert duration.seconds == pytest.approx(expected, abs=0.5)
    assert [record.message for record in caplog.records] == ["clock_skew"] * warnings


def test_clock_offset_is_remembered() -> None:
    """A renewed lock does not reveal the offset, nor does a message that was enqueued long ago."""
    duration = LockDuration()
    duration.update([_locked(160.0, -100.0)])
    duration.update([_locked(160.0, 3600.0)])
    assert duration.seconds == pytest.approx(60.0, abs=0.5)


def test_corrected_clock_is_trusted_again() -> None:
    """The old offset would make every lock too short."""
    duration = LockDuration()
    duration.update([_locked(160.0, -100.0)])
    duration.update([_locked(60.0, 0.0)])
    assert duration.seconds == 5.0
    duration.update([_locked(60.0, 0.0)])
    assert duration.seconds == pytest.approx(60.0, abs=0.5)


def test_receiver_stopped_while_connecting_receives_nothing() -> None:
    """Such messages would stay locked, and their deliveries would count as attempts."""
    connecting, connected, closed = Event(), Event(), Event()
    received: list[int] = []

    class FakeReceiver:
        def __init__(self) -> None:
            connecting.set()
            connected.wait(60)

        def receive_messages(self, number: int, _: float) -> list[ServiceBusReceivedMessage]:
            received.append(number)
            return []

        def close(self) -> None:
            closed.set()

    receiver = Receiver(cast("Any", FakeReceiver), 1000)
    receiver.receive(1, 0.0)
    assert connecting.wait(60)
    assert receiver.stop() == []
    connected.set()
    assert closed.wait(60)
    assert received == []


class FakeSettlingReceiver:
    """Renews a lock for each permit of the semaphore, and abandons immediately."""

    def __init__(self, renewals: Semaphore) -> None:
        self._renewals = renewals

    def renew_message_lock(self, message: Any) -> None:
        if not self._renewals.acquire(timeout=60) or message.lock_token == "unreachable":
            raise ServiceBusConnectionError(message="reset")

    def abandon_message(self, message: Any) -> None:
        message.lock_token = None

    def close(self) -> None:
        """Do nothing."""


@pytest.fixture
def renewals(monkeypatch: pytest.MonkeyPatch) -> Semaphore:
    for name in ("renew_message_lock", "abandon_message"):
        monkeypatch.setattr(ServiceBusReceiver, name, getattr(FakeSettlingReceiver, name))
    return Semaphore(0)


def _held(number: int, token: str = "some") -> list[Any]:
    return [SimpleNamespace(lock_token=token) for _ in range(number)]


def test_settlement_does_not_wait_for_all_renewals(renewals: Semaphore) -> None:
    """Each renewal is a call. A settlement behind thousands of renewals would time out."""
    settlement = Settlement(lambda: cast("Any", FakeSettlingReceiver(renewals)))
    renewing = Thread(target=settlement.extend, args=(_held(1000),))
    renewing.start()
    returned = _held(1)
    settling = Thread(target=settlement.nack, args=(returned,))
    settling.start()
    renewals.release(500)
    settling.join(60)
    assert returned[0].lock_token is None
    renewals.release(500)
    renewing.join(60)
    settlement.close()


def test_renewals_continue_while_some_succeed(renewals: Semaphore) -> None:
    """A failing message does not prevent other renewals. In an outage, not all messages are tried."""
    renewals.release(10_000)
    settlement = Settlement(lambda: cast("Any", FakeSettlingReceiver(renewals)))
    assert settlement.extend(_held(1000))
    before = renewals._value
    assert not settlement.extend([*_held(1, "unreachable"), *_held(1000)])
    assert before - renewals._value > 1000
    before = renewals._value
    assert not settlement.extend(_held(1000, "unreachable"))
    assert before - renewals._value < 500
    settlement.close()


def test_lock_of_message_being_settled_is_not_reported_as_lost(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Service Bus can release the lock before its response arrives."""
    settling, proceed = Event(), Event()

    def complete_message(_: Any, message: Any) -> None:
        settling.set()
        proceed.wait(60)
        message.lock_token = None

    def renew_message_lock(_: Any, __: Any) -> None:
        raise MessageLockLostError

    monkeypatch.setattr(ServiceBusReceiver, "complete_message", complete_message)
    monkeypatch.setattr(ServiceBusReceiver, "renew_message_lock", renew_message_lock)
    settlement = Settlement(lambda: cast("Any", FakeSettlingReceiver(Semaphore())))
    held = _held(1)
    acking = Thread(target=settlement.ack, args=(held, 0.0))
    acking.start()
    assert settling.wait(60)
    assert settlement.extend(held)
    proceed.set()
    acking.join(60)
    assert settlement.extend(held)
    assert caplog.records == []
    assert settlement.extend(_held(1))
    assert [record.message for record in caplog.records] == ["lease_lost"]
    settlement.close()


def test_missing_credentials_are_a_refusal() -> None:
    """The SDK wraps the error. It is not an outage, which would be retried without an error."""
    wrapped = ServiceBusError("Handler failed", error=ClientAuthenticationError("no credential\nTo fix that: ..."))
    assert is_refusal(wrapped)
    assert is_refusal(ClientAuthenticationError("no"))
    assert not is_refusal(ServiceBusConnectionError(message="reset"))
    assert first_line(ClientAuthenticationError("no credential\nTo fix that: ...")) == "no credential"


class Malformed:
    """A received message that the SDK cannot decode."""

    message_id, sequence_number, delivery_count, enqueued_time_utc = "1", 1, 0, None
    body_type = AmqpMessageBodyType.DATA

    def __init__(self, error: Exception) -> None:
        self._error = error

    @property
    def body(self) -> Any:
        raise self._error

    application_properties = body


@pytest.mark.parametrize("error", [AttributeError(), TypeError(), UnicodeDecodeError("utf-8", b"", 0, 1, "")])
def test_message_that_cannot_be_decoded_does_not_affect_others(error: Exception) -> None:
    """It becomes a delivery without a body, which is dead-lettered. An exception would close the link."""
    delivery = delivery_of(cast("Any", Malformed(error)))
    assert (delivery.id, delivery.body, delivery.attributes) == ("1", b"", {})


def test_nested_properties_are_left_out() -> None:
    """Text of a value that is nested a thousand times cannot be made."""
    nested: Any = []
    for _ in range(3_000):
        nested = [nested]
    properties = {b"a": nested, "b": {"c": 1}, "d": b"text", "e": 7}
    message = SimpleNamespace(**{**vars(Malformed), "application_properties": properties, "body": [b"{}"]})
    assert delivery_of(cast("Any", message)).attributes == {"a": "", "b": "", "d": "text", "e": "7"}
