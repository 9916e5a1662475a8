"""The dead letters of Service Bus: their properties, and the end of a search for one."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta
from itertools import cycle
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from azure.servicebus import ServiceBusReceiver
from azure.servicebus.amqp import AmqpMessageBodyType
from azure.servicebus.exceptions import MessageLockLostError
from hypothesis import given
from hypothesis import strategies as st

from adapters import Failure, QueueError
from adapters.servicebus.dead_letter_reason import ParsedReason, format_reason, parse_reason
from adapters.servicebus.dead_letters import ServiceBusDeadLetters

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

STAGES = ("parse", "enrich", "transform", "send")
POLICY = "MaxDeliveryCountExceeded"
LOCKING = {"prefetch_count": 49, "keep_alive": 0}  # otherwise a thread of the SDK also reads from the link
INVALID_DATE = "Refused (attempt 1, 2026-02-30T00:00:00Z)"

amqp_values = st.one_of(st.none(), st.booleans(), st.integers(), st.binary(), st.text(), st.lists(st.integers()))


def by_policy(attempt: int | None) -> ParsedReason:
    after = f" after {attempt} deliveries" if attempt else ""
    reason = f"dead-lettered by the queue{after}: the worker's log has the reason"
    return ParsedReason(Failure(reason, "queue", POLICY), attempt)


class FakeReceiver:
    """A fake receiver that returns the given dead letters and locks them."""

    def __init__(self, dead_letters: list[Any], locked: Iterator[Any]) -> None:
        self._messages = dead_letters
        self._locked = locked

    def receive_messages(self, *_: object) -> list[Any]:
        return [next(self._locked)]

    def peek_messages(self, number: int, sequence_number: int) -> list[Any]:
        return [each for each in self._messages if each.sequence_number >= sequence_number][:number]

    def close(self) -> None:
        """Do nothing."""


def _message(number: int = 1, properties: Any = None, locked_until: datetime | None = None) -> Any:
    return SimpleNamespace(
        sequence_number=number,
        message_id=None,
        application_properties=properties,
        body_type=AmqpMessageBodyType.DATA,
        body=[b"{}"],
        delivery_count=3,
        enqueued_time_utc=None,
        locked_until_utc=locked_until,
        lock_token="some",
    )


def _open_dead_letters(
    dead_letters: list[Any], locked: Iterable[Any] = ()
) -> tuple[ServiceBusDeadLetters, list[dict[str, Any]]]:
    """Open dead letters; also return the options of the receivers that lock."""
    receiver = FakeReceiver(dead_letters, iter(locked))
    receiver_options: list[dict[str, Any]] = []

    def connect(**options: Any) -> Any:
        if options:
            receiver_options.append(options)
        return receiver

    return ServiceBusDeadLetters(connect, lambda error: QueueError(str(error))), receiver_options


@pytest.mark.parametrize(
    ("reason", "description", "parsed"),
    [
        ("TTLExpiredException", "It expired.", ParsedReason(Failure("It expired.", "queue", "TTLExpiredException"))),
        (POLICY, "Message could not be consumed after 20 delivery attempts.", by_policy(20)),
        (POLICY, "", by_policy(None)),
        ("note: mine", "two\nlines", ParsedReason(Failure("two lines", "queue", "note: mine"))),
        ("send: by hand", "Refused", ParsedReason(Failure("Refused", "queue", "send: by hand"))),
        ("3", "", ParsedReason(Failure("3", "queue", "3"))),
        ("send: Rejected", "Refused", ParsedReason(Failure("Refused", "send", "Rejected"))),
        ("send: Rejected", INVALID_DATE, ParsedReason(Failure(INVALID_DATE, "send", "Rejected"))),
        ("", "", ParsedReason(Failure("", "", ""))),
    ],
)
def test_reason_and_description_are_parsed(reason: str, description: str, parsed: ParsedReason) -> None:
    """They are written by the worker, with its stage and error, by Service Bus, or by other clients."""
    assert parse_reason(reason, description) == parsed


@given(
    st.one_of(st.text(), st.text(min_size=1, max_size=5).map(lambda text: text * 5000)),
    st.sampled_from(STAGES),
    st.sampled_from(["Rejected", "KeyError"]),
    st.sampled_from(["", "OrderCreated"]),
    st.sampled_from([("", ""), ("", "o-1"), ("order", "o-1")]),
    st.integers(1, 10**6),
    st.datetimes(min_value=datetime(2000, 1, 1), timezones=st.just(UTC)),  # noqa: DTZ001 - hypothesis requires it
)
def test_formatted_reason_can_be_parsed(
    reason: str, stage: str, error: str, message_type: str, resource: tuple[str, str], attempt: int, at: datetime
) -> None:
    """Reason and description have at most Service Bus's length; only the sentence is truncated."""
    texts = format_reason(Failure(reason, stage, error, message_type, *resource), attempt, at)
    assert all(len(text) <= 4096 for text in texts)
    parsed = parse_reason(*texts)
    assert " ".join(reason.split()).startswith(parsed.failure.reason)
    assert len(reason) > 3900 or parsed.failure.reason == " ".join(reason.split())
    assert (parsed.failure.stage, parsed.failure.error) == (stage, error)
    assert (parsed.attempt, parsed.at) == (attempt, at.replace(microsecond=0))


def test_unknown_details_are_omitted() -> None:
    """Operators read the description in the Azure portal."""
    at = datetime(2026, 1, 31, 12, tzinfo=UTC)
    assert format_reason(Failure("Refused", "send", "Rejected"), None, at)[1] == "Refused (2026-01-31T12:00:00Z)"


@given(st.text(), st.text(), st.sampled_from(["", " (attempt 1, 2026-01-01T00:00:00Z)"]))
def test_any_properties_result_in_one_line_and_a_known_stage(reason: str, description: str, end: str) -> None:
    """Any client can write them."""
    failure = parse_reason(reason, description + end).failure
    assert failure.stage in {*STAGES, "queue", ""}
    assert len((failure.reason + failure.error).splitlines()) <= 1


@given(amqp_values, amqp_values)
def test_properties_of_any_type_are_read(reason: Any, description: Any) -> None:
    """AMQP has other types than text. A dead letter that cannot be read would prevent reading all others."""
    properties = {b"DeadLetterReason": reason, b"DeadLetterErrorDescription": description, b"colour": b"blue"}
    for written in (properties, None):
        dead_letters, _ = _open_dead_letters([_message(properties=written)])
        (dead_letter,) = dead_letters.receive(10, 0)
        dead_letters.close()
        assert dead_letter.delivery.attributes == ({"colour": "blue"} if written else {})


@pytest.fixture(autouse=True)
def _settle_valid_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Settle messages whose lock has not ended, by the local clock."""

    def settle(_: Any, message: Any) -> None:
        if message.locked_until_utc and message.locked_until_utc < datetime.now(UTC):
            raise MessageLockLostError
        message.lock_token = None

    monkeypatch.setattr(ServiceBusReceiver, "complete_message", settle)
    monkeypatch.setattr(ServiceBusReceiver, "abandon_message", settle)


def test_search_ends_if_locks_end_first() -> None:
    """With thousands of dead letters and short locks, those ahead would be locked again indefinitely."""
    existing = [_message(number) for number in (1, 2, 3)]
    dead_letters, receiver_options = _open_dead_letters(existing, cycle(existing[:2]))
    found = dead_letters.receive(10, 0)
    with pytest.raises(QueueError, match=r"1 of 1 dead letters still exist: .* locks end before"):
        dead_letters.remove(found[2:])
    assert receiver_options == [LOCKING]
    dead_letters.close()


def test_expired_lock_is_not_used(caplog: pytest.LogCaptureFixture) -> None:
    """It is not reported as lost either: Service Bus delivers the dead letter again."""
    ended = datetime.now(UTC) - timedelta(seconds=1)
    dead_letters, _ = _open_dead_letters(
        [_message(1), _message(2), _message(3)],
        iter([_message(1, None, ended), _message(2, None, ended), _message(3), _message(1)]),
    )
    found = dead_letters.receive(10, 0)
    dead_letters.remove(found[2:])
    dead_letters.remove(found[:1])
    dead_letters.close()
    assert caplog.records == []


def test_old_prefetched_messages_are_released(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their locks have possibly ended. Removals in quick succession use one connection."""
    existing = [_message(number) for number in (1, 2, 3)]
    dead_letters, receiver_options = _open_dead_letters(existing, existing)
    found = dead_letters.receive(10, 0)
    dead_letters.remove(found[:1])
    dead_letters.remove(found[1:2])
    assert receiver_options == [LOCKING]
    later = time.monotonic() + 6.0
    with monkeypatch.context() as patch:
        patch.setattr(time, "monotonic", lambda: later)
        dead_letters.remove(found[2:])
    assert receiver_options == [LOCKING] * 2
    dead_letters.close()
