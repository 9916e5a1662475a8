"""What a backfill shows while it works, and says at its end."""

from __future__ import annotations

import shutil
import time
from contextlib import contextmanager
from threading import Event, Lock, Thread
from typing import TYPE_CHECKING, TextIO

from worker.telemetry import log

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from worker.backfill.progress import Progress
    from worker.backfill.recorder import Recorder

REDRAWN_EVERY, LOGGED_EVERY = 0.5, 60.0  # seconds
_WIDTH = 24  # of the bar
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


class Pace:
    """How fast records end, since this was made. `total`: how many there are to end; None: nobody knows."""

    def __init__(self, recorder: Recorder, total: int | None) -> None:
        self._recorder = recorder
        self._before = recorder.ended
        self._began = time.monotonic()
        self.total = None if total is None else self._before + total

    @property
    def ended(self) -> int:
        """Count the records that have ended, those of earlier runs too."""
        return self._recorder.ended

    @property
    def seconds(self) -> float:
        """Return how long it has taken."""
        return time.monotonic() - self._began

    @property
    def rate(self) -> float:
        """Return the records per second of this run."""
        return (self.ended - self._before) / max(self.seconds, 0.001)

    @property
    def seconds_left(self) -> float | None:
        """Return how long it will take at this rate; None while nobody can tell."""
        return None if self.total is None or not self.rate else max(self.total - self.ended, 0) / self.rate


@contextmanager
def shown(name: str, pace: Pace, screen: Screen) -> Iterator[None]:
    """Show the pace while the block runs: as a bar on a terminal, else as a log line a minute."""
    is_over = Event()
    every, show = (
        (REDRAWN_EVERY, lambda: screen.draw(bar(name, pace)))
        if screen.isatty()
        else (LOGGED_EVERY, lambda: log.info("backfill_progress", extra=_fields(pace)))
    )
    thread = Thread(target=_repeat, args=(show, every, is_over), daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()
        if screen.isatty():
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
    return f"{line}  {pace.rate:,.0f}/s" + ("" if left is None else f"  {duration(left)} left")


def duration(seconds: float) -> str:
    """Return seconds for people: `42 s`, `3 min 20 s`, `2 h 5 min`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def summary(name: str, progress: Progress, pace: Pace) -> list[str]:
    """Return what was done, in all runs, and why records failed: the most frequent reasons first."""
    failed = progress.failed
    counts = f"{progress.sent:,} sent, {progress.nothing_to_do:,} with nothing to do, {failed.total():,} failed"
    pace_text = f"this run took {duration(pace.seconds)}, {pace.rate:,.0f} a second"
    reasons = [f"failed: {number:,} x {reason}" for reason, number in failed.most_common()]
    return [f"{name}: {progress.done:,} done: {counts}; {pace_text}", *reasons]
