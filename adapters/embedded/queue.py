"""The embedded queue: durable and leased messages in SQLite, for any number of processes on one machine.

The column `visible_at` holds the end of a lease or of a delay: after that time, the message is ready. It is in seconds
of the monotonic clock, which all processes of the machine share, so a change of the wall clock or a suspension of the
machine has no effect on it. The clock starts again when the machine boots. After that, all messages are ready. A late
ack is harmless because it names an old lease token. docs/decisions/0003-embedded-queue.md explains why no library is
used.
"""

from __future__ import annotations

import logging
import sqlite3
import time
import uuid
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from threading import Lock, RLock
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl, unquote, urlsplit

from adapters.base import Counts, DeadLetter, Failure, QueueError, QueueURLError
from adapters.embedded.database import open_database

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from adapters.base import Delivery, QueueOptions, QueueWarning

log = logging.getLogger("klaviyo_worker.embedded")
POLL_SECONDS = 0.005  # a poll takes microseconds
# Limit of the bodies that `receive` returns, exceeded by one body at most. The worker limits bodies only afterwards.
RECEIVE_BYTES = 4_000_000
_EXPECTED = "expected embedded:///path/queue.db[?lease=SECONDS&max_attempts=N]"
_LEASE = """
UPDATE messages SET lease = ?, visible_at = ?, attempts = attempts + 1
WHERE id IN (
    SELECT id FROM (
        SELECT id, sum(size) OVER (ORDER BY visible_at, id) - size AS before FROM (
            SELECT id, visible_at, length(body) AS size FROM messages WHERE visible_at <= ?
            ORDER BY visible_at, id LIMIT ?))
    WHERE before < ?)
RETURNING id, body, published_at, attempts, lease, reason, stage, error
"""
_DEAD_LETTER = """
INSERT INTO dead_letters SELECT id, body, published_at, attempts, ?, ?, ?, ?
FROM messages WHERE id = ? AND lease = ?
"""
_NACK = """
UPDATE messages SET lease = NULL, visible_at = ?, reason = ?, stage = ?, error = ? WHERE id = ? AND lease = ?
"""
_NACK_UNPROCESSED = (
    "UPDATE messages SET lease = NULL, visible_at = ?, attempts = attempts - 1 WHERE id = ? AND lease = ?"
)
_NEXT_DEAD_LETTERS = (
    "SELECT * FROM dead_letters WHERE (dead_lettered_at, id) > (?, ?) ORDER BY dead_lettered_at, id LIMIT ?"
)
_OVERDUE = Failure("was delivered the maximum number of times and never settled", "queue", "LeaseExpired")


@dataclass(frozen=True, slots=True)
class EmbeddedDelivery:
    """A message that this worker has leased."""

    id: str
    body: bytes = field(repr=False)
    attempt: int
    published_at: datetime
    lease: str
    last_failure: Failure | None = None
    attributes: Mapping[str, str] = field(default_factory=dict)


def open_url(url: str, _options: QueueOptions) -> EmbeddedQueue:
    """Open `embedded:///path/queue.db[?lease=SECONDS&max_attempts=N]`, creating the file if it is missing."""
    parts = urlsplit(url)
    path = unquote(parts.netloc + parts.path)
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    try:
        lease = float(options.pop("lease", EmbeddedQueue.LEASE_SECONDS))
        max_attempts = int(options.pop("max_attempts", EmbeddedQueue.MAX_ATTEMPTS))
    except ValueError:
        raise QueueURLError("QUEUE_URL is malformed", todo=_EXPECTED) from None
    if options or not path.strip("/") or not 0 < lease < float("inf") or max_attempts < 1:
        raise QueueURLError("QUEUE_URL is malformed", todo=_EXPECTED)
    return EmbeddedQueue(Path(path).expanduser(), lease_seconds=lease, max_attempts=max_attempts)


class EmbeddedQueue:
    """A queue in one SQLite file. Implements QueueAdapter, SupportsPublish, SupportsCounts and SupportsDeadLetters."""

    LEASE_SECONDS = 60.0
    MAX_ATTEMPTS = 20  # enough for an outage of two hours, because delays grow to ten minutes

    def __init__(self, path: Path, *, lease_seconds: float = LEASE_SECONDS, max_attempts: int = MAX_ATTEMPTS) -> None:
        self._path = path
        self._lease_seconds = lease_seconds
        self._max_attempts = max_attempts
        self._lock = RLock()
        try:
            self._db = open_database(path)
        except (OSError, sqlite3.Error) as error:
            raise QueueError(f"QUEUE_URL: cannot open {path}: {error}") from error

    @property
    def lease_seconds(self) -> float:
        """Seconds for which a received message is invisible to other workers."""
        return self._lease_seconds

    def publish(self, bodies: Iterable[bytes]) -> int:
        """Store the messages in one transaction and return their number. They survive a power failure."""
        published_at, visible_at = time.time(), time.monotonic()
        with self._transaction("FULL"):
            cursor = self._db.executemany(
                "INSERT INTO messages (body, published_at, visible_at) VALUES (?, ?, ?)",
                ((body, published_at, visible_at) for body in bodies),
            )
            return max(cursor.rowcount, 0)

    def receive(self, max_messages: int, wait: float) -> Sequence[EmbeddedDelivery]:
        """Lease ready messages, the oldest first. Dead-letter those that have used up their attempts."""
        deadline = time.monotonic() + wait
        while True:
            ready = self._lease_ready(max_messages) if self._is_any_ready() else []
            remaining = deadline - time.monotonic()
            if ready or remaining <= 0:
                return ready
            time.sleep(min(POLL_SECONDS, remaining))

    def ack(self, deliveries: Sequence[Delivery]) -> None:
        """Delete the messages that are still leased to this worker."""
        with self._transaction():
            self._db.executemany("DELETE FROM messages WHERE id = ? AND lease = ?", _keys(deliveries))

    def nack(self, deliveries: Sequence[Delivery], delay: float = 0.0, failure: Failure | None = None) -> None:
        """Make the messages ready after `delay`. Dead-letter those that have used up their attempts."""
        visible_at = time.monotonic() + max(delay, 0.0)
        if failure is None:
            with self._transaction():
                self._db.executemany(_NACK_UNPROCESSED, ((visible_at, *key) for key in _keys(deliveries)))
            return
        spent = [d for d in deliveries if (d.attempt or 0) >= self._max_attempts]
        retryable = [d for d in deliveries if d not in spent]
        reason = (failure.reason, failure.stage, failure.error)
        with self._transaction():
            self._db.executemany(_NACK, ((visible_at, *reason, *key) for key in _keys(retryable)))
        for delivery in spent:
            self._dead_letter_spent(delivery, failure)

    def dead_letter(self, delivery: Delivery, failure: Failure) -> bool:
        """Move the row to the dead letters, in one transaction."""
        (key,) = _keys([delivery])
        with self._transaction():
            self._db.execute(_DEAD_LETTER, (failure.reason, failure.stage, failure.error, time.time(), *key))
            self._db.execute("DELETE FROM messages WHERE id = ? AND lease = ?", key)
        return True

    def extend(self, deliveries: Sequence[Delivery], seconds: float) -> None:
        """Make the leases end `seconds` from now."""
        until = time.monotonic() + seconds
        with self._transaction():
            self._db.executemany(
                "UPDATE messages SET visible_at = ? WHERE id = ? AND lease = ?",
                ((until, *key) for key in _keys(deliveries)),
            )

    def backlog(self) -> int:
        """Return the number of ready, delayed and leased messages."""
        with self._guard():
            return int(self._db.execute("SELECT count(*) FROM messages").fetchone()[0])

    def counts(self) -> Counts:
        """Count the messages and the dead letters."""
        with self._guard():
            query = "SELECT (SELECT count(*) FROM messages), (SELECT count(*) FROM dead_letters)"
            waiting, dead = self._db.execute(query).fetchone()
            return Counts(int(waiting), int(dead))

    def check(self) -> Sequence[QueueWarning]:
        """Raise QueueError if the file cannot be written."""
        with self._transaction():
            return ()

    def stop(self) -> None:
        """Do nothing: `receive` returns all messages that it leases."""

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._db.close()

    def dead_letters(self) -> EmbeddedDeadLetters:
        """Open the dead letters. Close them before the queue."""
        return EmbeddedDeadLetters(self)

    def dead_letters_after(self, last: tuple[float, int], limit: int) -> list[tuple[tuple[float, int], DeadLetter]]:
        """Return the oldest dead letters after the position `last`, each with its position."""
        found: list[tuple[tuple[float, int], DeadLetter]] = []
        room = RECEIVE_BYTES
        with self._guard():
            for row in self._db.execute(_NEXT_DEAD_LETTERS, (*last, limit)):
                found.append(((row[-1], row[0]), _dead_letter(row)))
                room -= len(row[1])
                if room <= 0:
                    break
        return found

    def delete_dead_letters(self, deliveries: Sequence[Delivery]) -> None:
        """Delete dead letters."""
        with self._transaction("FULL"):
            self._db.executemany("DELETE FROM dead_letters WHERE id = ?", [(int(d.id),) for d in deliveries])

    def _is_any_ready(self) -> bool:
        """Return whether a message is ready. Takes no write lock, so idle workers do not block the others."""
        with self._guard():
            query = "SELECT 1 FROM messages WHERE visible_at <= ? LIMIT 1"
            return self._db.execute(query, (time.monotonic(),)).fetchone() is not None

    def _lease_ready(self, max_messages: int) -> list[EmbeddedDelivery]:
        token, now = uuid.uuid4().hex, time.monotonic()
        with self._transaction():
            values = (token, now + self._lease_seconds, now, max_messages, RECEIVE_BYTES)
            rows = self._db.execute(_LEASE, values).fetchall()
        leased = [_delivery(row) for row in sorted(rows)]  # RETURNING guarantees no order
        for delivery in leased:
            if delivery.attempt > self._max_attempts:
                self._dead_letter_spent(delivery, delivery.last_failure or _OVERDUE)
        return [delivery for delivery in leased if delivery.attempt <= self._max_attempts]

    def _dead_letter_spent(self, delivery: Delivery, last: Failure) -> None:
        """Dead-letter a message that has used up its attempts."""
        attempts = min(delivery.attempt or 0, self._max_attempts)
        failure = Failure(f"failed after {attempts} attempts: {last.reason}", last.stage, last.error)
        self.dead_letter(delivery, failure)
        fields = {"message_id": delivery.id, "reason": failure.reason, "stage": failure.stage, "error": failure.error}
        log.error("attempts_exhausted", extra=fields)

    @contextmanager
    def _guard(self) -> Iterator[None]:
        with self._lock:
            try:
                yield
            except sqlite3.Error as error:
                raise QueueError(f"QUEUE_URL: {self._path}: {error}") from error

    @contextmanager
    def _transaction(self, synchronous: str = "NORMAL") -> Iterator[None]:
        """Run a write transaction. With NORMAL, a power failure can undo it; its messages are then redelivered."""
        with self._guard():
            self._db.execute(f"PRAGMA synchronous = {synchronous}")
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                if self._db.in_transaction:  # false after an I/O error: SQLite has rolled back
                    self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")


class EmbeddedDeadLetters:
    """A cursor over the dead letters. Concurrent readers each get all of them; handling one twice is harmless."""

    def __init__(self, queue: EmbeddedQueue) -> None:
        self._queue = queue
        self._last = (0.0, 0)
        self._lock = Lock()

    def receive(self, max_messages: int, wait: float) -> list[DeadLetter]:  # noqa: ARG002 - reading does not wait
        """Return the next dead letters."""
        with self._lock:
            found = self._queue.dead_letters_after(self._last, max_messages)
            self._last = found[-1][0] if found else self._last
        return [dead_letter for _, dead_letter in found]

    def remove(self, dead_letters: Sequence[DeadLetter]) -> None:
        """Delete the rows, in one transaction."""
        self._queue.delete_dead_letters([dead_letter.delivery for dead_letter in dead_letters])

    def close(self) -> None:
        """Do nothing: reading leases nothing."""


def _dead_letter(row: tuple[int, bytes, float, int, str, str, str, float]) -> DeadLetter:
    row_id, body, published_at, attempts, reason, stage, error, at = row
    delivery = EmbeddedDelivery(str(row_id), body, attempts, _time(published_at), lease="")
    return DeadLetter(delivery, Failure(reason, stage, error), _time(at))


def _keys(deliveries: Sequence[Delivery]) -> list[tuple[int, str]]:
    return [(int(d.id), d.lease) for d in deliveries if isinstance(d, EmbeddedDelivery)]


def _delivery(row: tuple[int, bytes, float, int, str, str | None, str | None, str | None]) -> EmbeddedDelivery:
    row_id, body, published_at, attempts, lease, reason, stage, error = row
    last = Failure(reason, stage or "", error or "") if reason else None
    return EmbeddedDelivery(str(row_id), body, attempts, _time(published_at), lease, last)


def _time(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)
