"""Dead letters of Service Bus: what their properties mean, and when a search for one ends."""

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
LOCKING = {"prefetch_count": 49, "keep_alive": 0}  # else the SDK reads on a thread of its own
NO_DAY = "Refused (attempt 1, 2026-02-30T00:00:00Z)"

amqp_values = st.one_of(st.none(), st.booleans(), st.integers(), st.binary(), st.text(), st.lists(st.integers()))


def by_policy(attempt: int | None) -> ParsedReason:
    after = f" after {attempt} deliveries" if attempt else ""
    reason = f"dead-lettered by the queue{after}: the worker's log has the reason"
    return ParsedReason(Failure(reason, "queue", POLICY), attempt)


class _Receiver:
    """Shows letters, and locks what it is told to."""

    def __init__(self, letters: list[Any], locked: Iterator[Any]) -> None:
        self._letters = letters
        self._locked = locked

    def receive_messages(self, *_: object) -> list[Any]:
        return [next(self._locked)]

    def peek_messages(self, number: int, sequence_number: int) -> list[Any]:
        return [each for each in self._letters if each.sequence_number >= sequence_number][:number]

    def close(self) -> None:
        """Do nothing."""


def _letter(number: int = 1, properties: Any = None, locked_until: datetime | None = None) -> Any:
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


def _letters(letters: list[Any], locked: Iterable[Any] = ()) -> tuple[ServiceBusDeadLetters, list[dict[str, Any]]]:
    """Open dead letters; return them and what receivers that lock are asked for."""
    receiver = _Receiver(letters, iter(locked))
    asked: list[dict[str, Any]] = []

    def connect(**options: Any) -> Any:
        if options:
            asked.append(options)
        return receiver

    return ServiceBusDeadLetters(connect, lambda error: QueueError(str(error))), asked


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
        ("send: Rejected", NO_DAY, ParsedReason(Failure(NO_DAY, "send", "Rejected"))),
        ("", "", ParsedReason(Failure("", "", ""))),
    ],
)
def test_a_letter_says_who_gave_up_and_why(reason: str, description: str, parsed: ParsedReason) -> None:
    """The worker, with its stage and error; Service Bus itself, or somebody by other means."""
    assert parse_reason(reason, description) == parsed


@given(
    st.one_of(st.text(), st.text(min_size=1, max_size=5).map(lambda text: text * 5000)),
    st.sampled_from(STAGES),
    st.sampled_from(["Rejected", "KeyError"]),
    st.sampled_from(["", "OrderCreated"]),
    st.sampled_from([("", ""), ("", "o-1"), ("order", "o-1")]),
    st.integers(1, 10**6),
    st.datetimes(min_value=datetime(2000, 1, 1), timezones=st.just(UTC)),  # noqa: DTZ001 - hypothesis wants it so
)
def test_what_the_worker_writes_is_read(
    reason: str, stage: str, error: str, message_type: str, resource: tuple[str, str], attempt: int, at: datetime
) -> None:
    """Reason and description are no longer than Service Bus takes; the sentence is cut for that, and nothing else."""
    texts = format_reason(Failure(reason, stage, error, message_type, *resource), attempt, at)
    assert all(len(text) <= 4096 for text in texts)
    parsed = parse_reason(*texts)
    assert " ".join(reason.split()).startswith(parsed.failure.reason)
    assert len(reason) > 3900 or parsed.failure.reason == " ".join(reason.split())
    assert (parsed.failure.stage, parsed.failure.error) == (stage, error)
    assert (parsed.attempt, parsed.at) == (attempt, at.replace(microsecond=0))


def test_what_is_not_known_is_not_mentioned() -> None:
    """People read it, in the portal."""
    at = datetime(2026, 1, 31, 12, tzinfo=UTC)
    assert format_reason(Failure("Refused", "send", "Rejected"), None, at)[1] == "Refused (2026-01-31T12:00:00Z)"


@given(st.text(), st.text(), st.sampled_from(["", " (attempt 1, 2026-01-01T00:00:00Z)"]))
def test_whatever_the_properties_hold_is_a_line_and_a_known_stage(reason: str, description: str, end: str) -> None:
    """Any client may write them."""
    failure = parse_reason(reason, description + end).failure
    assert failure.stage in {*STAGES, "queue", ""}
    assert len((failure.reason + failure.error).splitlines()) <= 1


@given(amqp_values, amqp_values)
def test_properties_of_any_type_are_some_letter(reason: Any, description: Any) -> None:
    """AMQP has more than texts, and a letter that cannot be read would hide all others."""
    properties = {b"DeadLetterReason": reason, b"DeadLetterErrorDescription": description, b"colour": b"blue"}
    for about in (properties, None):
        letters, _ = _letters([_letter(properties=about)])
        (letter,) = letters.receive(10, 0)
        letters.close()
        assert letter.delivery.attributes == ({"colour": "blue"} if about else {})


@pytest.fixture(autouse=True)
def _settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Settle whose lock has not ended, by the clock here."""

    def settle(_: Any, message: Any) -> None:
        if message.locked_until_utc and message.locked_until_utc < datetime.now(UTC):
            raise MessageLockLostError
        message.lock_token = None

    monkeypatch.setattr(ServiceBusReceiver, "complete_message", settle)
    monkeypatch.setattr(ServiceBusReceiver, "abandon_message", settle)


def test_the_search_for_a_letter_ends_when_locks_end_first() -> None:
    """With thousands of letters and a short lock those ahead of it would come again for ever."""
    there = [_letter(number) for number in (1, 2, 3)]
    letters, asked = _letters(there, cycle(there[:2]))
    found = letters.receive(10, 0)
    with pytest.raises(QueueError, match=r"1 of 1 dead letters still exist: .* locks end before"):
        letters.remove(found[2:])
    assert asked == [LOCKING]
    letters.close()


def test_a_lock_that_ended_meanwhile_is_not_used(caplog: pytest.LogCaptureFixture) -> None:
    """An operator who looks on need not read that it was lost: the letter comes again."""
    ended = datetime.now(UTC) - timedelta(seconds=1)
    letters, _ = _letters(
        [_letter(1), _letter(2), _letter(3)],
        iter([_letter(1, None, ended), _letter(2, None, ended), _letter(3), _letter(1)]),
    )
    found = letters.receive(10, 0)
    letters.remove(found[2:])
    letters.remove(found[:1])
    letters.close()
    assert caplog.records == []


def test_what_was_on_its_way_for_long_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its locks may have ended; in quick succession letters come by one connection."""
    there = [_letter(number) for number in (1, 2, 3)]
    letters, asked = _letters(there, there)
    found = letters.receive(10, 0)
    letters.remove(found[:1])
    letters.remove(found[1:2])
    assert asked == [LOCKING]
    later = time.monotonic() + 6.0
    with monkeypatch.context() as patch:
        patch.setattr(time, "monotonic", lambda: later)
        letters.remove(found[2:])
    assert asked == [LOCKING] * 2
    letters.close()
