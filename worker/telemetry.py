"""What the worker says of itself: one canonical line per message, fixed event names, no personal data."""

from __future__ import annotations

import logging
import sys
import time
from collections import Counter
from datetime import UTC, datetime
from threading import Lock
from typing import TYPE_CHECKING, TextIO

from pythonjsonlogger.json import JsonFormatter

from worker.model import Disposition, Job

if TYPE_CHECKING:
    from collections.abc import Iterable

log = logging.getLogger("klaviyo_worker")

_OUTCOMES = {
    Disposition.ACK: "sent",
    Disposition.NACK: "retried",
    Disposition.DEAD_LETTER: "dead_lettered",
}
_LEVELS = {"retried": logging.WARNING, "dead_lettered": logging.ERROR}


class Telemetry:
    """Counts outcomes and writes the canonical lines."""

    def __init__(self) -> None:
        self.outcomes: Counter[str] = Counter()
        self._lock = Lock()

    def settled(self, jobs: Iterable[Job]) -> None:
        """Report deliveries that reached an ending."""
        self._report((job, outcome_name(job)) for job in jobs)

    def returned(self, jobs: Iterable[Job]) -> None:
        """Report deliveries that went back to the queue unhandled."""
        self._report((job, "returned") for job in jobs)

    def _report(self, endings: Iterable[tuple[Job, str]]) -> None:
        for job, outcome in endings:
            with self._lock:
                self.outcomes[outcome] += 1
            level = _LEVELS.get(outcome, logging.INFO)
            if log.isEnabledFor(level):
                log.log(level, "message_processed", extra=_canonical(job, outcome))


def outcome_name(job: Job) -> str:
    """Return the outcome of a settled job as logs name it: sent, ignored, retried, dead_lettered."""
    assert job.outcome is not None
    if job.outcome.disposition is Disposition.ACK and not job.operations:
        return "ignored"
    return _OUTCOMES[job.outcome.disposition]


def _canonical(job: Job, outcome: str) -> dict[str, object]:
    notification, delivery, ending = job.notification, job.delivery, job.outcome
    published = delivery.published_at
    age = (datetime.now(UTC) - published).total_seconds() if published else None
    return {
        "message_id": delivery.id,
        "message_type": notification.type if notification else None,
        "resource_type": notification.resource_type if notification else None,
        "resource_id": notification.resource_id if notification else None,
        "outcome": outcome,
        "reason": ending.reason or None if ending else None,
        "error": ending.error or None if ending else None,
        "stage": ending.stage if ending else None,
        "attempt": delivery.attempt,
        "duration_s": round(time.monotonic() - job.received_at, 4),
        "age_s": None if age is None else round(max(age, 0.0), 3),
        "operations": len(job.operations),
        "cut": sorted({path for operation in job.operations for path in operation.cut}) or None,
    }


def configure_logging(level: str, style: str, stream: TextIO | None = None) -> None:
    """Send our log lines to `stream` (stderr): JSON, or text for a person at a terminal.

    Only our own logger is set up: the libraries' debug lines hold tokens and bodies. That they warned is said.
    """
    stream = stream or sys.stderr
    handler = logging.StreamHandler(stream)
    as_text = style == "text" or (style == "auto" and stream.isatty())
    handler.setFormatter(_TextFormatter() if as_text else _json_formatter())
    log.handlers = [handler]
    log.propagate = False
    log.setLevel(level)
    logging.lastResort = _Libraries(logging.WARNING)


class _Libraries(logging.Handler):
    """Says that a library warned, and where: its text may quote what belongs to a person."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write a line of ours."""
        error = record.exc_info[0].__name__ if record.exc_info and record.exc_info[0] else None
        where = f"{record.filename}:{record.lineno}"
        log.log(record.levelno, "library_warning", extra={"library": record.name, "where": where, "error": error})


def _json_formatter() -> JsonFormatter:
    return JsonFormatter(
        ["message", "levelname"],
        rename_fields={"message": "event", "levelname": "level"},
        timestamp="time",
    )


class _TextFormatter(logging.Formatter):
    """`12:00:01 message_processed outcome=sent message_type=OrderCreated ...`."""

    _plain = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime"}

    def format(self, record: logging.LogRecord) -> str:
        """Return one line: time, event, then every field that has a value."""
        extra = {name: value for name, value in vars(record).items() if name not in self._plain}
        shown = (f"{name}={value}" for name, value in extra.items() if value is not None)
        line = " ".join((self.formatTime(record, "%H:%M:%S"), record.getMessage(), *shown))
        return line if record.exc_info is None else f"{line}\n{self.formatException(record.exc_info)}"
