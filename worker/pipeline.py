"""The journey of a message: parse -> enrich -> transform -> send, then settle.

A message is acked only when its effect is in Klaviyo, or when there is nothing to do. Every other result is an error.
Its class determines what happens to the message: dead-letter, nack, or hold in memory and retry (worker/errors.py).
Each stage processes only the messages without an outcome, so a bad message never blocks the others of its batch.
"""

from __future__ import annotations

import time
import traceback
from collections import defaultdict
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from adapters.base import Failure
from worker.errors import Disposition, Ignored, Rejected, StaleWrite, WorkerError
from worker.model import Lease, Message, OperationKind, Outcome, SendResult
from worker.parse import parse
from worker.telemetry.log import log
from worker.transform import handler_for, transform

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from adapters.base import Delivery, QueueAdapter
    from worker.mapping import MappingConfig
    from worker.model import Enriched, Notification, Operation
    from worker.telemetry.message_log import Telemetry

FIRST_DELAY, MAX_DELAY = 2.0, 600.0  # seconds before a nacked message is redelivered
STALE_AFTER = 2.0  # seconds from reading commercetools to the effect in Klaviyo, after which it is read again
MIN_LEASE = 10.0  # seconds; assumed if the queue reports no lease: Pub/Sub's shortest ack deadline
_STATE_WRITES = frozenset(OperationKind) - {OperationKind.CREATE_EVENT, OperationKind.DELETE_PROFILE}
_PRECEDENCE = (Disposition.PARK, Disposition.HOLD, Disposition.NACK, Disposition.DEAD_LETTER)  # the first one wins


class Enrich(Protocol):
    """The enrich stage."""

    def __call__(self, notifications: Sequence[Notification]) -> Sequence[Enriched | WorkerError]:
        """Return the enriched notifications in order, with an error in place of each that could not be enriched."""


class Send(Protocol):
    """The send stage."""

    def __call__(self, operations: Sequence[Operation]) -> Sequence[SendResult]:
        """Carry out the operations and return their results in order."""


class Pipeline:
    """The stages between a delivery and its settlement. Thread-safe; keeps no state between batches."""

    def __init__(
        self, queue: QueueAdapter, enrich: Enrich, send: Send, mapping: MappingConfig, telemetry: Telemetry
    ) -> None:
        self._queue = queue
        self._enrich_all = enrich
        self._send_all = send
        self._mapping = mapping
        self._telemetry = telemetry

    def parse(self, delivery: Delivery) -> Message:
        """Parse a delivery. The runner calls this first, because the resource determines the message's lane."""
        now = time.monotonic()
        # Half of the lease: the queue's client may have buffered the message before `receive` returned it.
        lease = Lease(now + (self._queue.lease_seconds or MIN_LEASE) / 2)
        message = Message(delivery, received_at=now, lease=lease)
        with self._telemetry.time_stage("parse"):
            _run_pure_stage(message, "parse", partial(_parse, message, self._mapping))
        return message

    def process(self, messages: Sequence[Message]) -> list[Message]:
        """Take a batch through the stages and settle it. Return the messages to hold and process again."""
        for message in messages:
            if message.is_held:
                message.outcome = None
                message.operations = ()
        for name, stage in (("enrich", self._enrich), ("transform", self._transform), ("send", self._send)):
            with self._telemetry.time_stage(name):
                stage([message for message in messages if message.outcome is None])
        self._telemetry.record_processed(messages)
        self._settle([message for message in messages if not message.is_held])
        return [message for message in messages if message.is_held]

    def nack_held(self, messages: Sequence[Message], delay: float) -> None:
        """Nack messages that were held too long. The queue redelivers them after at least `delay` seconds."""
        for message in messages:
            assert message.outcome is not None
            delay_of_message = max(delay, _nack_delay(message))
            message.outcome = replace(message.outcome, disposition=Disposition.NACK, delay=delay_of_message)
        self._settle(messages)

    def _enrich(self, messages: Sequence[Message]) -> None:
        notifications = [message.notification for message in messages if message.notification is not None]
        try:
            results = self._enrich_all(notifications)
        except Exception as defect:  # noqa: BLE001 - a defect must not lose the batch
            results = [_report_defect("enrich", _describe(defect))] * len(messages)
        for message, result in zip(messages, results, strict=True):
            if isinstance(result, WorkerError):
                message.outcome = _failure_outcome(message, "enrich", result)
            else:
                message.enriched = result

    def _transform(self, messages: Sequence[Message]) -> None:
        for message in messages:
            _run_pure_stage(message, "transform", partial(_transform, message, self._mapping))

    def _send(self, messages: Sequence[Message]) -> None:
        operations = [operation for message in messages for operation in message.operations]
        were_sent_before = [message.events_possibly_sent for message in messages]
        for message in messages:
            message.last_sent = ()  # from here on, Klaviyo may no longer match the last recorded state
            message.events_possibly_sent = message.events_possibly_sent or _is_first_delivery_of_events(message)
        try:
            results = iter(self._send_all(operations))
        except Exception as defect:  # noqa: BLE001 - a defect must not lose the batch
            results = iter([SendResult(_report_defect("send", _describe(defect)), 0)] * len(operations))
        for message, was_sent_before in zip(messages, were_sent_before, strict=True):
            own_results = [next(results) for _ in message.operations]
            requests = sum(result.requests for result in own_results)
            message.requests += requests
            message.events_possibly_sent = was_sent_before or (message.events_possibly_sent and requests > 0)
            message.outcome = _send_outcome(message, [result.error for result in own_results if result.error])

    def _settle(self, messages: Sequence[Message]) -> None:
        """Settle with the queue. Ack last, so that a crash in between cannot lose a message to be redelivered."""
        nacked: dict[tuple[float, Failure], list[Delivery]] = defaultdict(list)
        acked: list[Delivery] = []
        for message in messages:
            assert message.outcome is not None
            failure = Failure(message.outcome.reason, message.outcome.stage, message.outcome.error)
            match message.outcome.disposition:
                case Disposition.ACK:
                    acked.append(message.delivery)
                case Disposition.NACK:
                    nacked[message.outcome.delay, failure].append(message.delivery)
                case Disposition.DEAD_LETTER:
                    if not self._queue.dead_letter(message.delivery, _with_message(failure, message.notification)):
                        message.outcome = replace(message.outcome, disposition=Disposition.NACK)
        for (delay, failure), deliveries in nacked.items():
            self._queue.nack(deliveries, delay, failure)
        if acked:
            self._queue.ack(acked)
        self._telemetry.record_settled(messages)


def _with_message(failure: Failure, notification: Notification | None) -> Failure:
    """Add the message's type and resource to the reason of a dead letter, if the message could be parsed."""
    if notification is None:
        return failure
    return replace(
        failure,
        message_type=notification.type,
        resource_type=notification.resource_type,
        resource_id=notification.resource_id,
    )


def _parse(message: Message, mapping: MappingConfig) -> None:
    message.notification = parse(message.delivery.body)
    handler_for(message.notification, mapping)  # raises Ignored here, before any data is fetched


def _transform(message: Message, mapping: MappingConfig) -> None:
    assert message.enriched is not None
    is_first = message.delivery.attempt == 1 and not message.events_possibly_sent
    message.operations = transform(message.enriched, mapping, message.lease.is_valid if is_first else None)
    if message.last_sent and message.operations == message.last_sent:
        message.outcome = Outcome(Disposition.ACK, "send")


def _send_outcome(message: Message, errors: Sequence[WorkerError]) -> Outcome:
    """Return the outcome of a message whose operations had these errors."""
    cause = min(errors, key=lambda error: _PRECEDENCE.index(error.disposition), default=None)
    if cause is None and not message.operations:  # never ack a message without an effect
        cause = _report_defect("send", "transform returned no operations and no reason; please report it")
    if cause is None and _is_stale(message):
        message.last_sent = message.operations
        cause = StaleWrite("written long after it was read: read it again")
    return Outcome(Disposition.ACK, "send") if cause is None else _failure_outcome(message, "send", cause)


def _is_stale(message: Message) -> bool:
    """Return whether another worker can have written a newer state first: bulk jobs and rate limits delay writes."""
    assert message.enriched is not None
    age = (datetime.now(UTC) - message.enriched.as_of).total_seconds()
    return age > STALE_AFTER and any(operation.kind in _STATE_WRITES for operation in message.operations)


def _is_first_delivery_of_events(message: Message) -> bool:
    """Return whether the next delivery could mistake events that this one sends for new."""
    return message.delivery.attempt == 1 and any(
        operation.kind is OperationKind.CREATE_EVENT for operation in message.operations
    )


def _run_pure_stage(message: Message, stage: str, work: Callable[[], None]) -> None:
    """Run a pure stage for one message. A retry would fail the same way, so an unexpected error dead-letters it."""
    try:
        work()
    except Ignored as reason:
        message.outcome = Outcome(Disposition.ACK, stage, reason)
    except WorkerError as error:
        message.outcome = _failure_outcome(message, stage, error)
    except Exception as error:  # noqa: BLE001 - hostile data must not stop the worker
        message.outcome = _failure_outcome(message, stage, Rejected(_describe(error)))


def _failure_outcome(message: Message, stage: str, error: WorkerError) -> Outcome:
    return Outcome(error.disposition, stage, error, _nack_delay(message))


def _nack_delay(message: Message) -> float:
    """Return the seconds before a nacked message is redelivered. They double with every attempt."""
    return min(FIRST_DELAY * 2.0 ** min((message.delivery.attempt or 1) - 1, 16), MAX_DELAY)


def _report_defect(stage: str, reason: str) -> WorkerError:
    """Log a defect of the worker and return it as a WorkerError, which nacks the message."""
    log.error("defect", extra={"stage": stage, "reason": reason})
    return WorkerError(reason)


def _describe(error: Exception) -> str:
    """Describe an unexpected error by class and source lines. Its text is left out: it can quote personal data."""
    frames = traceback.extract_tb(error.__traceback__)[-3:]
    places = " < ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in reversed(frames))
    return f"unexpected {type(error).__name__} at {places}; please report it"
