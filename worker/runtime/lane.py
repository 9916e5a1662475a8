"""A lane: one thread that handles the messages of its resources, in batches, and keeps those that have to wait."""

from __future__ import annotations

import time
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from threading import Thread
from typing import TYPE_CHECKING

from worker.errors import Disposition, Misconfigured, Transient
from worker.http.backoff import backoff, max_backoff

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from threading import Event

    from worker.model import Message
    from worker.pipeline import Pipeline
    from worker.runtime.in_flight import InFlight
    from worker.settings import Settings

NACK_DELAY_SHARE = 1 / 30  # of the hold; a message that was kept in vain stays away so long, at least


@dataclass(frozen=True, slots=True)
class LaneCallbacks:
    """What a lane tells the runner."""

    return_unprocessed: Callable[
        [Sequence[Message]], None
    ]  # return messages to the queue that the lane still has at its end
    fail: Callable[[Exception], None]  # end the run
    refused: Callable[[Misconfigured], None]  # a message waits because the worker is not allowed to work


class Lane(Thread):
    """Takes all that waits for it, up to a batch: an idle lane handles one message at once, a backlog makes batches.

    A message that cannot be handled now is kept and tried again, for `outage_hold` seconds, or for as long as the
    worker is not allowed to work. Others of its resource wait behind it; those of other resources pass.
    """

    def __init__(
        self, pipeline: Pipeline, in_flight: InFlight, settings: Settings, stopping: Event, ends: LaneCallbacks
    ) -> None:
        super().__init__(daemon=True)
        self._pipeline = pipeline
        self._in_flight = in_flight
        self._settings = settings
        self._stopping = stopping
        self._ends = ends
        self._max_backoff = max_backoff(settings.outage_hold)
        self._hold = settings.outage_hold + min(settings.outage_hold, self._max_backoff)  # a last try, for sure
        self._inbox: SimpleQueue[Message | None] = SimpleQueue()
        self._kept: list[Message] = []  # in the order they came
        self._ended = False
        self.batch_sizes = 0  # messages in the batch that is being handled

    def put(self, job: Message) -> None:
        """Have a job handled."""
        self._inbox.put(job)

    def end(self) -> None:
        """Have the lane end after what was put before."""
        self._inbox.put(None)

    def drain_inbox(self) -> list[Message]:
        """Return what was put and not begun."""
        return [job for job in _emptied(self._inbox) if job is not None]

    def run(self) -> None:
        """Work until the end; what has to wait then goes back to the queue."""
        while batch := self._next_batch():
            self.batch_sizes = len(batch)
            self._guarded(self._work, batch)
            self.batch_sizes = 0
        if self._kept:
            self._guarded(self._ends.return_unprocessed, self._kept)

    def _guarded(self, work: Callable[[Sequence[Message]], None], jobs: Sequence[Message]) -> None:
        try:
            work(jobs)
        except Exception as error:  # noqa: BLE001 - a lane that dies would stop its resources for ever
            self._ends.fail(error)

    def _next_batch(self) -> list[Message]:
        """Wait for jobs, new ones or kept ones whose time has come; [] at the end."""
        while not self._ended and not self._stopping.is_set():
            batch = self._due()
            self._add_arrived(batch)
            if self._stopping.is_set():
                self._kept = [*batch, *self._kept]
            elif batch:
                return batch
        return []

    def _due(self) -> list[Message]:
        """Take a batch out of what is kept: what is due, but nothing before an earlier job of its resource."""
        now = time.monotonic()
        due: list[Message] = []
        later: list[Message] = []
        held_up = set()
        for job in self._kept:
            if job.due_at <= now and job.key not in held_up and len(due) < self._settings.max_batch:
                due.append(job)
            else:
                later.append(job)
                held_up.add(job.key)
        self._kept = later
        return due

    def _add_arrived(self, batch: list[Message]) -> None:
        """Add what arrived to the batch, or to what is kept of its resource; wait for the first when there is none."""
        held_up = {job.key: job.due_at for job in reversed(self._kept)}  # the first of a resource counts
        wait = None if not held_up else max(min(held_up.values()) - time.monotonic(), 0.0)
        try:
            job = self._inbox.get_nowait() if batch else self._inbox.get(timeout=wait)
            while job is not None:
                if job.key in held_up:
                    job.due_at = held_up[job.key]
                    self._kept.append(job)
                    self._in_flight.keep([job])
                else:
                    batch.append(job)
                if len(batch) >= self._settings.max_batch:
                    return
                job = self._inbox.get_nowait()
            self._ended = True
        except Empty:
            return

    def _work(self, batch: Sequence[Message]) -> None:
        kept = self._pipeline.process(batch)
        self._in_flight.remove([job for job in batch if job not in kept])
        now = time.monotonic()
        for job in kept:
            job.retries += 1
            job.failed_at = 0.0 if _is_parked(job) else job.failed_at or now
        spent = [job for job in kept if self._hold_expired(job, now)]
        if spent and not self._stopping.is_set():
            self._pipeline.return_to_queue(spent, self._settings.outage_hold * NACK_DELAY_SHARE)
            self._in_flight.remove(spent)
            kept = [job for job in kept if job not in spent]
        self._keep(kept, now)

    def _hold_expired(self, job: Message, now: float) -> bool:
        """Tell whether a message was kept as long as it may be. One that is parked may be kept for ever."""
        is_held = job.outcome is not None and job.outcome.disposition is Disposition.HOLD
        return is_held and now - job.failed_at >= self._hold

    def _keep(self, jobs: Sequence[Message], now: float) -> None:
        refusals = []
        for job in jobs:
            cause = job.outcome.cause if job.outcome else None
            asked = cause.retry_after if isinstance(cause, Transient | Misconfigured) else None
            if isinstance(cause, Misconfigured):
                job.due_at = now + (asked or self._settings.park_retry_interval)
                refusals.append(cause)
            else:  # the last try is when the hold ends
                last = max(job.failed_at + self._hold, now)
                job.due_at = min(now + (asked or backoff(job.retries - 1, self._max_backoff)), last)
        self._kept = [*jobs, *self._kept]
        self._in_flight.keep(jobs)
        for refusal in refusals:  # told last: the runner sees then that the worker is parked
            self._ends.refused(refusal)


def _is_parked(job: Message) -> bool:
    """Tell whether a job waits for the worker's permission, which no hold bounds."""
    return job.outcome is not None and job.outcome.disposition is Disposition.PARK


def _emptied(inbox: SimpleQueue[Message | None]) -> Iterator[Message | None]:
    while True:
        try:
            yield inbox.get_nowait()
        except Empty:
            return
