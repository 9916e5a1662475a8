"""Records the endings of a backfill's messages: progress, checkpoint and failure log."""

from __future__ import annotations

import time
from threading import RLock
from typing import TYPE_CHECKING

from adapters.base import Failure
from worker.commands.backfill.records import RecordDelivery
from worker.errors import kind_of
from worker.model import Ending
from worker.telemetry.log import log

if TYPE_CHECKING:
    from collections.abc import Sequence

    from worker.commands.backfill.checkpoint import BackfillProgress, Checkpoint, FailureLog
    from worker.commands.backfill.records import BackfillRecord
    from worker.model import Ended, Message

SAVE_INTERVAL = 2.0  # seconds


class BackfillRecorder:
    """Updates the progress, the checkpoint and the failure log. Implements EndingListener. Thread-safe."""

    def __init__(
        self,
        progress: BackfillProgress,
        resource_type: str,
        checkpoint: Checkpoint | None,
        failure_log: FailureLog | None,
    ) -> None:
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

    def on_endings(self, ended: Sequence[Ended]) -> None:
        """Record the endings. Save the checkpoint every SAVE_INTERVAL. Raises OSError."""
        with self._progress_lock:
            for message, ending in ended:
                self._record(message, ending)
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
            self._complete(record, failure=kind_of(failure.reason))

    def save(self) -> None:
        """Save the checkpoint. Raises OSError."""
        with self._progress_lock:
            self._saved_at = time.monotonic()
            if self._checkpoint:
                self._checkpoint.save(self.progress)

    def _record(self, message: Message, ending: Ending) -> None:
        """Record an ending. RecordQueue redelivers a nacked message, and the next run sends a returned one."""
        delivery, outcome = message.delivery, message.outcome
        assert isinstance(delivery, RecordDelivery)
        match ending:
            case Ending.SENT | Ending.IGNORED:
                self._complete(delivery.record, is_sent=ending is Ending.SENT)
            case Ending.DEAD_LETTERED:
                assert outcome is not None
                message_type = message.notification.type if message.notification else ""
                failure = Failure(outcome.reason, outcome.stage, outcome.error, message_type)
                self.record_failure(delivery.record, failure)

    def _complete(self, record: BackfillRecord, *, is_sent: bool = False, failure: str = "") -> None:
        self.progress.complete_message(record, is_sent=is_sent, failure=failure)
        if not record.pending:
            self.completed += 1
