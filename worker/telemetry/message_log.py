"""What the worker says of itself: one canonical line per message, fixed event names, no personal data."""

from __future__ import annotations

import logging
import time
from collections import Counter
from contextlib import contextmanager
from datetime import UTC, datetime
from threading import Lock
from typing import TYPE_CHECKING, Any

from worker.errors import Disposition, Ignored, StaleWrite
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
    """Counts outcomes, for the log and for Prometheus, remembers failures, and writes the canonical lines."""

    def __init__(self, metrics: Metrics) -> None:
        self.outcomes: Counter[str] = Counter()
        self.metrics = metrics
        self.failures = RecentFailures()
        self._lock = Lock()

    def record_received(self, messages: int) -> None:
        """Count messages that came from the queue."""
        if messages:
            self.metrics.record_received(messages)

    @contextmanager
    def time_stage(self, name: str) -> Iterator[None]:
        """Time a stage."""
        began = time.monotonic()
        yield
        self.metrics.record_stage(name, time.monotonic() - began)

    def record_processed(self, messages: Sequence[Message]) -> None:
        """Count a batch that went through the stages, and what failed in it, for good or for now."""
        self.metrics.record_batch(len(messages))
        for message in messages:
            if (
                message.outcome
                and message.outcome.cause
                and not isinstance(message.outcome.cause, Ignored | StaleWrite)
            ):
                self.metrics.record_failure(message.outcome.stage, message.outcome.error)
                if message.is_held:
                    self.failures.add(_canonical_fields(message, "waiting"))

    def record_settled(self, messages: Iterable[Message]) -> None:
        """Report deliveries that reached an ending."""
        self._report((message, outcome_name(message)) for message in messages)

    def record_returned(self, messages: Iterable[Message]) -> None:
        """Report deliveries that went back to the queue unhandled."""
        self._report((message, "returned") for message in messages)

    def _report(self, endings: Iterable[tuple[Message, str]]) -> None:
        for message, outcome in endings:
            with self._lock:
                self.outcomes[outcome] += 1
            line = _canonical_fields(message, outcome)
            self.metrics.record_settled(line["message_type"], outcome, line["duration_s"], line["age_s"])
            if outcome in _LEVELS:
                self.failures.add(line)
            log.log(_LEVELS.get(outcome, logging.INFO), "message_processed", extra=line)


def outcome_name(message: Message) -> str:
    """Return the outcome of a settled message as logs name it: sent, ignored, retried, dead_lettered."""
    assert message.outcome is not None
    if message.outcome.disposition is Disposition.ACK and not message.operations:
        return "ignored"
    return _OUTCOMES[message.outcome.disposition]


def _canonical_fields(message: Message, outcome: str) -> dict[str, Any]:
    notification, delivery, ending = message.notification, message.delivery, message.outcome
    published = delivery.published_at
    age = (datetime.now(UTC) - published).total_seconds() if published else None
    return {
        "message_id": delivery.id,
        "message_type": notification.type if notification else None,
        "resource_type": notification.resource_type if notification else None,
        "resource_id": notification.resource_id if notification else None,
        "outcome": outcome,
        "reason": ending.reason or None if ending else None,
        "error": ending.error or None if ending else None,
        "stage": ending.stage if ending else None,
        "attempt": delivery.attempt,
        "duration_s": round(time.monotonic() - message.received_at, 4),
        "age_s": None if age is None else round(max(age, 0.0), 3),
        "operations": len(message.operations),
        "requests": message.requests,
        "truncated": sorted({path for operation in message.operations for path in operation.truncated}) or None,
    }
