"""Notes how every record of a backfill ends, in place of the worker's log line per message."""

from __future__ import annotations

import time
from threading import RLock
from typing import TYPE_CHECKING

from adapters.base import Failure
from worker.commands.backfill.progress import RecordDelivery
from worker.telemetry.log import log
from worker.telemetry.message_log import Telemetry, outcome_name
from worker.telemetry.metrics import Metrics

if TYPE_CHECKING:
    from collections.abc import Iterable

    from worker.commands.backfill.checkpoint import Checkpoint, Failures
    from worker.commands.backfill.progress import Progress, Record
    from worker.model import Message

SAVE_EVERY = 2.0  # seconds


class Recorder(Telemetry):
    """Keeps progress, and the files it is written to, if any. Safe for many threads."""

    def __init__(
        self, progress: Progress, resource_type: str, checkpoint: Checkpoint | None, failures: Failures | None
    ) -> None:
        super().__init__(Metrics("backfill"))
        self.progress = progress
        self.ended = progress.done  # records, also those after one that has not ended
        self._resource_type = resource_type
        self._checkpoint = checkpoint
        self._failures = failures
        self._saved_at = time.monotonic()
        self._recording = RLock()

    def begin(self, record: Record) -> None:
        """Note a record that is about to be sent."""
        with self._recording:
            self.progress.begin(record)

    def settled(self, jobs: Iterable[Message]) -> None:
        """Note the messages that have ended, and in a while write it down. Raises OSError."""
        with self._recording:
            for job in jobs:
                self._note(job)
            if time.monotonic() - self._saved_at >= SAVE_EVERY:
                self.save()

    def failed(self, record: Record, failure: Failure) -> None:
        """Note a message that will never be sent, before the record counts: no later run comes back to it."""
        line = {
            "resource_type": self._resource_type,
            "resource_id": record.id,
            "message_type": failure.message_type or None,
            "reason": failure.reason,
            "stage": failure.stage,
        }
        with self._recording:
            log.error("record_failed", extra=line)
            if self._failures:
                self._failures.add(line)
            self._end(record, failure=failure.reason)

    def returned(self, jobs: Iterable[Message]) -> None:
        """Leave what was given back for the next run."""

    def save(self) -> None:
        """Write down how far all records have ended. Raises OSError."""
        with self._recording:
            self._saved_at = time.monotonic()
            if self._checkpoint:
                self._checkpoint.save(self.progress)

    def _note(self, job: Message) -> None:
        message, outcome = job.delivery, outcome_name(job)
        assert isinstance(message, RecordDelivery)
        if outcome == "dead_lettered":
            assert job.outcome is not None
            kind = job.notification.type if job.notification else ""
            self.failed(message.record, Failure(job.outcome.reason, job.outcome.stage, job.outcome.error, kind))
        elif outcome != "retried":
            self._end(message.record, is_sent=outcome == "sent")

    def _end(self, record: Record, *, is_sent: bool = False, failure: str = "") -> None:
        self.progress.end(record, is_sent=is_sent, failure=failure)
        self.ended += not record.left
