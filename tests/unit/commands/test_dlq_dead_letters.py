"""Filters of dead letters, and the form in which they are printed."""

from __future__ import annotations

import json
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapters import DeadLetter, Failure
from tests.conftest import FakeDelivery
from tests.support.dead_letters import make_dead_letters
from worker.commands.dlq import dead_letters
from worker.commands.dlq.dead_letters import (
    DeadLetterFilter,
    format_body,
    format_json_line,
    iter_dead_letters,
    iter_unseen,
    parse_since,
    summarize,
)
from worker.json_access import printable
from worker.sandbox.notifications import message

if TYPE_CHECKING:
    from collections.abc import Iterator

    from adapters.embedded.queue import EmbeddedQueue

NOW = datetime(2026, 11, 27, 12, tzinfo=UTC)
HOUR = timedelta(hours=1)
times = st.none() | st.datetimes(timezones=st.just(UTC))
texts = st.text("aAbB ")


def dead_letter(number: int = 1, **values: Any) -> DeadLetter:
    body = json.dumps(message(values.get("type", "OrderCreated"), "order", f"o-{number}")).encode()
    delivery = FakeDelivery(values.get("body", body), str(number), 2, values.get("published_at"))
    return DeadLetter(delivery, Failure(values.get("reason", "refused"), "send", "Rejected"), values.get("at"))


def selected_ids(filters: DeadLetterFilter, *dead_letters: DeadLetter) -> list[str]:
    return [found.delivery.id for found in filters.select(dead_letters)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("90s", NOW - timedelta(seconds=90)),
        ("30m", NOW - timedelta(minutes=30)),
        ("2h", NOW - timedelta(hours=2)),
        (" 3d ", NOW - timedelta(days=3)),
        ("1w", NOW - timedelta(weeks=1)),
        ("2026-11-24", datetime(2026, 11, 24, tzinfo=UTC)),
        ("2026-11-24T18:00", datetime(2026, 11, 24, 18, tzinfo=UTC)),
        ("2026-11-24T18:00:00+01:00", datetime(2026, 11, 24, 17, tzinfo=UTC)),
        ("2026-11-24T18:00:00Z", datetime(2026, 11, 24, 18, tzinfo=UTC)),
        ("999999999999999w", datetime.min.replace(tzinfo=UTC)),
    ],
)
def test_since_accepts_ages_and_times(text: str, expected: datetime) -> None:
    """A time without an offset is UTC. An age before the first year selects everything."""
    assert parse_since(text, NOW) == expected


@pytest.mark.parametrize("text", ["", "2", "h", "-2h", "1.5h", "2 h", "yesterday", "12:00", "2026-13-01", "٣d"])
def test_since_rejects_other_texts(text: str) -> None:
    """A guess could drop the wrong dead letters."""
    with pytest.raises(ValueError, match=r"."):
        parse_since(text, NOW)


@given(st.text() | st.from_regex(r"\d{1,20}[smhdw]|\d{4}-[01]\d-[0-3]\dT?[0-9:+-]*", fullmatch=True))
def test_since_raises_only_value_error(text: str) -> None:
    """Any text is either rejected or a time that can be compared."""
    with suppress(ValueError):
        assert (parse_since(text, NOW) < NOW) in {True, False}


@given(st.integers(0, 10**6), st.sampled_from("smhdw"))
def test_age_is_subtracted_from_now(number: int, unit: str) -> None:
    """The result is the number of units before now, or the earliest time."""
    seconds = {"s": 1, "m": 60, "h": 3_600, "d": 86_400, "w": 604_800}[unit] * number
    expected = NOW - min(timedelta(seconds=seconds), NOW - datetime.min.replace(tzinfo=UTC))
    assert parse_since(f"{number}{unit}", NOW) == expected


@given(
    st.lists(st.tuples(texts, st.sampled_from(["OrderCreated", "OrderImported"]), times, times), max_size=8),
    texts,
    st.sampled_from(["", "ordercreated", "unreadable"]),
    times,
    st.none() | st.integers(1, 8),
)
def test_filter_requires_all_conditions(
    made: list[tuple[str, str, datetime | None, datetime | None]],
    reason: str,
    kind: str,
    since: datetime | None,
    limit: int | None,
) -> None:
    """The reason contains the text, the type is equal, both case-insensitive; order and limit are kept."""
    candidates = [
        dead_letter(n, reason=why, type=type_, at=at, published_at=published)
        for n, (why, type_, at, published) in enumerate(made)
    ]
    expected = [
        str(n)
        for n, (why, type_, at, published) in enumerate(made)
        if reason.casefold() in why.casefold()
        and kind in {"", type_.casefold()}
        and (since is None or ((at or published) is not None and (at or published or NOW) >= since))
    ]
    filters = DeadLetterFilter(reason=reason, message_type=kind, since=since, limit=limit)
    assert selected_ids(filters, *candidates) == expected[:limit]


def test_before_is_the_opposite_of_since() -> None:
    """A dead letter without any time is not known to be old."""
    found = dead_letter(1), dead_letter(2, at=NOW), dead_letter(3, at=NOW - HOUR), dead_letter(4, published_at=NOW)
    assert selected_ids(DeadLetterFilter(before=NOW), *found) == ["3"]
    assert selected_ids(DeadLetterFilter(since=NOW), *found) == ["2", "4"]


def test_dead_letters_about_a_person_are_found() -> None:
    """The body is searched as it is, also if it is not JSON, and with JSON's escapes."""
    bodies = (
        b'{"email": "Jos\\u00e9@mail.example"}',
        '{"email": "josé@mail.example"}'.encode(),
        b"\xff JOS\xc3\x89@mail",
    )
    found = [dead_letter(number, body=body) for number, body in enumerate((*bodies, b"{}"))]
    assert selected_ids(DeadLetterFilter(about="José@mail"), *found) == ["0", "1", "2"]
    assert not DeadLetterFilter(ids=frozenset("1"), limit=1).selects_by_content
    assert DeadLetterFilter(about="x").selects_by_content


def test_since_falls_back_to_publish_time(queue: EmbeddedQueue) -> None:
    """A dead letter without any time never matches `since`."""
    older = dead_letter(3, at=NOW - HOUR, published_at=NOW)
    assert selected_ids(DeadLetterFilter(since=NOW), dead_letter(1), dead_letter(2, published_at=NOW), older) == ["2"]
    make_dead_letters(queue, b"1")
    assert len(list(DeadLetterFilter(since=datetime.now(UTC) - HOUR).select(iter_dead_letters(queue)))) == 1
    assert list(DeadLetterFilter(since=datetime.now(UTC) + HOUR).select(iter_dead_letters(queue))) == []


def test_unreadable_messages_have_their_own_type() -> None:
    """They can be dropped without those that can be replayed."""
    filters = DeadLetterFilter(message_type="Unreadable")
    assert selected_ids(filters, dead_letter(1), dead_letter(2, body=b"\xff")) == ["2"]


def test_filter_stops_reading_after_the_last_match() -> None:
    """Reading costs time and leases."""

    def read_three_then_fail() -> Iterator[DeadLetter]:
        yield from (dead_letter(1), dead_letter(2), dead_letter(3))
        raise AssertionError

    assert selected_ids(DeadLetterFilter(limit=3), *[]) == []
    for filters, expected in ((DeadLetterFilter(limit=3), "123"), (DeadLetterFilter(frozenset("13")), "13")):
        assert [found.delivery.id for found in filters.select(read_three_then_fail())] == list(expected)


def test_ids_beyond_the_limit_are_not_missing() -> None:
    """The search ended before it could find them."""
    filters = DeadLetterFilter(frozenset("123"), limit=2)
    assert (filters.missing_ids({"1", "2"}), filters.missing_ids({"1"})) == (frozenset(), frozenset("23"))


class GrowingDeadLetters:
    """The dead letters of a queue to which each `receive` adds another dead letter."""

    def __init__(self, *dead_letters: DeadLetter) -> None:
        self._existing = list(dead_letters)
        self._requests = 0

    def receive(self, max_messages: int, wait: float) -> list[DeadLetter]:
        self._requests += 1
        assert self._requests < 100_000, "the iteration does not end"
        if self._existing:
            return [self._existing.pop(0)]
        return [dead_letter(9, at=datetime.now(UTC) + HOUR)]

    def remove(self, dead_letters: object) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


def test_iteration_ends_while_dead_letters_keep_arriving(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dead letters that arrive after the start are left to the next iteration."""
    monkeypatch.setattr(dead_letters, "IDLE_TIMEOUT", 0.01)
    existing = dead_letter(1, at=NOW - 1_000 * HOUR), dead_letter(2), dead_letter(3, published_at=NOW - 1_000 * HOUR)
    assert [found.delivery.id for found in iter_unseen(GrowingDeadLetters(*existing))] == ["1", "2", "3"]


def test_iteration_removes_nothing(queue: EmbeddedQueue) -> None:
    """A complete or an aborted iteration leaves all dead letters on the queue."""
    ids = make_dead_letters(queue, *(b"%d" % number for number in range(250)))
    assert [found.delivery.id for found in iter_dead_letters(queue)] == ids
    assert next(iter_dead_letters(queue)).delivery.id == ids[0]
    assert queue.counts() == (0, 250)


def test_large_bodies_are_received_in_small_batches(queue: EmbeddedQueue) -> None:
    """Reading dead letters uses no more memory than processing messages."""
    make_dead_letters(queue, *[b"x" * 2_100_000] * 3)
    dead_letters = queue.dead_letters()
    assert [len(dead_letters.receive(100, 0)) for _ in range(3)] == [2, 1, 0]


def test_summary_contains_no_body() -> None:
    """A summary is small and contains no personal data."""
    summary = summarize(dead_letter(7, body=b'{"email": "grete@example.com"}'))
    assert "grete" not in repr(summary)
    assert summary.message_type is None


class Nanoseconds(datetime):
    """The subclass that Google's client returns."""


@pytest.mark.parametrize("kind", [datetime, Nanoseconds])
def test_datetime_subclasses_are_printed_as_iso_8601(kind: type[datetime]) -> None:
    """All queues have the same output."""
    line = json.loads(format_json_line(summarize(dead_letter(at=kind(2026, 11, 24, 4, 6, 54, 123456, tzinfo=UTC)))))
    assert line["dead_lettered_at"] == "2026-11-24T04:06:54.123456+00:00"


@given(st.text())
def test_printable_text_contains_no_control_characters(text: str) -> None:
    """Escaping keeps the meaning of JSON."""
    assert printable(text).isprintable()
    assert json.loads(printable(json.dumps(text, ensure_ascii=False))) == text
    assert all(char.isprintable() or char == "\n" for char in printable(text, keep="\n"))


@given(
    st.binary()
    | st.text().map(str.encode)
    | st.recursive(st.none() | st.text(), st.lists).map(json.dumps).map(str.encode)
)
def test_every_body_is_printed_without_control_characters(body: bytes) -> None:
    """Any bytes are valid input."""
    assert all(char.isprintable() or char == "\n" for char in format_body(body))


@pytest.mark.parametrize(
    ("body", "shown"),
    [
        (b'{"a":{"b":"\xc3\xbc\\u001b[2J\xc2\x9b"}}', '{\n  "a": {\n    "b": "ü\\u001b[2J\\u009b"\n  }\n}'),
        (b"12345678901234567890123", "12345678901234567890123"),
        (b"not json\n\x1b]0;x\x07 \xff\xfe", "not json\n\\u001b]0;x\\u0007 \\xff\\xfe"),
        (b"", ""),
        (b"[" * 101 + b"]" * 101, "[" * 101 + "]" * 101),
        (b"[" * 5_000 + b"]" * 5_000, "[" * 5_000 + "]" * 5_000),
        (b"[" + b"0," * 20_001 + b"0]", "[" + "0," * 20_001 + "0]"),
    ],
)
def test_bodies_are_printed_in_full(body: bytes, shown: str) -> None:
    """JSON is indented if it has up to 100 levels and 20,000 values. Other text is unchanged."""
    assert format_body(body) == shown
