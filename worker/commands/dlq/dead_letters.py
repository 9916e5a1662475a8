"""Dead letters: reading, filtering, and the form in which an operator sees them."""

from __future__ import annotations

import json
import re
import time
from contextlib import closing, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import orjson

from worker.errors import Ignored, WorkerError
from worker.json_access import is_shallow, printable
from worker.parse import parse

if TYPE_CHECKING:
    from collections.abc import Collection, Generator, Iterable, Iterator

    from adapters import DeadLetter, DeadLetterQueue, SupportsDeadLetters

BATCH_SIZE = 100  # dead letters received at a time, with their bodies
IDLE_TIMEOUT = 5.0  # seconds without a dead letter after which the queue counts as empty
MAX_CLOCK_SKEW = timedelta(seconds=10)  # by which a queue's clock can be ahead of the local clock
MAX_INDENTED_DEPTH = 100  # a small body with thousands of levels would print megabytes of indentation
MAX_INDENTED_VALUES = 20_000  # a line for each value; an order of 500 lines has fewer
UNREADABLE = "unreadable"  # type of a message that cannot be parsed
_AGE = re.compile(r"(\d+)([smhdw])", re.ASCII)
_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}


@dataclass(frozen=True, slots=True)
class DeadLetterSummary:
    """The fields that `dlq list` prints: no body, no personal data."""

    message_id: str
    message_type: str | None
    resource_type: str | None
    resource_id: str | None
    reason: str
    stage: str
    attempts: int | None
    dead_lettered_at: datetime | None


@dataclass(frozen=True, slots=True)
class DeadLetterFilter:
    """The conditions a dead letter must meet. An empty condition accepts every dead letter."""

    ids: frozenset[str] = frozenset()
    reason: str = ""  # contained in the reason; case-insensitive
    message_type: str = ""  # equal to the type; case-insensitive
    since: datetime | None = None  # of dead_lettered_or_published_at, as is `before`
    before: datetime | None = None
    about: str = ""  # contained in the body; case-insensitive
    limit: int | None = None

    @property
    def selects_by_content(self) -> bool:
        """Return whether there are other conditions than ids and a limit."""
        return bool(self.reason or self.message_type or self.since or self.before or self.about)

    def select(self, dead_letters: Iterable[DeadLetter]) -> Iterator[DeadLetter]:
        """Yield the dead letters that match. Stop reading when no further dead letter can match."""
        missing, remaining = set(self.ids), self.limit
        for dead_letter in dead_letters:
            if not self._matches(dead_letter):
                continue
            missing.discard(dead_letter.delivery.id)
            remaining = None if remaining is None else remaining - 1
            yield dead_letter
            if remaining == 0 or (self.ids and not missing):
                return

    def missing_ids(self, found: Collection[str]) -> frozenset[str]:
        """Return the ids that were not found; none if the limit ended the search."""
        return frozenset() if self.limit and len(found) >= self.limit else self.ids.difference(found)

    def _matches(self, dead_letter: DeadLetter) -> bool:
        """Return whether all conditions are met. The type comes last because it requires parsing the body."""
        if self.ids and dead_letter.delivery.id not in self.ids:
            return False
        if self.reason.lower() not in dead_letter.failure.reason.lower():
            return False
        at = dead_lettered_or_published_at(dead_letter)
        if self.since and (at is None or at < self.since):
            return False
        if self.before and (at is None or at >= self.before):
            return False
        if self.about and not _contains(dead_letter.delivery.body, self.about):
            return False
        return not self.message_type or self.message_type.lower() == display_type(summarize(dead_letter)).lower()


def _contains(body: bytes, text: str) -> bool:
    """Return whether a body contains a text, as it is or with JSON's escapes."""
    lower = body.decode("utf-8", "replace").lower()
    return any(form.lower() in lower for form in (text, json.dumps(text)[1:-1]))


def iter_dead_letters(queue: SupportsDeadLetters) -> Generator[DeadLetter]:
    """Yield all dead letters of a queue without removing any. Raises QueueError."""
    with closing(queue.dead_letters()) as dead_letters:
        yield from iter_unseen(dead_letters)


def iter_unseen(dead_letters: DeadLetterQueue) -> Iterator[DeadLetter]:
    """Yield the dead letters that were not received yet. Raises QueueError.

    Dead letters that arrive after the start are ignored: otherwise the loop might never end.
    """
    until, found_at = datetime.now(UTC) + MAX_CLOCK_SKEW, time.monotonic()
    while received := dead_letters.receive(BATCH_SIZE, IDLE_TIMEOUT):
        for dead_letter in received:
            if (dead_lettered_or_published_at(dead_letter) or until) <= until:
                yield dead_letter
                found_at = time.monotonic()
        if time.monotonic() - found_at > IDLE_TIMEOUT:
            return


def summarize(dead_letter: DeadLetter) -> DeadLetterSummary:
    """Return the fields to print."""
    try:
        notification = parse(dead_letter.delivery.body)
    except (WorkerError, Ignored):
        notification = None
    return DeadLetterSummary(
        message_id=dead_letter.delivery.id,
        message_type=notification.type if notification else None,
        resource_type=notification.resource_type if notification else None,
        resource_id=notification.resource_id if notification else None,
        reason=dead_letter.failure.reason,
        stage=dead_letter.failure.stage,
        attempts=dead_letter.delivery.attempt,
        dead_lettered_at=dead_letter.dead_lettered_at,
    )


def format_json_line(summary: DeadLetterSummary) -> str:
    """Return a line of `dlq list --json`."""
    # Google's client returns a subclass of datetime, which orjson does not serialize by itself
    return printable(orjson.dumps(summary, default=datetime.isoformat).decode())


def display_type(summary: DeadLetterSummary) -> str:
    """Return the message type, or `unreadable`."""
    return summary.message_type or UNREADABLE


def dead_lettered_or_published_at(dead_letter: DeadLetter) -> datetime | None:
    """Return when the message was dead-lettered, else when it was published; None if the queue reports neither."""
    return dead_letter.dead_lettered_at or dead_letter.delivery.published_at


def parse_since(text: str, now: datetime) -> datetime:
    """Parse an age (90s, 30m, 2h, 3d, 1w) or an ISO 8601 time (UTC by default). Raises ValueError."""
    if age := _AGE.fullmatch(text.strip()):
        try:
            return now - timedelta(**{_UNITS[age[2]]: int(age[1])})
        except OverflowError:
            return datetime.min.replace(tzinfo=UTC)
    at = datetime.fromisoformat(text.strip())
    return at if at.tzinfo else at.replace(tzinfo=UTC)


def format_body(body: bytes) -> str:
    """Return a body for display: JSON indented, anything else as text with invalid bytes escaped.

    JSON with too many values or levels is not indented, because its indentation would be larger than the body.
    """
    text = body.decode("utf-8", "backslashreplace")
    if sum(map(body.count, (b",", b"[", b"{"))) <= MAX_INDENTED_VALUES:
        with suppress(ValueError, RecursionError):
            document = json.loads(body)
            if not isinstance(document, (dict, list)) or is_shallow(document, MAX_INDENTED_DEPTH):
                text = json.dumps(document, indent=2, ensure_ascii=False)
    return printable(text, keep="\n")
