"""What was received and is not settled: bounded by messages and bytes, and what of it has to wait."""

from __future__ import annotations

from datetime import UTC, datetime
from threading import Condition
from typing import TYPE_CHECKING

from worker.errors import CircuitOpen, Misconfigured

if TYPE_CHECKING:
    from collections.abc import Sequence

    from worker.model import Message


class InFlight:
    """The jobs of all lanes. Safe for many threads."""

    def __init__(self, max_messages: int, max_bytes: int) -> None:
        self._max_messages = max_messages
        self._max_bytes = max_bytes
        self._jobs: dict[int, Message] = {}
        self._kept: dict[int, Exception | None] = {}  # what each waits for
        self._bytes = 0
        self._changed = Condition()

    def __len__(self) -> int:
        return len(self._jobs)

    def jobs(self) -> list[Message]:
        """Return all jobs."""
        with self._changed:
            return list(self._jobs.values())

    def add(self, job: Message) -> None:
        """Note a job that was received."""
        with self._changed:
            self._jobs[id(job)] = job
            self._bytes += len(job.delivery.body)

    def remove(self, jobs: Sequence[Message]) -> None:
        """Forget jobs that were settled."""
        with self._changed:
            for job in jobs:
                self._kept.pop(id(job), None)
                if self._jobs.pop(id(job), None) is not None:
                    self._bytes -= len(job.delivery.body)
            self._changed.notify_all()

    def keep(self, jobs: Sequence[Message]) -> None:
        """Note jobs that have to wait, and for what."""
        with self._changed:
            self._kept |= {id(job): job.outcome.cause if job.outcome else None for job in jobs if id(job) in self._jobs}
            self._changed.notify_all()

    def wait_for_capacity(self, seconds: float) -> int:
        """Return how many messages may be received; wait for a change first when none."""
        with self._changed:
            if self._capacity() <= 0:
                self._changed.wait(seconds)
            return max(self._capacity(), 0)

    def wait_for_change(self, seconds: float) -> None:
        """Wait until something was settled or has to wait."""
        with self._changed:
            self._changed.wait(seconds)

    def wake(self) -> None:
        """End all waiting."""
        with self._changed:
            self._changed.notify_all()

    @property
    def held(self) -> int:
        """Count the jobs that have to wait."""
        return len(self._kept)

    def oldest_age(self) -> float | None:
        """Return how many seconds ago the oldest job's message was published: 0 without jobs, None if nobody tells."""
        jobs = self.jobs()
        published = [job.delivery.published_at for job in jobs if job.delivery.published_at is not None]
        if not published:
            return None if jobs else 0.0
        return max((datetime.now(UTC) - min(published)).total_seconds(), 0.0)  # clocks differ

    @property
    def is_idle(self) -> bool:
        """Tell whether no job can be worked on: there is none, or all have to wait."""
        return len(self._kept) >= len(self._jobs)

    @property
    def is_blocked(self) -> bool:
        """Tell whether there are jobs, and all have to wait while an outage lasts."""
        with self._changed:
            return self.is_idle and any(isinstance(cause, CircuitOpen) for cause in self._kept.values())

    def parked_reason(self) -> str:
        """Return what the worker is not allowed to do; "" when it may work."""
        with self._changed:
            return next((str(cause) for cause in self._kept.values() if isinstance(cause, Misconfigured)), "")

    def _capacity(self) -> int:
        return self._max_messages - len(self._jobs) if self._bytes < self._max_bytes else 0
