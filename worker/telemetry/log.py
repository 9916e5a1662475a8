"""The logger, its formats, and the logging of conditions."""

from __future__ import annotations

import json
import logging
import sys
import time
from threading import Lock
from typing import Any, TextIO

from pythonjsonlogger.json import JsonFormatter

from worker.json_access import printable, shorten

log = logging.getLogger("klaviyo_worker")

REPEAT_INTERVAL = 60.0  # seconds between two log lines about a condition that lasts
MAX_VALUE = 2_000  # characters of a value
BURST = 60  # lines of one event in quick succession; after that, one per second
_PER_MESSAGE = frozenset({"message_processed", "record_failed", "attempts_exhausted", "identifier_dropped"})


class ConditionLog:
    """The log of a condition: `event` when it starts and once a minute while it lasts, `end_event` when it ends.

    Thread-safe.
    """

    def __init__(self, event: str, end_event: str, level: int) -> None:
        self._event = event
        self._end_event = end_event
        self._level = level
        self._since: float | None = None  # monotonic seconds; None if the condition does not hold
        self._logged_at = 0.0
        self._lock = Lock()

    def log(self, reason: str, **fields: object) -> None:
        """Log `reason`, at most once per REPEAT_INTERVAL. An empty reason means that the condition does not hold."""
        if not reason and self._since is None:  # nearly always the case; avoids the lock
            return
        now = time.monotonic()
        with self._lock:
            since = now if self._since is None else self._since
            fields["duration_s"] = round(now - since)
            if reason and (self._since is None or now >= self._logged_at + REPEAT_INTERVAL):
                self._since = since
                self._logged_at = now
                log.log(self._level, self._event, extra={"reason": reason, **fields})
            elif not reason and self._since is not None:
                self._since = None
                log.info(self._end_event, extra=fields)


def configure_logging(level: str, style: str, stream: TextIO | None = None) -> None:
    """Write log lines to `stream` (default: stderr). `style` is "json", "text", or "auto": text on a terminal.

    Only the worker's logger is configured, because debug lines of libraries contain tokens and bodies. Warnings of
    libraries are logged without their text.
    """
    stream = stream or sys.stderr
    handler = logging.StreamHandler(stream)
    as_text = style == "text" or (style == "auto" and stream.isatty())
    handler.setFormatter(_TextFormatter() if as_text else _json_formatter())
    handler.addFilter(_LineLimit())
    log.handlers = [handler]
    log.propagate = False
    log.setLevel(level)
    logging.lastResort = _LibraryWarningHandler(logging.WARNING)


class _LibraryWarningHandler(logging.Handler):
    """Logs warnings of libraries, without their text, because it can contain personal data."""

    def emit(self, record: logging.LogRecord) -> None:
        """Log a `library_warning` with the name of the library and the source line."""
        error = record.exc_info[0].__name__ if record.exc_info and record.exc_info[0] else None
        where = f"{record.filename}:{record.lineno}"
        log.log(record.levelno, "library_warning", extra={"library": record.name, "where": where, "error": error})


class _LineLimit(logging.Filter):
    """Limits the lines of each event, so that neither a client of an open port nor a library can fill a disk.

    Lines about messages are not limited: the queue limits them. After omitted lines, the next line of the same event
    has their number in its field `omitted`.
    """

    def __init__(self) -> None:
        super().__init__()
        self._lock = Lock()
        self._states: dict[str, tuple[float, int]] = {}  # of each event: when its burst is used up, omitted lines

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether the line is written."""
        event = str(record.msg)
        if event in _PER_MESSAGE:
            return True
        now = time.monotonic()
        with self._lock:
            used, omitted = self._states.get(event, (0.0, 0))
            used = max(used, now) + 1.0
            if used > now + BURST:
                self._states[event] = (used - 1.0, omitted + 1)
                return False
            self._states[event] = (used, 0)
        if omitted:
            record.omitted = omitted
        return True


class _JsonFormatter(JsonFormatter):
    """A formatter for lines like `{"event": "message_processed", "level": "INFO", "outcome": "sent", ...}`."""

    def process_log_record(self, log_data: dict[str, Any]) -> dict[str, Any]:
        """Return the fields with bounded values."""
        return {name: _bounded(value) for name, value in log_data.items()}


def _bounded(value: Any) -> Any:
    return shorten(value, MAX_VALUE) if isinstance(value, str) else value


def _json_formatter() -> JsonFormatter:
    return _JsonFormatter(
        ["message", "levelname"],
        rename_fields={"message": "event", "levelname": "level"},
        timestamp="time",
    )


class _TextFormatter(logging.Formatter):
    """A formatter for lines like `12:00:01 message_processed outcome=sent message_type=OrderCreated ...`."""

    _plain = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime"}

    def format(self, record: logging.LogRecord) -> str:
        """Return one line with the time, the event, and every field that has a value."""
        extra = {name: value for name, value in vars(record).items() if name not in self._plain}
        shown = (f"{name}={_quoted(value)}" for name, value in extra.items() if value is not None)
        return " ".join((self.formatTime(record, "%H:%M:%S"), record.getMessage(), *shown))


def _quoted(value: Any) -> str:
    """Return a value for a terminal: in quotes if it could be taken for several values, or can control the terminal."""
    text = str(_bounded(value))
    is_plain = text.isprintable() and not any(c in text for c in ' "=') and text != ""
    return text if is_plain else printable(json.dumps(text, ensure_ascii=False))
