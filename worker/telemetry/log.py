"""The logger, its formats, and notices said once a minute."""

from __future__ import annotations

import logging
import sys
import time
from threading import Lock
from typing import TextIO

from pythonjsonlogger.json import JsonFormatter

log = logging.getLogger("klaviyo_worker")


REPEAT_INTERVAL = 60.0  # seconds between two lines that say the same


class ConditionLog:
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
            fields["duration_s"] = round(now - began)
            if reason and (self._since is None or now >= self._said_at + REPEAT_INTERVAL):
                self._since, self._said_at = began, now
                log.log(self._level, self._event, extra={"reason": reason, **fields})
            elif not reason and self._since is not None:
                self._since = None
                log.info(self._over, extra=fields)


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
    logging.lastResort = LibraryWarningHandler(logging.WARNING)


class LibraryWarningHandler(logging.Handler):
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
