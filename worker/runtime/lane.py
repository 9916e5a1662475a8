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


@dataclass(frozen=True, slots=True)
class LaneCallbacks:
    """The functions of the runner that a lane calls."""

    return_unprocessed: Callable[[Sequence[Message]], None]  # called with the messages that are held when the lane ends
    fail: Callable[[Exception], None]  # called with an unexpected error, which ends the run
    report_refusal: Callable[[Misconfigured], None]  # called for each failure that parks the worker


class Lane(Thread):
    """A thread that processes all messages in its inbox as one batch, up to `max_batch` messages.

    An idle lane therefore processes a message immediately, and a busy lane processes large batches.

    A message that cannot be processed now is held and retried for `outage_hold` seconds. If its failure parks the
    worker, there is no time limit. Later messages of the same resource are held behind it. Messages of other resources
    are processed in the meantime.
    """

    def __init__(
        self, pipeline: Pipeline, in_flight: InFlight, settings: Settings, stopping: Event, callbacks: LaneCallbacks
    ) -> None:
        super().__init__(daemon=True)
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

    def run(self) -> None:
        """Process batches until the lane ends, then give the held messages back to the queue."""
        while batch := self._next_batch():
            self.batch_size = len(batch)
            self._run_guarded(self._process, batch)
            self.batch_size = 0
        if self._held:
            self._run_guarded(self._callbacks.return_unprocessed, self._held)

    def _run_guarded(self, work: Callable[[Sequence[Message]], None], messages: Sequence[Message]) -> None:
        try:
            work(messages)
        except Exception as error:  # noqa: BLE001 - if this thread ended, its messages would never be processed
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
                    self._in_flight.hold([message])
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
        unsettled = self._pipeline.process(batch)
        self._in_flight.remove([message for message in batch if message not in unsettled])
        now = time.monotonic()
        for message in unsettled:
            message.retries += 1
            message.failed_at = 0.0 if _parks_worker(message) else message.failed_at or now
        expired = [message for message in unsettled if self._is_hold_expired(message, now)]
        if expired and not self._stopping.is_set():
            self._pipeline.nack_held(expired, self._settings.outage_hold * NACK_DELAY_SHARE)
            self._in_flight.remove(expired)
            unsettled = [message for message in unsettled if message not in expired]
        self._hold(unsettled, now)

    def _is_hold_expired(self, message: Message, now: float) -> bool:
        """Return whether the hold of a message has expired. It never does if the failure parks the worker."""
        is_on_hold = message.outcome is not None and message.outcome.disposition is Disposition.HOLD
        return is_on_hold and now - message.failed_at >= self._hold_seconds

    def _hold(self, messages: Sequence[Message], now: float) -> None:
        """Hold messages until their next retry. Report the failures that park the worker."""
        refusals = []
        for message in messages:
            cause = message.outcome.cause if message.outcome else None
            retry_after = cause.retry_after if isinstance(cause, Transient | Misconfigured) else None
            if isinstance(cause, Misconfigured):
                message.due_at = now + (retry_after or self._settings.park_retry_interval)
                refusals.append(cause)
            else:
                last_retry_at = max(message.failed_at + self._hold_seconds, now)
                wait = retry_after or backoff(message.retries - 1, self._max_backoff)
                message.due_at = min(now + wait, last_retry_at)
        self._held = [*messages, *self._held]
        self._in_flight.hold(messages)
        for refusal in refusals:  # only after `hold`: the runner then knows that the worker is parked
            self._callbacks.report_refusal(refusal)


def _parks_worker(message: Message) -> bool:
    return message.outcome is not None and message.outcome.disposition is Disposition.PARK


def _drain(inbox: SimpleQueue[Message | None]) -> Iterator[Message | None]:
    while True:
        try:
            yield inbox.get_nowait()
        except Empty:
            return
