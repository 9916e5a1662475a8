"""Dead letters on lease: what becomes of leases that are lost, removals that fail, and looks that are interrupted."""

from __future__ import annotations

import time
from threading import Event, Thread
from typing import TYPE_CHECKING

import pytest

from adapters import DeadLetter, Failure, QueueError
from adapters.shared.leased_dead_letters import DeadLetterDelivery, LeasedDeadLetters

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

SOON = 10.0  # seconds


class Leasing:
    """A Source: hands out what it is given, and notes what it is told."""

    def __init__(self) -> None:
        self.coming: list[list[tuple[str, DeadLetter]]] = []
        self.refused: dict[str, str] = {}
        self.extended: list[tuple[list[str], int]] = []
        self.was_extended, self.may_extend = Event(), Event()
        self.may_extend.set()
        self.removed: list[str] = []
        self.asked, self.answer = Event(), Event()
        self.answer.set()
        self.closed = 0

    def lease(self, at_most: int, wait: float, seconds: int) -> list[tuple[str, DeadLetter]]:
        self.asked.set()
        assert self.answer.wait(SOON)
        return self.coming.pop(0) if self.coming else []

    def extend(self, handles: Sequence[str], seconds: int) -> dict[str, str]:
        self.extended.append((sorted(handles), seconds))
        self.was_extended.set()
        assert self.may_extend.wait(SOON)
        return {handle: self.refused[handle] for handle in handles if handle in self.refused}

    def remove(self, handles: Sequence[str]) -> dict[str, str]:
        self.removed += handles
        return {handle: self.refused[handle] for handle in handles if handle in self.refused}

    def close(self) -> None:
        self.closed += 1


@pytest.fixture
def source() -> Leasing:
    return Leasing()


@pytest.fixture
def letters(source: Leasing) -> Iterator[LeasedDeadLetters]:
    opened = LeasedDeadLetters(source)
    yield opened
    source.answer.set()
    opened.close()


def letter(id_: str) -> DeadLetter:
    return DeadLetter(DeadLetterDelivery(id_, b"body", {}, None, None), Failure("", "", ""), None)


def ids(found: Sequence[DeadLetter]) -> list[str]:
    return [each.delivery.id for each in found]


def test_a_letter_that_comes_again_is_not_handed_out_again(source: Leasing, letters: LeasedDeadLetters) -> None:
    """Its lease was lost: from then on the newest handle counts."""
    source.coming = [[("h1", letter("a"))], [("h2", letter("a"))], [("h3", letter("b"))]]
    first = letters.receive(10, SOON)
    assert ids(first) == ["a"]
    assert ids(letters.receive(10, SOON)) == ["b"]
    letters.remove(first)
    assert source.removed == ["h2"]


def test_a_removed_letter_that_comes_again_is_removed_again(source: Leasing, letters: LeasedDeadLetters) -> None:
    """A queue may lose an acknowledgement, or deliver twice; close has nothing to do with it any more."""
    source.coming = [[("h1", letter("a"))], [("h2", letter("a")), ("h3", letter("b"))]]
    letters.remove(letters.receive(10, SOON))
    assert ids(letters.receive(10, SOON)) == ["b"]
    assert source.removed == ["h1", "h2"]
    letters.close()
    letters.close()
    assert source.extended == [(["h3"], 0)]
    assert source.closed == 1


def test_what_could_not_be_removed_is_told_and_stays(source: Leasing, letters: LeasedDeadLetters) -> None:
    """How many and why; the others are gone; it can be tried again."""
    source.coming = [[("h1", letter("a")), ("h2", letter("b")), ("h3", letter("c"))]]
    found = letters.receive(10, SOON)
    source.refused = {"h2": "not permitted"}
    with pytest.raises(QueueError, match=r"^QUEUE_URL: 1 dead letters may not have been removed: not permitted$"):
        letters.remove(found)
    source.refused = {}
    letters.remove(found)
    assert source.removed == ["h1", "h2", "h3", "h2"]
    letters.close()
    assert source.extended == [([], 0)]


def test_leases_are_extended_as_long_as_they_are_held(source: Leasing) -> None:
    """In time, those of removed letters not; one whose lease ended meanwhile may still be there."""
    letters = LeasedDeadLetters(source, seconds=3)
    source.coming = [[("h1", letter("a")), ("h2", letter("b")), ("h3", letter("c"))]]
    found = letters.receive(10, SOON)
    letters.remove(found[:1])
    source.refused = {"h3": "out of reach"}
    source.was_extended.clear()
    assert source.was_extended.wait(SOON)
    assert source.extended[-1] == (["h2", "h3"], 3)
    time.sleep(3.2)  # longer than a lease
    source.refused = {}
    with pytest.raises(QueueError, match="1 dead letters may not have been removed: its lease had ended"):
        letters.remove(found)
    letters.close()
    assert source.extended[-1] == (["h3"], 0)


def test_what_a_look_brings_that_nobody_waits_for_goes_back(source: Leasing, letters: LeasedDeadLetters) -> None:
    """Ctrl-C ends who waits, but not the call under way: closing waits for it, and there is no other."""
    source.coming = [[("h1", letter("a"))], [("h2", letter("b"))]]
    source.answer.clear()
    looks = [letters._polls.submit(letters._poll, 10, SOON) for _ in range(2)]
    assert source.asked.wait(SOON)
    closing = Thread(target=letters.close)
    closing.start()
    closing.join(0.3)
    assert source.extended == []
    source.answer.set()
    closing.join(SOON)
    assert all(look.done() for look in looks)
    assert (source.extended, source.closed) == ([(["h1"], 0)], 1)


def test_an_extension_under_way_is_waited_for(source: Leasing) -> None:
    """It would hold again what was just given back."""
    letters = LeasedDeadLetters(source, seconds=1)
    source.coming = [[("h1", letter("a"))]]
    letters.receive(10, SOON)
    source.may_extend.clear()
    source.was_extended.clear()
    assert source.was_extended.wait(SOON)
    closing = Thread(target=letters.close)
    closing.start()
    closing.join(0.3)
    assert source.extended[-1] == (["h1"], 1)
    source.may_extend.set()
    closing.join(SOON)
    assert source.extended[-1] == (["h1"], 0)


def test_a_queue_that_has_nothing_at_first_is_asked_again(source: Leasing, letters: LeasedDeadLetters) -> None:
    """Pub/Sub may answer with nothing though there is something; also with what is known."""
    source.coming = [[], [], [("h1", letter("a"))]]
    assert ids(letters.receive(10, SOON)) == ["a"]
    assert letters.receive(10, 0.3) == []
