"""The messages that were given up on: which are meant, and what an operator sees of them."""

from __future__ import annotations

import json
import re
import time
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import orjson

from worker.errors import Ignored, WorkerError
from worker.json_access import printable
from worker.parse import parse

if TYPE_CHECKING:
    from collections.abc import Collection, Generator, Iterable, Iterator

    from adapters import DeadLetter, DeadLetterQueue, SupportsDeadLetters

AT_ONCE = 100  # letters asked for at a time, with their bodies
PATIENCE = 5.0  # seconds without a letter after which there are no more
CLOCKS = timedelta(seconds=10)  # by which a queue's clock may be ahead
UNREADABLE = "unreadable"  # in the place of a type
_AGE = re.compile(r"(\d+)([smhdw])", re.ASCII)
_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}


@dataclass(frozen=True, slots=True)
class Entry:
    """What `dlq list` tells of a dead letter, field by field: no body, no personal data."""

    message_id: str
    message_type: str | None
    resource_type: str | None
    resource_id: str | None
    reason: str
    stage: str
    attempts: int | None
    dead_lettered_at: datetime | None


@dataclass(frozen=True, slots=True)
class Choice:
    """Which dead letters are meant; what is not given does not matter."""

    ids: frozenset[str] = frozenset()
    reason: str = ""  # text it contains, in whatever case
    message_type: str = ""  # likewise in whatever case
    since: datetime | None = None  # given up on then or later; published, where the queue does not tell
    limit: int | None = None

    def of(self, letters: Iterable[DeadLetter]) -> Iterator[DeadLetter]:
        """Yield those that are meant, and look no further than the last of them."""
        missing, left = set(self.ids), self.limit
        for letter in letters:
            if not self._takes(letter):
                continue
            missing.discard(letter.delivery.id)
            left = None if left is None else left - 1
            yield letter
            if left == 0 or (self.ids and not missing):
                return

    def missing(self, found: Collection[str]) -> frozenset[str]:
        """Return the ids that were not found, unless they are more than the limit let be looked for."""
        return frozenset() if self.limit and len(found) >= self.limit else self.ids.difference(found)

    def _takes(self, letter: DeadLetter) -> bool:
        """Tell whether a letter is meant; the body is read last."""
        if self.ids and letter.delivery.id not in self.ids:
            return False
        if self.reason.lower() not in letter.failure.reason.lower():
            return False
        at = given_up_at(letter)
        if self.since and (at is None or at < self.since):
            return False
        return not self.message_type or self.message_type.lower() == type_of(entry(letter)).lower()


def each(queue: SupportsDeadLetters) -> Generator[DeadLetter]:
    """Yield all dead letters of a queue, and leave them. Raises QueueError."""
    with closing(queue.dead_letters()) as letters:
        yield from through(letters)


def through(letters: DeadLetterQueue) -> Iterator[DeadLetter]:
    """Yield what was not handed out yet, and not what comes from now on: that may never end. Raises QueueError."""
    until, found_at = datetime.now(UTC) + CLOCKS, time.monotonic()
    while found := letters.receive(AT_ONCE, PATIENCE):
        for letter in found:
            if (given_up_at(letter) or until) <= until:
                yield letter
                found_at = time.monotonic()
        if time.monotonic() - found_at > PATIENCE:
            return


def entry(letter: DeadLetter) -> Entry:
    """Return what is told of a letter."""
    try:
        about = parse(letter.delivery.body)
    except (WorkerError, Ignored):
        about = None
    return Entry(
        message_id=letter.delivery.id,
        message_type=about.type if about else None,
        resource_type=about.resource_type if about else None,
        resource_id=about.resource_id if about else None,
        reason=letter.failure.reason,
        stage=letter.failure.stage,
        attempts=letter.delivery.attempt,
        dead_lettered_at=letter.dead_lettered_at,
    )


def json_line(entry: Entry) -> str:
    """Return an entry as a line of `dlq list --json`. Queues may have times of a class of their own."""
    return printable(orjson.dumps(entry, default=datetime.isoformat).decode())


def type_of(entry: Entry) -> str:
    """Return the type, or that the message cannot be read."""
    return entry.message_type or UNREADABLE


def given_up_at(letter: DeadLetter) -> datetime | None:
    """Return when a message was given up on, or else published; None where the queue tells neither."""
    return letter.dead_lettered_at or letter.delivery.published_at


def parse_since(text: str, now: datetime) -> datetime:
    """Return the time that an age (90s, 30m, 2h, 3d, 1w) or an ISO 8601 time means, which is UTC unless it says.

    Raises ValueError.
    """
    if age := _AGE.fullmatch(text.strip()):
        try:
            return now - timedelta(**{_UNITS[age[2]]: int(age[1])})
        except OverflowError:
            return datetime.min.replace(tzinfo=UTC)
    at = datetime.fromisoformat(text.strip())
    return at if at.tzinfo else at.replace(tzinfo=UTC)


def body_text(body: bytes) -> str:
    """Return a body for a person: JSON indented, anything else as text, and what is no text escaped."""
    try:
        text = json.dumps(json.loads(body), indent=2, ensure_ascii=False)
    except (ValueError, RecursionError):
        text = body.decode("utf-8", "backslashreplace")
    return printable(text, keep="\n")
