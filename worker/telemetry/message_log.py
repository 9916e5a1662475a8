"""The canonical log line of each message. Its names are fixed, and it contains no personal data."""

from __future__ import annotations

import logging
import time
from collections import Counter
from contextlib import contextmanager
from datetime import UTC, datetime
from threading import Lock
from typing import TYPE_CHECKING, Any

from worker.budget import limit_paths
from worker.errors import Excluded, Ignored, JobUnfinished, NotShownYet, ReadingOutdated, StateChanged
from worker.model import Ending, OperationKind
from worker.telemetry.log import log
from worker.telemetry.recent_failures import RecentFailures

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from worker.model import Ended, Message
    from worker.telemetry.metrics import Metrics


_WAITS = (NotShownYet, ReadingOutdated, StateChanged, JobUnfinished)
_LEVELS = {Ending.RETRIED: logging.WARNING, Ending.DEAD_LETTERED: logging.ERROR}


class Telemetry:
    """Records what happens to messages: canonical log lines, counts, metrics and recent failures. Thread-safe."""

    def __init__(self, metrics: Metrics) -> None:
        self.endings: Counter[Ending] = Counter()
        self.metrics = metrics
        self.failures = RecentFailures()
        self._lock = Lock()

    def record_received(self, messages: int) -> None:
        """Count messages received from the queue."""
        if messages:
            self.metrics.record_received(messages)

    @contextmanager
    def time_stage(self, name: str) -> Iterator[None]:
        """Measure the time that a batch spends in a stage."""
        started_at = time.monotonic()
        yield
        self.metrics.record_stage(name, time.monotonic() - started_at)

    def record_processed(self, messages: Sequence[Message]) -> None:
        """Count a processed batch and its failed messages, including those that are held and retried.

        A message that only waits is no failure, but the status page shows why it waits.
        """
        self.metrics.record_batch(len(messages))
        for message in messages:
            outcome = message.outcome
            if outcome and outcome.cause and not isinstance(outcome.cause, Ignored):
                if not isinstance(outcome.cause, _WAITS):
                    self.metrics.record_failure(outcome.stage, outcome.error)
                if message.is_held:
                    self.failures.add(_canonical_fields(message, "held"))

    def on_endings(self, ended: Sequence[Ended]) -> None:
        """Log and count deliveries that have ended. Implements EndingListener."""
        with self._lock:
            self.endings.update(ending for _, ending in ended)
        for message, ending in ended:
            line = _canonical_fields(message, ending.value)
            self.metrics.record_settled(line["message_type"], ending.value, line["duration_s"], line["age_s"])
            if message.outcome and isinstance(message.outcome.cause, Excluded):
                self.metrics.record_excluded(message.outcome.cause.by)
            if ending is Ending.SENT:
                for gap in (gap for operation in message.operations for gap in operation.gaps):
                    self.metrics.record_gap(gap)
            if line["erased"] is not None and ending is Ending.SENT:
                self.metrics.record_erasure(line["erased"])
            level = _LEVELS.get(ending, logging.INFO)
            if level > logging.INFO:
                self.failures.add(line)
            log.log(level, "message_processed", extra=line)


def _canonical_fields(message: Message, outcome: str) -> dict[str, Any]:
    notification = message.notification
    delivery = message.delivery
    result = message.outcome
    age = (datetime.now(UTC) - delivery.published_at).total_seconds() if delivery.published_at else None
    return {
        "message_id": delivery.id,
        "message_type": notification.type if notification else None,
        "resource_type": notification.resource_type if notification else None,
        "resource_id": notification.resource_id if notification else None,
        "outcome": outcome,
        "reason": result.reason or None if result else None,
        "error": result.error or None if result else None,
        "stage": result.stage if result else None,
        "attempt": delivery.attempt,
        "duration_s": round(time.monotonic() - message.received_at, 4),
        "age_s": None if age is None else round(max(age, 0.0), 3),
        "operations": len(message.operations),
        "requests": message.requests,
        "erased": message.erased if _is_erasure(message) else None,
        "truncated": limit_paths(sorted({path for each in message.operations for path in each.truncated})) or None,
    }


def _is_erasure(message: Message) -> bool:
    return any(operation.kind is OperationKind.DELETE_PROFILE for operation in message.operations[:1])
