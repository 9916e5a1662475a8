"""The outcomes of a backfill's records, which replace the worker's log line per message."""

from __future__ import annotations

import time
from threading import RLock
from typing import TYPE_CHECKING

from adapters.base import Failure
from worker.commands.backfill.records import RecordDelivery
from worker.telemetry.log import log
from worker.telemetry.message_log import Telemetry, outcome_name
from worker.telemetry.metrics import Metrics

if TYPE_CHECKING:
    from collections.abc import Iterable

    from worker.commands.backfill.checkpoint import BackfillProgress, Checkpoint, FailureLog
    from worker.commands.backfill.records import BackfillRecord
    from worker.model import Message

SAVE_INTERVAL = 2.0  # seconds


class BackfillTelemetry(Telemetry):
    """Updates the progress, the checkpoint and the failure log. Thread-safe."""

    def __init__(
        self,
        progress: BackfillProgress,
        resource_type: str,
        checkpoint: Checkpoint | None,
        failure_log: FailureLog | None,
    ) -> None:
        super().__init__(Metrics("backfill"))
        self.progress = progress
        self.completed = progress.done  # records with an outcome, including those that `progress` does not count yet
        self._resource_type = resource_type
        self._checkpoint = checkpoint
        self._failure_log = failure_log
        self._saved_at = time.monotonic()
        self._progress_lock = RLock()

    def start(self, record: BackfillRecord) -> None:
        """Register a record that is about to be sent."""
        with self._progress_lock:
            self.progress.start(record)

    def record_settled(self, messages: Iterable[Message]) -> None:
        """Record outcomes. Save the checkpoint every SAVE_INTERVAL. Raises OSError."""
        with self._progress_lock:
            for message in messages:
                self._record(message)
            if time.monotonic() - self._saved_at >= SAVE_INTERVAL:
                self.save()

    def record_failure(self, record: BackfillRecord, failure: Failure) -> None:
        """Record a failed message. The failure log is written first, because no later run repeats a counted record."""
        line = {
            "resource_type": self._resource_type,
            "resource_id": record.id,
            "message_type": failure.message_type or None,
            "reason": failure.reason,
            "stage": failure.stage,
        }
        with self._progress_lock:
            log.error("record_failed", extra=line)
            if self._failure_log:
                self._failure_log.add(line)
            self._complete(record, failure=failure.reason)

    def record_returned(self, messages: Iterable[Message]) -> None:
        """Do nothing: the next run sends messages that were given back."""

    def save(self) -> None:
        """Save the checkpoint. Raises OSError."""
        with self._progress_lock:
            self._saved_at = time.monotonic()
            if self._checkpoint:
                self._checkpoint.save(self.progress)

    def _record(self, message: Message) -> None:
        delivery, outcome = message.delivery, outcome_name(message)
        assert isinstance(delivery, RecordDelivery)
        if outcome == "dead_lettered":
            assert message.outcome is not None
            message_type = message.notification.type if message.notification else ""
            failure = Failure(message.outcome.reason, message.outcome.stage, message.outcome.error, message_type)
            self.record_failure(delivery.record, failure)
        elif outcome != "retried":
            self._complete(delivery.record, is_sent=outcome == "sent")

    def _complete(self, record: BackfillRecord, *, is_sent: bool = False, failure: str = "") -> None:
        self.progress.complete_message(record, is_sent=is_sent, failure=failure)
        if not record.pending:
            self.completed += 1
