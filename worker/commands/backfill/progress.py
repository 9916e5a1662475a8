"""How far a backfill has come: every record up to the last one has ended, and how."""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping
    from datetime import datetime


@dataclass(slots=True, eq=False)
class Record:
    """A record that was begun."""

    id: str
    left: int  # messages of it that have not ended
    is_sent: bool = False
    failure: str = ""  # why the first of them failed


@dataclass(slots=True, eq=False)
class RecordDelivery:
    """A message of a record. Nobody counts its deliveries: an earlier run, or the worker, may have sent it."""

    record: Record
    body: bytes = field(repr=False)
    defects: int = 0
    attempt: int | None = None
    published_at: datetime | None = None

    @property
    def id(self) -> str:
        """Return the record's id."""
        return self.record.id

    @property
    def attributes(self) -> Mapping[str, str]:
        """Return nothing."""
        return {}


@dataclass(slots=True)
class Progress:
    """Records end in any order, but count only once all before them have ended."""

    last_id: str = ""
    sent: int = 0
    nothing_to_do: int = 0
    failed: Counter[str] = field(default_factory=Counter)  # by reason
    _begun: deque[Record] = field(default_factory=deque)

    @property
    def done(self) -> int:
        """Count the records that have ended, up to the last."""
        return self.sent + self.nothing_to_do + self.failed.total()

    def begin(self, record: Record) -> None:
        """Note a record; they are begun in the order of their ids."""
        self._begun.append(record)

    def end(self, record: Record, *, is_sent: bool = False, failure: str = "") -> None:
        """Note that a message of a record has ended: sent, failed, or neither as there was nothing to do."""
        record.left -= 1
        record.is_sent = record.is_sent or is_sent
        record.failure = record.failure or failure
        while self._begun and not self._begun[0].left:
            self._count(self._begun.popleft())

    def _count(self, record: Record) -> None:
        self.last_id = record.id
        if record.failure:
            self.failed[record.failure] += 1
        elif record.is_sent:
            self.sent += 1
        else:
            self.nothing_to_do += 1
