"""The progress of a backfill or a replay: a bar on a terminal, else a log line per minute.

`click.progressbar` shows neither a rate nor a bar below log lines, and needs a known total.
"""

from __future__ import annotations

import shutil
import time
from contextlib import contextmanager
from threading import Event, Lock, Thread
from typing import TYPE_CHECKING, TextIO

from worker.telemetry.log import log

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

REDRAW_INTERVAL, LOG_INTERVAL = 0.5, 60.0  # seconds
_WIDTH = 24  # characters between the brackets
_DECIMALS_BELOW = 10.0  # items per second
_CLEAR = "\r\033[K"


class StatusLine:
    """A text stream whose last line is a status. Other output appears above the status."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._status = ""
        self._lock = Lock()

    def write(self, text: str) -> int:
        """Write text above the status."""
        with self._lock:
            if self._status:
                self._stream.write(_CLEAR)
            written = self._stream.write(text)
            if text.endswith("\n"):
                self._stream.write(self._status)
            return written

    def draw(self, status: str) -> None:
        """Replace the status. Truncate it to the width of the terminal, because a wrapped line cannot be erased."""
        status = status[: shutil.get_terminal_size().columns - 1]
        with self._lock:
            self._stream.write(f"{_CLEAR if self._status else ''}{status}")
            self._status = status
            self._stream.flush()

    def flush(self) -> None:
        """Flush the stream."""
        self._stream.flush()

    def isatty(self) -> bool:
        """Return whether the stream is a terminal."""
        return self._stream.isatty()


class Rate:
    """The rate at which a run completes items, measured from the construction of this object.

    `count` returns the number of items done, including those of earlier runs. `remaining` is the number of items to do;
    None if unknown.
    """

    def __init__(self, count: Callable[[], int], remaining: int | None) -> None:
        self._count = count
        self._done_before = count()
        self._started_at = time.monotonic()
        self.total = None if remaining is None else self._done_before + remaining

    @property
    def done(self) -> int:
        """Return the number of items done, including those of earlier runs."""
        return self._count()

    @property
    def seconds(self) -> float:
        """Return how long this run has taken."""
        return time.monotonic() - self._started_at

    @property
    def per_second(self) -> float:
        """Return the items per second of this run."""
        return (self.done - self._done_before) / max(self.seconds, 0.001)

    @property
    def seconds_left(self) -> float | None:
        """Return the time left at this rate; None if unknown."""
        return None if self.total is None or not self.per_second else max(self.total - self.done, 0) / self.per_second


@contextmanager
def show_progress(name: str, rate: Rate, status_line: StatusLine) -> Iterator[None]:
    """Show progress while the block runs: a bar on a terminal, else a log line per minute."""
    if not status_line.isatty():
        with _repeat(lambda: log.info("backfill_progress", extra=_log_fields(rate)), LOG_INTERVAL):
            yield
        return
    status_line.draw(format_bar(name, rate))
    try:
        with _repeat(lambda: status_line.draw(format_bar(name, rate)), REDRAW_INTERVAL):
            yield
    finally:
        status_line.draw("")


@contextmanager
def _repeat(function: Callable[[], None], seconds: float) -> Iterator[None]:
    """Call a function at an interval, from a thread, while the block runs."""
    is_over = Event()

    def loop() -> None:
        while not is_over.wait(seconds):
            function()

    thread = Thread(target=loop, daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


def _log_fields(rate: Rate) -> dict[str, object]:
    left = rate.seconds_left
    return {
        "done": rate.done,
        "total": rate.total,
        "per_second": round(rate.per_second, 1),
        "left_s": None if left is None else round(left),
    }


def format_bar(name: str, rate: Rate) -> str:
    """Return the bar as text, or the bare count if the total is unknown."""
    text = f"{name} {rate.done:,}"
    if rate.total:
        share = min(rate.done / rate.total, 1.0)
        text = f"{name} [{'#' * round(share * _WIDTH):<{_WIDTH}}] {share:.0%}  {rate.done:,} of {rate.total:,}"
    decimals = 1 if rate.per_second < _DECIMALS_BELOW else 0
    left = rate.seconds_left
    return f"{text}  {rate.per_second:,.{decimals}f}/s" + ("" if left is None else f"  {format_duration(left)} left")


def format_duration(seconds: float) -> str:
    """Return a duration such as `42 s`, `3 min 20 s` or `2 h 5 min`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
