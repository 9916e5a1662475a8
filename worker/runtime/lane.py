"""A lane: a thread that processes the messages of its resources in order, and holds those that must be retried."""

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

# The share of `outage_hold` that is the minimum delay before the redelivery of a message whose hold expired.
NACK_DELAY_SHARE = 1 / 30
# A lane counts as stalled if a batch takes longer than STALL_TIMEOUT, plus `job_timeout` for a bulk job, plus
# STALL_PER_MESSAGE for each of its messages. Requests end within five minutes. The slowest rate limit is 60 requests
# per minute, so a message can take 15 s if a worker uses a fifteenth of it.
STALL_TIMEOUT, STALL_PER_MESSAGE = 600.0, 15.0  # seconds

SUSPECT_ATTEMPT = 3  # from this delivery on, a message possibly ended the workers that received it before


@dataclass(frozen=True, slots=True)
class LaneCallbacks:
    """The functions of the runner that a lane calls."""

    return_unprocessed: Callable[[Sequence[Message]], None]  # called with the messages that are held when the lane ends
    fail: Callable[[Exception], None]  # called with an unexpected error, which ends the run
    report_refusal: Callable[[Misconfigured], None]  # called for each failure that parks the worker


class Lane(Thread):
    """A thread that processes all messages in its inbox as one batch, up to `max_batch` messages.

    An idle lane therefore processes a message immediately, and a busy lane processes large batches.

    A message that cannot be processed now is held and retried: for `outage_hold` seconds in an outage, without a time
    limit if it only waits. Later messages of the same resource are held behind it. Messages of other resources are
    processed in the meantime.

    A message that possibly ended earlier workers is processed alone, after the others of its batch.
    """

    def __init__(
        self,
        name: str,
        pipeline: Pipeline,
        in_flight: InFlight,
        settings: Settings,
        stopping: Event,
        callbacks: LaneCallbacks,
    ) -> None:
        super().__init__(name=name, daemon=True)
        self._pipeline = pipeline
        self._in_flight = in_flight
        self._settings = settings
        self._stopping = stopping
        self._callbacks = callbacks
        self._max_backoff = max_backoff(settings.outage_hold)
        # One backoff longer than `outage_hold`, so that the last retry is never before the end of `outage_hold`.
        self._hold_seconds = settings.outage_hold + min(settings.outage_hold, self._max_backoff)
        self._inbox: SimpleQueue[Message | None] = SimpleQueue()  # None ends the lane
        self._held: list[Message] = []  # in order of arrival
        self._ended = False
        self._busy_since = 0.0  # monotonic seconds
        self.batch_size = 0  # messages in the current batch

    def put(self, message: Message) -> None:
        """Put a message into the inbox."""
        self._inbox.put(message)

    def end(self) -> None:
        """End the lane after it has processed its inbox."""
        self._inbox.put(None)

    def drain_inbox(self) -> list[Message]:
        """Empty the inbox and return its messages."""
        return [message for message in _drain(self._inbox) if message is not None]

    def stall_reason(self, now: float) -> str:
        """Return why the lane has stopped working, or "" if it works. `now` is in monotonic seconds."""
        if self.ident is not None and not self.is_alive():
            return f"{self.name} has ended"
        size, seconds = self.batch_size, now - self._busy_since
        is_late = size and seconds > STALL_TIMEOUT + self._settings.job_timeout + STALL_PER_MESSAGE * size
        return f"{self.name} has processed a batch for {seconds / 60:.0f} minutes" if is_late else ""

    def run(self) -> None:
        """Process batches until the lane ends, then give the held messages back to the queue."""
        try:
            while batch := self._next_batch():
                for part in isolate_suspects(batch):
                    self._process_unless_stopping(part)
        except Exception as error:  # noqa: BLE001 - `fail` ends the run, which returns the messages of this lane
            self._callbacks.fail(error)
        if self._held:
            self._return_held()

    def _process_unless_stopping(self, batch: list[Message]) -> None:
        if self._stopping.is_set():
            self._held += batch
            return
        self._busy_since = time.monotonic()
        self.batch_size = len(batch)
        try:
            self._process(batch)
        finally:
            self.batch_size = 0

    def _return_held(self) -> None:
        try:
            self._callbacks.return_unprocessed(self._held)
        except Exception as error:  # noqa: BLE001 - `run` of the runner raises it
            self._callbacks.fail(error)

    def _next_batch(self) -> list[Message]:
        """Return the next batch of new and held messages; [] if the lane ends. Wait for a message if necessary."""
        while not self._ended and not self._stopping.is_set():
            batch = self._take_due()
            self._add_arrived(batch)
            if self._stopping.is_set():
                self._held = [*batch, *self._held]
            elif batch:
                return batch
        return []

    def _take_due(self) -> list[Message]:
        """Take up to `max_batch` held messages that are due. Skip those whose resource has an earlier held message."""
        now = time.monotonic()
        due: list[Message] = []
        later: list[Message] = []
        blocked_keys = set()
        for message in self._held:
            if message.due_at <= now and message.key not in blocked_keys and len(due) < self._settings.max_batch:
                due.append(message)
            else:
                later.append(message)
                blocked_keys.add(message.key)
        self._held = later
        return due

    def _add_arrived(self, batch: list[Message]) -> None:
        """Add the messages in the inbox to the batch, or hold them if an earlier message of their resource is held.

        If the batch is empty, wait until a message arrives or a held message becomes due.
        """
        due_at = {message.key: message.due_at for message in reversed(self._held)}  # of the first held message
        wait = max(min(due_at.values()) - time.monotonic(), 0.0) if due_at else None
        try:
            message = self._inbox.get_nowait() if batch else self._inbox.get(timeout=wait)
            while message is not None:
                if message.key in due_at:
                    message.due_at = due_at[message.key]
                    self._held.append(message)
                else:
                    batch.append(message)
                if len(batch) >= self._settings.max_batch:
                    return
                message = self._inbox.get_nowait()
            self._ended = True
        except Empty:
            return

    def _process(self, batch: Sequence[Message]) -> None:
        """Process a batch in the pipeline. Hold the messages to retry, and nack those whose hold has expired."""
        held = self._pipeline.process(batch)
        settled = set(batch).difference(held)
        self._in_flight.remove([message for message in batch if message in settled])
        now = time.monotonic()
        expired: list[Message] = []
        retried: list[Message] = []
        for message in held:
            message.retries += 1
            message.failed_at = (message.failed_at or now) if _has_time_limit(message) else 0.0
            (expired if self._is_hold_expired(message, now) else retried).append(message)
        if expired:
            self._pipeline.nack_held(expired, self._settings.outage_hold * NACK_DELAY_SHARE)
            self._in_flight.remove(expired)
        self._hold(retried, now)

    def _is_hold_expired(self, message: Message, now: float) -> bool:
        """Return whether the hold of a message has expired. A stopping worker returns its messages without a nack."""
        is_limited = _has_time_limit(message) and not self._stopping.is_set()
        return is_limited and now - message.failed_at >= self._hold_seconds

    def _hold(self, messages: Sequence[Message], now: float) -> None:
        """Hold messages until their next retry. Report the failures that park the worker."""
        for message in messages:
            message.due_at = now + self._retry_delay(message, now)
            message.enriched = None  # read again before the retry
            if message.written_versions is None:
                message.operations = ()
        self._held = [*messages, *self._held]
        for message in messages:
            if message.outcome and isinstance(message.outcome.cause, Misconfigured):
                self._callbacks.report_refusal(message.outcome.cause)

    def _retry_delay(self, message: Message, now: float) -> float:
        """Return the seconds until the next retry. The last retry of a limited hold is at its end."""
        cause = message.outcome.cause if message.outcome else None
        retry_after = cause.retry_after if isinstance(cause, Transient | Misconfigured) else None
        if isinstance(cause, Misconfigured):
            return retry_after or self._settings.park_retry_interval
        delay = retry_after or backoff(message.retries - 1, self._max_backoff)
        if not _has_time_limit(message):
            return delay
        return min(delay, max(message.failed_at + self._hold_seconds - now, 0.0))


def isolate_suspects(batch: Sequence[Message]) -> list[list[Message]]:
    """Split a batch: first the messages of all other resources together, then those of each suspect's resource.

    A suspect is a message at its SUSPECT_ATTEMPT-th delivery or later: nothing settled it before, possibly because it
    ended its workers. Messages of one resource stay together, so their order does not change. If the queue counts no
    attempts, there are no suspects.
    """
    alone: dict[tuple[str, str], list[Message]] = {
        message.key: [] for message in batch if (message.delivery.attempt or 1) >= SUSPECT_ATTEMPT
    }
    others: list[Message] = []
    for message in batch:
        alone.get(message.key, others).append(message)
    return [part for part in (others, *alone.values()) if part]


def _has_time_limit(message: Message) -> bool:
    return message.outcome is not None and message.outcome.disposition is Disposition.HOLD


def _drain(inbox: SimpleQueue[Message | None]) -> Iterator[Message | None]:
    while True:
        try:
            yield inbox.get_nowait()
        except Empty:
            return
