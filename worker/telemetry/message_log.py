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
from worker.errors import Disposition, Ignored
from worker.telemetry.log import log
from worker.telemetry.recent_failures import RecentFailures

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from worker.model import Message
    from worker.telemetry.metrics import Metrics


_OUTCOMES = {
    Disposition.ACK: "sent",
    Disposition.NACK: "retried",
    Disposition.DEAD_LETTER: "dead_lettered",
}
_LEVELS = {"retried": logging.WARNING, "dead_lettered": logging.ERROR}


class Telemetry:
    """Records the outcomes of messages: as canonical log lines, counts, metrics and recent failures. Thread-safe."""

    def __init__(self, metrics: Metrics) -> None:
        self.outcomes: Counter[str] = Counter()
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
        """Count a processed batch and its failed messages, including those that are held and retried."""
        self.metrics.record_batch(len(messages))
        for message in messages:
            outcome = message.outcome
            if outcome and outcome.cause and not isinstance(outcome.cause, Ignored):
                self.metrics.record_failure(outcome.stage, outcome.error)
                if message.is_held:
                    self.failures.add(_canonical_fields(message, "held"))

    def record_settled(self, messages: Iterable[Message]) -> None:
        """Log and count messages that were settled."""
        self._record_outcomes((message, outcome_name(message)) for message in messages)

    def record_returned(self, messages: Iterable[Message]) -> None:
        """Log and count messages that were given back to the queue unprocessed."""
        self._record_outcomes((message, "returned") for message in messages)

    def _record_outcomes(self, outcomes: Iterable[tuple[Message, str]]) -> None:
        for message, outcome in outcomes:
            with self._lock:
                self.outcomes[outcome] += 1
            line = _canonical_fields(message, outcome)
            self.metrics.record_settled(line["message_type"], outcome, line["duration_s"], line["age_s"])
            if outcome in _LEVELS:
                self.failures.add(line)
            log.log(_LEVELS.get(outcome, logging.INFO), "message_processed", extra=line)


def outcome_name(message: Message) -> str:
    """Return the outcome of a settled message for the log: sent, ignored, retried or dead_lettered.

    `retried` means that the message was nacked after a failure.
    """
    assert message.outcome is not None
    has_effect = message.operations or message.written_versions is not None
    if message.outcome.disposition is Disposition.ACK and not has_effect:
        return "ignored"
    return _OUTCOMES[message.outcome.disposition]


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
        "truncated": limit_paths(sorted({path for each in message.operations for path in each.truncated})) or None,
    }
