"""What backfills and replays show while they work."""

from __future__ import annotations

import shutil
import time
from contextlib import contextmanager
from threading import Event, Lock, Thread
from typing import TYPE_CHECKING, Protocol, TextIO

from worker.telemetry.log import log

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

REDRAWN_EVERY, LOGGED_EVERY = 0.5, 60.0  # seconds
_WIDTH = 24  # of the bar
_SLOW = 10.0  # a second, below which tenths tell something
_CLEAR = "\r\033[K"


class Screen:
    """A stream with a line at its end that is drawn anew: whatever else is written comes before it."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._line = ""
        self._lock = Lock()

    def write(self, text: str) -> int:
        """Write above the line."""
        with self._lock:
            if self._line:
                self._stream.write(_CLEAR)
            written = self._stream.write(text)
            if text.endswith("\n"):
                self._stream.write(self._line)
            return written

    def draw(self, line: str) -> None:
        """Replace the line, as much of it as one has room for: what wraps cannot be taken away. "": take it away."""
        line = line[: shutil.get_terminal_size().columns - 1]
        with self._lock:
            self._stream.write(f"{_CLEAR if self._line else ''}{line}")
            self._line = line
            self._stream.flush()

    def flush(self) -> None:
        """Flush the stream."""
        self._stream.flush()

    def isatty(self) -> bool:
        """Tell whether a person looks at it."""
        return self._stream.isatty()


class Counter(Protocol):
    """Counts what has ended, from any thread."""

    @property
    def ended(self) -> int:
        """Return how many records or letters."""


class Pace:
    """How fast they end, since this was made. `total`: how many there are to end; None: nobody knows."""

    def __init__(self, counter: Counter, total: int | None) -> None:
        self._counter = counter
        self._before = counter.ended
        self._began = time.monotonic()
        self.total = None if total is None else self._before + total

    @property
    def ended(self) -> int:
        """Count what has ended, in earlier runs too."""
        return self._counter.ended

    @property
    def seconds(self) -> float:
        """Return how long it has taken."""
        return time.monotonic() - self._began

    @property
    def rate(self) -> float:
        """Return how many a second in this run."""
        return (self.ended - self._before) / max(self.seconds, 0.001)

    @property
    def seconds_left(self) -> float | None:
        """Return how long it will take at this rate; None while nobody can tell."""
        return None if self.total is None or not self.rate else max(self.total - self.ended, 0) / self.rate


@contextmanager
def shown(name: str, pace: Pace, screen: Screen) -> Iterator[None]:
    """Show the pace while the block runs: as a bar on a terminal, else as a log line a minute."""

    def draw() -> None:
        screen.draw(bar(name, pace))

    def tell() -> None:
        log.info("backfill_progress", extra=_fields(pace))

    is_over, is_bar = Event(), screen.isatty()
    if is_bar:
        draw()
    show, every = (draw, REDRAWN_EVERY) if is_bar else (tell, LOGGED_EVERY)
    thread = Thread(target=_repeat, args=(show, every, is_over), daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()
        if is_bar:
            screen.draw("")


def _repeat(show: Callable[[], None], every: float, is_over: Event) -> None:
    while not is_over.wait(every):
        show()


def _fields(pace: Pace) -> dict[str, object]:
    left = pace.seconds_left
    return {
        "done": pace.ended,
        "total": pace.total,
        "per_second": round(pace.rate, 1),
        "left_s": None if left is None else round(left),
    }


def bar(name: str, pace: Pace) -> str:
    """Return the pace as a line."""
    line = f"{name} "
    if pace.total:
        share = min(pace.ended / pace.total, 1.0)
        line += f"[{'#' * round(share * _WIDTH):<{_WIDTH}}] {share:.0%}  {pace.ended:,} of {pace.total:,}"
    else:
        line += f"{pace.ended:,}"
    left = pace.seconds_left
    rate = f"{pace.rate:,.{int(pace.rate < _SLOW)}f}/s"
    return f"{line}  {rate}" + ("" if left is None else f"  {duration(left)} left")


def duration(seconds: float) -> str:
    """Return seconds for people: `42 s`, `3 min 20 s`, `2 h 5 min`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
