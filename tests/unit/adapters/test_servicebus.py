"""Service Bus: what a URL and a connection string name, and what bytes a body is."""

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
from adapters.servicebus.message import body_of
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
def test_every_name_that_service_bus_allows_can_be_written(name: str, subscription: str | None) -> None:
    """Percent-encoded, so that a queue's name may hold a slash."""
    path = "/".join(quote(part, safe="") for part in (name, subscription) if part is not None)
    assert parse_url(f"servicebus://{HOST}/{path}") == Entity(HOST, name, subscription or "")


def test_an_emulator_is_named_with_its_port() -> None:
    """As in its connection string."""
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
def test_a_url_that_names_no_queue_is_refused_and_not_quoted(url: str) -> None:
    """The text says what was expected."""
    with pytest.raises(QueueURLError, match="QUEUE_URL is malformed: expected servicebus://NAMESPACE") as caught:
        open_queue(url)
    assert "secret" not in str(caught.value)


@given(st.text())
def test_whatever_is_written_a_url_is_parsed_or_refused(text: str) -> None:
    """No other error escapes."""
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
def test_a_connection_string_fits_its_queue(connection_string: str) -> None:
    """Of the namespace, or of this queue alone."""
    check_connection_string(connection_string, QUEUE)


@pytest.mark.parametrize(
    ("connection_string", "said"),
    [
        (f"Endpoint=sb://other.servicebus.windows.net/;{KEY}", "another namespace than QUEUE_URL"),
        (f"Endpoint=sb://{HOST}/;{KEY};EntityPath=customers", "another queue or topic than QUEUE_URL"),
        (f"Endpoint=sb://{HOST}/", "is malformed"),
        (f"Endpoint={HOST};{KEY}", "is malformed"),
        (KEY, "is malformed"),
        ("c2VjcmV0", "is malformed"),
    ],
)
def test_a_connection_string_of_something_else_is_refused_and_not_quoted(connection_string: str, said: str) -> None:
    """It is a secret, in the whole traceback."""
    with pytest.raises(QueueURLError, match=f"SERVICEBUS_CONNECTION_STRING is .*{said.removeprefix('is ')}") as caught:
        open_queue(f"servicebus://{HOST}/orders", QueueOptions(connection_string=connection_string))
    assert "c2VjcmV0" not in "".join(traceback.format_exception_only(caught.value))


def test_messages_cross_no_network_unencrypted() -> None:
    """They hold what belongs to people. An emulator on this machine needs no certificate."""
    emulated = f"{KEY};usedevelopmentemulator=TRUE"
    check_connection_string(f"Endpoint=sb://127.0.0.1:5672;{emulated}", Entity("127.0.0.1:5672", "orders"))
    with pytest.raises(QueueError, match="SERVICEBUS_CONNECTION_STRING: UseDevelopmentEmulator, which turns TLS off"):
        check_connection_string(f"Endpoint=sb://{HOST};{emulated}", QUEUE)


@given(st.text())
def test_whatever_a_connection_string_holds_it_fits_or_is_refused(text: str) -> None:
    """No other error escapes, and none quotes it."""
    try:
        check_connection_string(f"{text};{KEY}", QUEUE)
    except QueueError as error:
        assert "c2VjcmV0" not in str(error)


@given(st.lists(st.binary()))
def test_sections_of_data_are_joined(sections: list[bytes]) -> None:
    """The publisher's client cuts a body as it likes."""
    assert body_of(AmqpMessageBodyType.DATA, iter(sections)) == b"".join(sections)


@given(amqp_values)
def test_every_value_is_some_bytes(value: Any) -> None:
    """Whatever it is, it must get as far as the dead letters."""
    body = body_of(AmqpMessageBodyType.VALUE, value)
    assert isinstance(body, bytes)
    if isinstance(value, bytes):
        assert body == value
    assert isinstance(body_of(AmqpMessageBodyType.SEQUENCE, [[value], [value]]), bytes)


def test_a_notification_as_an_amqp_map_is_json() -> None:
    """Its keys and texts are bytes by the time the SDK has read them."""
    value = {b"id": b"1", b"tags": [b"\xc3\xa9", None, True, 1.5], 3: {"a": "b"}}
    assert json.loads(body_of(AmqpMessageBodyType.VALUE, value)) == {
        "id": "1",
        "tags": ["é", None, True, 1.5],
        "3": {"a": "b"},
    }


@given(st.sampled_from(AmqpMessageBodyType), amqp_values)
def test_a_body_that_is_none_is_empty(kind: AmqpMessageBodyType, value: Any) -> None:
    """AMQP can say that a section of data holds a number: no error keeps what came with it from being received."""
    assert isinstance(body_of(kind, value), bytes)
    assert isinstance(body_of(kind, [value]), bytes)
    assert body_of(AmqpMessageBodyType.DATA, [3]) == b""


def test_a_value_as_deep_as_no_notification_is_empty() -> None:
    """It ends in the dead letters, whole."""
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    assert body_of(AmqpMessageBodyType.VALUE, deep) == b""


def test_a_receiver_that_fails_to_close_does_not_end_the_receiving() -> None:
    """Whatever the SDK raises: a thread that ends would never receive again."""
    closed = Event()

    class FakeReceiver:
        def receive_messages(self, _: int, __: float) -> list[ServiceBusReceivedMessage]:
            raise ServiceBusConnectionError(message="reset")

        def close(self) -> None:
            closed.set()
            raise RuntimeError("an error of its own")

    receiver = Receiver(cast("Any", FakeReceiver), 1000)
    receiver.receive(1, 0.0)
    assert closed.wait(10)
    closed.clear()
    assert closed.wait(10)
    receiver.close()


def _locked(seconds: float, stored_ago: float) -> Any:
    now = datetime.now(UTC)
    return SimpleNamespace(
        locked_until_utc=now + timedelta(seconds=seconds), enqueued_time_utc=now - timedelta(seconds=stored_ago)
    )


@pytest.mark.parametrize(
    ("seconds", "stored_ago", "lease", "warnings"),
    [
        (60.0, 3600.0, 60.0, 0),
        (160.0, -100.0, 60.0, 0),  # ours is behind: what was stored just now tells
        (660.0, 3600.0, 5.0, 1),  # ours is behind, and nothing tells by how much
        (-540.0, 3600.0, 5.0, 1),  # ours is ahead
    ],
)
def test_a_lease_that_cannot_be_is_not_believed(
    seconds: float, stored_ago: float, lease: float, warnings: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Locks are renewed by it, and end when it is taken for too long; said once."""
    learnt = LockDuration()
    learnt.update([])
    assert learnt.seconds == 5.0
    for _ in range(2):
        learnt.update([_locked(seconds - 2.0, stored_ago), _locked(seconds, stored_ago)])
    assert learnt.seconds == pytest.approx(lease, abs=0.5)
    assert [record.message for record in caplog.records] == ["clock_skew"] * warnings


def test_what_is_known_of_the_clock_is_remembered() -> None:
    """A renewed lock tells nothing new, nor does a message that was stored long ago."""
    learnt = LockDuration()
    learnt.update([_locked(160.0, -100.0)])
    learnt.update([_locked(160.0, 3600.0)])
    assert learnt.seconds == pytest.approx(60.0, abs=0.5)


def test_a_clock_that_is_set_right_is_believed_again() -> None:
    """What it was behind by would make every lock too short."""
    learnt = LockDuration()
    learnt.update([_locked(160.0, -100.0)])
    learnt.update([_locked(60.0, 0.0)])
    assert learnt.seconds == 5.0
    learnt.update([_locked(60.0, 0.0)])
    assert learnt.seconds == pytest.approx(60.0, abs=0.5)


def test_what_is_stopped_while_it_connects_receives_nothing() -> None:
    """Nobody would return it: it would stay locked, and cost a delivery."""
    connecting, connected, closed = Event(), Event(), Event()
    received: list[int] = []

    class FakeReceiver:
        def __init__(self) -> None:
            connecting.set()
            connected.wait(10)

        def receive_messages(self, number: int, _: float) -> list[ServiceBusReceivedMessage]:
            received.append(number)
            return []

        def close(self) -> None:
            closed.set()

    receiver = Receiver(cast("Any", FakeReceiver), 1000)
    receiver.receive(1, 0.0)
    assert connecting.wait(10)
    assert receiver.stop() == []
    connected.set()
    assert closed.wait(10)
    assert received == []


class _Receiver:
    """Renews a lock when it may, and abandons at once."""

    def __init__(self, may_renew: Semaphore) -> None:
        self._may_renew = may_renew

    def renew_message_lock(self, message: Any) -> None:
        if not self._may_renew.acquire(timeout=10) or message.lock_token == "unreachable":
            raise ServiceBusConnectionError(message="reset")

    def abandon_message(self, message: Any) -> None:
        message.lock_token = None

    def close(self) -> None:
        """Do nothing."""


@pytest.fixture
def may_renew(monkeypatch: pytest.MonkeyPatch) -> Semaphore:
    for name in ("renew_message_lock", "abandon_message"):
        monkeypatch.setattr(ServiceBusReceiver, name, getattr(_Receiver, name))
    return Semaphore(0)


def _held(number: int, token: str = "some") -> list[Any]:
    return [SimpleNamespace(lock_token=token) for _ in range(number)]


def test_what_is_to_be_settled_does_not_wait_for_all_renewals(may_renew: Semaphore) -> None:
    """They are a call each: with thousands a dead letter would be given up before its turn."""
    settlement = Settlement(lambda: cast("Any", _Receiver(may_renew)))
    renewing = Thread(target=settlement.extend, args=(_held(1000),))
    renewing.start()
    sent_back = _held(1)
    settling = Thread(target=settlement.nack, args=(sent_back,))
    settling.start()
    may_renew.release(500)
    settling.join(10)
    assert sent_back[0].lock_token is None
    may_renew.release(500)
    renewing.join(10)
    settlement.close()


def test_renewals_go_on_while_some_come_through(may_renew: Semaphore) -> None:
    """One message that fails keeps no other from being renewed; an outage is not tried thousands of times."""
    may_renew.release(10_000)
    settlement = Settlement(lambda: cast("Any", _Receiver(may_renew)))
    assert settlement.extend(_held(1000))
    began = may_renew._value
    assert not settlement.extend([*_held(1, "unreachable"), *_held(1000)])
    assert began - may_renew._value > 1000
    began = may_renew._value
    assert not settlement.extend(_held(1000, "unreachable"))
    assert began - may_renew._value < 500
    settlement.close()


def test_what_is_just_being_settled_is_not_called_lost(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Service Bus may have let go of it before its answer is here."""
    settling, go_on = Event(), Event()

    def complete_message(_: Any, message: Any) -> None:
        settling.set()
        go_on.wait(10)
        message.lock_token = None

    def renew_message_lock(_: Any, __: Any) -> None:
        raise MessageLockLostError

    monkeypatch.setattr(ServiceBusReceiver, "complete_message", complete_message)
    monkeypatch.setattr(ServiceBusReceiver, "renew_message_lock", renew_message_lock)
    settlement = Settlement(lambda: cast("Any", _Receiver(Semaphore())))
    held = _held(1)
    completing = Thread(target=settlement.ack, args=(held, 0.0))
    completing.start()
    assert settling.wait(10)
    assert settlement.extend(held)
    go_on.set()
    completing.join(10)
    assert settlement.extend(held)
    assert caplog.records == []
    assert settlement.extend(_held(1))
    assert [record.message for record in caplog.records] == ["lease_lost"]
    settlement.close()


def test_credentials_that_are_missing_are_a_refusal() -> None:
    """Wrapped by the SDK: not an outage, which would be waited for in silence."""
    wrapped = ServiceBusError("Handler failed", error=ClientAuthenticationError("no credential\nTo mend that: ..."))
    assert is_refusal(wrapped)
    assert is_refusal(ClientAuthenticationError("no"))
    assert not is_refusal(ServiceBusConnectionError(message="reset"))
    assert first_line(ClientAuthenticationError("no credential\nTo mend that: ...")) == "no credential"
