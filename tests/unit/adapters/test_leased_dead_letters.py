"""Leased dead letters: lost leases, failed removals, and interrupted polls."""

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


class FakeSource:
    """A fake DeadLetterSource that returns the given dead letters and records calls."""

    def __init__(self) -> None:
        self.polls: list[list[tuple[str, DeadLetter]]] = []
        self.errors: dict[str, str] = {}
        self.extended: list[tuple[list[str], int]] = []
        self.was_extended, self.can_extend = Event(), Event()
        self.can_extend.set()
        self.removed: list[str] = []
        self.polled, self.can_answer = Event(), Event()
        self.can_answer.set()
        self.closed = 0

    def lease(self, max_messages: int, wait: float, seconds: int) -> list[tuple[str, DeadLetter]]:
        self.polled.set()
        assert self.can_answer.wait(SOON)
        return self.polls.pop(0) if self.polls else []

    def extend(self, handles: Sequence[str], seconds: int) -> dict[str, str]:
        self.extended.append((sorted(handles), seconds))
        self.was_extended.set()
        assert self.can_extend.wait(SOON)
        return {handle: self.errors[handle] for handle in handles if handle in self.errors}

    def remove(self, handles: Sequence[str]) -> dict[str, str]:
        self.removed += handles
        return {handle: self.errors[handle] for handle in handles if handle in self.errors}

    def close(self) -> None:
        self.closed += 1


@pytest.fixture
def source() -> FakeSource:
    return FakeSource()


@pytest.fixture
def dead_letters(source: FakeSource) -> Iterator[LeasedDeadLetters]:
    opened = LeasedDeadLetters(source)
    yield opened
    source.can_answer.set()
    opened.close()


def dead_letter(id_: str) -> DeadLetter:
    return DeadLetter(DeadLetterDelivery(id_, b"body", {}, None, None), Failure("", "", ""), None)


def ids(found: Sequence[DeadLetter]) -> list[str]:
    return [each.delivery.id for each in found]


def test_redelivered_dead_letter_is_not_returned_again(source: FakeSource, dead_letters: LeasedDeadLetters) -> None:
    """Its lease was lost, so only the newest handle removes it."""
    source.polls = [[("h1", dead_letter("a"))], [("h2", dead_letter("a"))], [("h3", dead_letter("b"))]]
    first = dead_letters.receive(10, SOON)
    assert ids(first) == ["a"]
    assert ids(dead_letters.receive(10, SOON)) == ["b"]
    dead_letters.remove(first)
    assert source.removed == ["h2"]


def test_redelivered_dead_letter_is_removed_again_after_removal(
    source: FakeSource, dead_letters: LeasedDeadLetters
) -> None:
    """A queue can lose an acknowledgement, or deliver twice. `close` ignores removed dead letters."""
    source.polls = [[("h1", dead_letter("a"))], [("h2", dead_letter("a")), ("h3", dead_letter("b"))]]
    dead_letters.remove(dead_letters.receive(10, SOON))
    assert ids(dead_letters.receive(10, SOON)) == ["b"]
    assert source.removed == ["h1", "h2"]
    dead_letters.close()
    dead_letters.close()
    assert source.extended == [(["h3"], 0)]
    assert source.closed == 1


def test_failed_removal_raises_and_can_be_repeated(source: FakeSource, dead_letters: LeasedDeadLetters) -> None:
    """The error has the number and the reason; the others are removed."""
    source.polls = [[("h1", dead_letter("a")), ("h2", dead_letter("b")), ("h3", dead_letter("c"))]]
    found = dead_letters.receive(10, SOON)
    source.errors = {"h2": "not permitted"}
    with pytest.raises(QueueError, match=r"^QUEUE_URL: 1 dead letters were possibly not removed: not permitted$"):
        dead_letters.remove(found)
    source.errors = {}
    dead_letters.remove(found)
    assert source.removed == ["h1", "h2", "h3", "h2"]
    dead_letters.close()
    assert source.extended == [([], 0)]


def test_leases_are_extended_until_dead_letters_are_removed(source: FakeSource) -> None:
    """A dead letter whose lease has ended can still exist after its removal."""
    dead_letters = LeasedDeadLetters(source, seconds=3)
    source.polls = [[("h1", dead_letter("a")), ("h2", dead_letter("b")), ("h3", dead_letter("c"))]]
    found = dead_letters.receive(10, SOON)
    dead_letters.remove(found[:1])
    source.errors = {"h3": "unreachable"}
    source.was_extended.clear()
    assert source.was_extended.wait(SOON)
    assert source.extended[-1] == (["h2", "h3"], 3)
    time.sleep(3.2)  # longer than a lease
    source.errors = {}
    with pytest.raises(QueueError, match="1 dead letters were possibly not removed: its lease had ended"):
        dead_letters.remove(found)
    dead_letters.close()
    assert source.extended[-1] == (["h3"], 0)


def test_close_waits_for_interrupted_poll_and_releases_its_dead_letters(
    source: FakeSource, dead_letters: LeasedDeadLetters
) -> None:
    """Ctrl-C ends the wait for a poll, but not the poll itself. No further poll starts."""
    source.polls = [[("h1", dead_letter("a"))], [("h2", dead_letter("b"))]]
    source.can_answer.clear()
    polls = [dead_letters._polls.submit(dead_letters._poll, 10, SOON) for _ in range(2)]
    assert source.polled.wait(SOON)
    closing = Thread(target=dead_letters.close)
    closing.start()
    closing.join(0.3)
    assert source.extended == []
    source.can_answer.set()
    closing.join(SOON)
    assert all(poll.done() for poll in polls)
    assert (source.extended, source.closed) == ([(["h1"], 0)], 1)


def test_close_waits_for_running_extension(source: FakeSource) -> None:
    """Otherwise the extension could lease released dead letters again."""
    dead_letters = LeasedDeadLetters(source, seconds=1)
    source.polls = [[("h1", dead_letter("a"))]]
    dead_letters.receive(10, SOON)
    source.can_extend.clear()
    source.was_extended.clear()
    assert source.was_extended.wait(SOON)
    closing = Thread(target=dead_letters.close)
    closing.start()
    closing.join(0.3)
    assert source.extended[-1] == (["h1"], 1)
    source.can_extend.set()
    closing.join(SOON)
    assert source.extended[-1] == (["h1"], 0)


def test_receive_polls_again_after_empty_poll(source: FakeSource, dead_letters: LeasedDeadLetters) -> None:
    """Pub/Sub can return no messages, or known ones, although there are new ones."""
    source.polls = [[], [], [("h1", dead_letter("a"))]]
    assert ids(dead_letters.receive(10, SOON)) == ["a"]
    assert dead_letters.receive(10, 0.3) == []
