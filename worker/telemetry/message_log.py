"""What the worker says of itself: one canonical line per message, fixed event names, no personal data."""

from __future__ import annotations

import logging
import sys
import time
from collections import Counter
from contextlib import contextmanager
from datetime import UTC, datetime
from threading import Lock
from typing import TYPE_CHECKING, Any, TextIO

from pythonjsonlogger.json import JsonFormatter

from worker.errors import Ignored, Outdated
from worker.model import Disposition, Job
from worker.telemetry.recent_failures import Failures

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from worker.telemetry.metrics import Metrics

log = logging.getLogger("klaviyo_worker")

_OUTCOMES = {
    Disposition.ACK: "sent",
    Disposition.NACK: "retried",
    Disposition.DEAD_LETTER: "dead_lettered",
}
_LEVELS = {"retried": logging.WARNING, "dead_lettered": logging.ERROR}


AT_MOST_EVERY = 60.0  # seconds between two lines that say the same


class Notice:
    """Says that something is the case: when it begins, once a minute while it lasts, and when it is over.

    Safe for many threads.
    """

    def __init__(self, event: str, over: str, level: int) -> None:
        self._event = event
        self._over = over
        self._level = level
        self._since: float | None = None  # monotonic seconds
        self._said_at = 0.0
        self._lock = Lock()

    def log(self, reason: str, **fields: object) -> None:
        """Log `reason`, unless that was done a moment ago; "": it is not, or no more, the case."""
        if not reason and self._since is None:  # as nearly always
            return
        now = time.monotonic()
        with self._lock:
            began = now if self._since is None else self._since
            fields["for_s"] = round(now - began)
            if reason and (self._since is None or now >= self._said_at + AT_MOST_EVERY):
                self._since, self._said_at = began, now
                log.log(self._level, self._event, extra={"reason": reason, **fields})
            elif not reason and self._since is not None:
                self._since = None
                log.info(self._over, extra=fields)


class Telemetry:
    """Counts outcomes, for the log and for Prometheus, remembers failures, and writes the canonical lines."""

    def __init__(self, metrics: Metrics) -> None:
        self.outcomes: Counter[str] = Counter()
        self.metrics = metrics
        self.failures = Failures()
        self._lock = Lock()

    def received(self, messages: int) -> None:
        """Count messages that came from the queue."""
        if messages:
            self.metrics.received(messages)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage."""
        began = time.monotonic()
        yield
        self.metrics.stage(name, time.monotonic() - began)

    def processed(self, jobs: Sequence[Job]) -> None:
        """Count a batch that went through the stages, and what failed in it, for good or for now."""
        self.metrics.batch(len(jobs))
        for job in jobs:
            if job.outcome and job.outcome.cause and not isinstance(job.outcome.cause, Ignored | Outdated):
                self.metrics.failed(job.outcome.stage, job.outcome.error)
                if job.is_kept:
                    self.failures.note(_canonical(job, "waiting"))

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
            line = _canonical(job, outcome)
            self.metrics.settled(line["message_type"], outcome, line["duration_s"], line["age_s"])
            if outcome in _LEVELS:
                self.failures.note(line)
            log.log(_LEVELS.get(outcome, logging.INFO), "message_processed", extra=line)


def outcome_name(job: Job) -> str:
    """Return the outcome of a settled job as logs name it: sent, ignored, retried, dead_lettered."""
    assert job.outcome is not None
    if job.outcome.disposition is Disposition.ACK and not job.operations:
        return "ignored"
    return _OUTCOMES[job.outcome.disposition]


def _canonical(job: Job, outcome: str) -> dict[str, Any]:
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
        "requests": job.requests,
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
