"""Which dead letters are meant, and what is shown of them."""

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
from tests.support.dead_letters import bury
from worker.commands.dlq import dead_letters
from worker.commands.dlq.dead_letters import Choice, body_text, each, entry, json_line, parse_since, through
from worker.json_access import printable
from worker.sandbox.notifications import message

if TYPE_CHECKING:
    from collections.abc import Iterator

    from adapters.embedded import EmbeddedQueue

NOW = datetime(2026, 11, 27, 12, tzinfo=UTC)
HOUR = timedelta(hours=1)
times = st.none() | st.datetimes(timezones=st.just(UTC))
texts = st.text("aAbB ")


def letter(number: int = 1, **values: Any) -> DeadLetter:
    body = json.dumps(message(values.get("type", "OrderCreated"), "order", f"o-{number}")).encode()
    delivery = FakeDelivery(values.get("body", body), str(number), 2, values.get("published_at"))
    return DeadLetter(delivery, Failure(values.get("reason", "refused"), "send", "Rejected"), values.get("at"))


def ids(choice: Choice, *letters: DeadLetter) -> list[str]:
    return [each.delivery.id for each in choice.of(letters)]


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
def test_since_is_an_age_or_a_time(text: str, expected: datetime) -> None:
    """Times are UTC unless they say; an age beyond all calendars means all."""
    assert parse_since(text, NOW) == expected


@pytest.mark.parametrize("text", ["", "2", "h", "-2h", "1.5h", "2 h", "yesterday", "12:00", "2026-13-01", "٣d"])
def test_what_is_no_time_is_refused(text: str) -> None:
    """Nothing is guessed where letters may be dropped."""
    with pytest.raises(ValueError, match=r"."):
        parse_since(text, NOW)


@given(st.text() | st.from_regex(r"\d{1,20}[smhdw]|\d{4}-[01]\d-[0-3]\dT?[0-9:+-]*", fullmatch=True))
def test_any_text_is_a_time_or_refused(text: str) -> None:
    """Never another error, and always a time that can be compared."""
    with suppress(ValueError):
        assert (parse_since(text, NOW) < NOW) in {True, False}


@given(st.integers(0, 10**6), st.sampled_from("smhdw"))
def test_ages_reach_back(number: int, unit: str) -> None:
    """So many units before now, or as far as there are times."""
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
def test_a_choice_takes_what_all_of_it_fits(
    made: list[tuple[str, str, datetime | None, datetime | None]],
    reason: str,
    kind: str,
    since: datetime | None,
    limit: int | None,
) -> None:
    """Reason contained, type equal, in whatever case; not older; in their order; no more than the limit."""
    letters = [
        letter(n, reason=why, type=type_, at=at, published_at=published)
        for n, (why, type_, at, published) in enumerate(made)
    ]
    expected = [
        str(n)
        for n, (why, type_, at, published) in enumerate(made)
        if reason.casefold() in why.casefold()
        and kind in {"", type_.casefold()}
        and (since is None or ((at or published) is not None and (at or published or NOW) >= since))
    ]
    assert ids(Choice(reason=reason, message_type=kind, since=since, limit=limit), *letters) == expected[:limit]


def test_what_nobody_dates_is_not_since(queue: EmbeddedQueue) -> None:
    """The time it was published stands in for the time it was given up on."""
    since = Choice(since=NOW)
    assert ids(since, letter(1), letter(2, published_at=NOW), letter(3, at=NOW - HOUR, published_at=NOW)) == ["2"]
    bury(queue, b"1")
    assert len(list(Choice(since=datetime.now(UTC) - HOUR).of(each(queue)))) == 1
    assert list(Choice(since=datetime.now(UTC) + HOUR).of(each(queue))) == []


def test_what_cannot_be_read_has_a_type_of_its_own() -> None:
    """So it can be dropped without what can be mended."""
    assert ids(Choice(message_type="Unreadable"), letter(1), letter(2, body=b"\xff")) == ["2"]


def test_nothing_is_looked_at_beyond_what_is_meant() -> None:
    """Looking costs time and leases."""

    def letters() -> Iterator[DeadLetter]:
        yield from (letter(1), letter(2), letter(3))
        raise AssertionError

    assert ids(Choice(limit=3), *[]) == []
    assert [each.delivery.id for each in Choice(limit=3).of(letters())] == ["1", "2", "3"]
    assert [each.delivery.id for each in Choice(frozenset("13")).of(letters())] == ["1", "3"]


def test_ids_beyond_the_limit_are_not_missed() -> None:
    """They were not looked for."""
    choice = Choice(frozenset("123"), limit=2)
    assert (choice.missing({"1", "2"}), choice.missing({"1"})) == (frozenset(), frozenset("23"))


class Growing:
    """Dead letters of a queue that gets one more whenever it is asked."""

    def __init__(self, *letters: DeadLetter) -> None:
        self._there = list(letters)
        self._asked = 0

    def receive(self, max_messages: int, wait: float) -> list[DeadLetter]:
        self._asked += 1
        assert self._asked < 100_000, "it is asked for ever"
        if self._there:
            return [self._there.pop(0)]
        return [letter(9, at=datetime.now(UTC) + HOUR)]

    def remove(self, letters: object) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


def test_a_look_ends_though_letters_keep_coming(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker buries meanwhile: what is given up on after the beginning is for the next look."""
    monkeypatch.setattr(dead_letters, "PATIENCE", 0.01)
    there = letter(1, at=NOW - 1_000 * HOUR), letter(2), letter(3, published_at=NOW - 1_000 * HOUR)
    assert [each.delivery.id for each in through(Growing(*there))] == ["1", "2", "3"]


def test_looking_removes_nothing(queue: EmbeddedQueue) -> None:
    """However far it went."""
    made = bury(queue, *(b"%d" % number for number in range(250)))
    assert [letter.delivery.id for letter in each(queue)] == made
    assert next(each(queue)).delivery.id == made[0]
    assert queue.counts() == (0, 250)


def test_large_bodies_are_read_a_few_at_a_time(queue: EmbeddedQueue) -> None:
    """Looking through them takes no more memory than handling them."""
    bury(queue, *[b"x" * 2_100_000] * 3)
    letters = queue.dead_letters()
    assert [len(letters.receive(100, 0)) for _ in range(3)] == [2, 1, 0]


def test_an_entry_holds_no_body() -> None:
    """What is kept of fifty thousand letters is little, and harmless."""
    shown = entry(letter(7, body=b'{"email": "grete@example.com"}'))
    assert "grete" not in repr(shown)
    assert shown.message_type is None


class Nanoseconds(datetime):
    """A time as Google's client has it."""


@pytest.mark.parametrize("kind", [datetime, Nanoseconds])
def test_times_of_any_class_are_told_alike(kind: type[datetime]) -> None:
    """As ISO 8601, whichever queue they come from."""
    line = json.loads(json_line(entry(letter(at=kind(2026, 11, 24, 4, 6, 54, 123456, tzinfo=UTC)))))
    assert line["dead_lettered_at"] == "2026-11-24T04:06:54.123456+00:00"


@given(st.text())
def test_escaped_texts_cannot_steer_a_terminal(text: str) -> None:
    """Nothing is left but what can be seen, and JSON means what it meant."""
    assert printable(text).isprintable()
    assert json.loads(printable(json.dumps(text, ensure_ascii=False))) == text
    assert all(char.isprintable() or char == "\n" for char in printable(text, keep="\n"))


@given(
    st.binary()
    | st.text().map(str.encode)
    | st.recursive(st.none() | st.text(), st.lists).map(json.dumps).map(str.encode)
)
def test_any_body_can_be_shown(body: bytes) -> None:
    """Whatever it is, without characters that steer a terminal."""
    assert all(char.isprintable() or char == "\n" for char in body_text(body))


@pytest.mark.parametrize(
    ("body", "shown"),
    [
        (b'{"a":{"b":"\xc3\xbc\\u001b[2J\xc2\x9b"}}', '{\n  "a": {\n    "b": "ü\\u001b[2J\\u009b"\n  }\n}'),
        (b"12345678901234567890123", "12345678901234567890123"),
        (b"not json\n\x1b]0;x\x07 \xff\xfe", "not json\n\\u001b]0;x\\u0007 \\xff\\xfe"),
        (b"", ""),
        (b"[" * 5_000 + b"]" * 5_000, "[" * 5_000 + "]" * 5_000),
    ],
)
def test_bodies_are_shown_in_full(body: bytes, shown: str) -> None:
    """JSON indented, anything else as it stands."""
    assert body_text(body) == shown
