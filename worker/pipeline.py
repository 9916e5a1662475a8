"""The journey of a message: parse -> enrich -> transform -> send, then settle.

A message is acked only when its effect is in Klaviyo, or when there is nothing to do. Every other result is an error.
The class of the error determines what happens to the message: it is dead-lettered, nacked, or held in memory and
retried (worker/errors.py). Each stage processes only the messages without an outcome, so a bad message never blocks
the others of its batch.
"""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import replace
from functools import partial
from math import ceil
from typing import TYPE_CHECKING, Protocol

from adapters.base import Failure, Interruption
from worker.errors import (
    Disposition,
    Ignored,
    JobUnfinished,
    Rejected,
    RequestBlocked,
    StaleRead,
    StateChanged,
    Transient,
    WorkerError,
)
from worker.model import UNKNOWN_TIME, Ended, Ending, Message, OperationKind, Outcome, SendResult
from worker.parse import check_project, parse
from worker.telemetry.defects import describe_defect, report_defect
from worker.telemetry.log import log
from worker.transform import handler_for, transform
from worker.versions import check_reading

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from adapters.base import Delivery, QueueAdapter
    from worker.mapping import MappingConfig
    from worker.model import EndingListener, Enriched, Notification, Operation
    from worker.telemetry.message_log import Telemetry

FIRST_DELAY, MAX_DELAY = 2.0, 600.0  # seconds before a nacked message is redelivered
MAX_READINGS = 4  # of a state that changes while it is written, before its message is held
_STATE_WRITES = frozenset(OperationKind) - {
    OperationKind.CREATE_EVENT,
    OperationKind.UPSERT_GUEST,
    OperationKind.DELETE_PROFILE,
}
MAX_TIMES_BLOCKED = 5  # in a row; a message that is blocked that often is dead-lettered, after 15 s in total
_INTERRUPTED = Interruption("the worker stopped before a bulk job ended", "send", JobUnfinished.__name__)
# The first one wins.
_PRECEDENCE = (Disposition.PARK, Disposition.HOLD, Disposition.WAIT, Disposition.NACK, Disposition.DEAD_LETTER)


class Enrich(Protocol):
    """The enrich stage."""

    def __call__(self, notifications: Sequence[Notification]) -> Sequence[Enriched | WorkerError]:
        """Return the enriched notifications in order, with an error in place of each that could not be enriched."""


class Send(Protocol):
    """The send stage."""

    def __call__(self, operations: Sequence[Operation]) -> Sequence[SendResult]:
        """Send the operations and return their results in order."""


class Pipeline:
    """The stages between a delivery and its settlement. Thread-safe; keeps no state between batches.

    `listener` receives the endings; by default, `telemetry` does. `project` is the key of the commercetools project
    whose messages are processed. It is "" if the messages are not from a queue, but were created from the project.
    """

    def __init__(
        self,
        queue: QueueAdapter,
        enrich: Enrich,
        send: Send,
        mapping: MappingConfig,
        telemetry: Telemetry,
        listener: EndingListener | None = None,
        *,
        project: str = "",
    ) -> None:
        self._queue = queue
        self._enrich_all = enrich
        self._send_all = send
        self._mapping = mapping
        self._telemetry = telemetry
        self._listener: EndingListener = listener or telemetry
        self._project = project

    def parse(self, delivery: Delivery) -> Message:
        """Return the delivery as a parsed message. Its resource determines its lane."""
        message = Message(delivery, received_at=time.monotonic())
        if (delivery.attempt or 1) > 1:
            message.written_since = UNKNOWN_TIME
        with self._telemetry.time_stage("parse"):
            _run_pure_stage(message, "parse", partial(_parse, message, self._mapping, self._project))
        return message

    def process(self, messages: Sequence[Message]) -> list[Message]:
        """Process a batch in all stages and settle it. Return the messages that must be held and processed again.

        A state that was written is read again. If it has changed, this reading is the input of the next round.
        """
        _reset_held(messages)
        pending = [message for message in messages if message.outcome is None]
        for _ in range(MAX_READINGS):
            if pending:
                self._run_stages(pending)
            pending = [message for message in pending if message.outcome is None]
        for message in pending:
            changing = StateChanged("commercetools changed the state again while it was written")
            message.outcome = _failure_outcome(message, "send", changing)
        self._telemetry.record_processed(messages)
        self._settle([message for message in messages if not message.is_held])
        return [message for message in messages if message.is_held]

    def _run_stages(self, messages: Sequence[Message]) -> None:
        for name, stage in (("enrich", self._enrich), ("transform", self._transform), ("send", self._send)):
            with self._telemetry.time_stage(name):
                stage([message for message in messages if message.outcome is None])

    def nack_held(self, messages: Sequence[Message], delay: float) -> None:
        """Nack messages that were held too long. The queue redelivers them after at least `delay` seconds."""
        for message in messages:
            assert message.outcome is not None
            delay_of_message = max(delay, _nack_delay(message), message.not_before - time.monotonic())
            message.outcome = replace(message.outcome, disposition=Disposition.NACK, delay=delay_of_message)
        self._settle(messages)

    def give_back(self, messages: Sequence[Message], delay: float = 0.0) -> None:
        """Give messages back to the queue, which redelivers them after at least `delay` seconds. It is no failure.

        A lane can still be processing the messages. The queue redelivers a message of an unfinished bulk job only after
        the job. Its first delivery counts as an attempt, so that the next worker knows that a state was written.
        """
        grouped: dict[tuple[float, Failure | None], list[Delivery]] = defaultdict(list)
        now = time.monotonic()
        for message in messages:
            is_counted = message.not_before > now and message.delivery.attempt == 1
            delay_of_message = max(delay, ceil(message.not_before - now), 0)
            grouped[delay_of_message, _INTERRUPTED if is_counted else None].append(message.delivery)
        for (delay_of_messages, failure), deliveries in grouped.items():
            self._queue.nack(deliveries, delay_of_messages, failure)
        self._listener.on_endings([Ended(message, Ending.RETURNED) for message in messages])

    def _enrich(self, messages: Sequence[Message]) -> None:
        notifications = [_with_history(message.notification, message) for message in messages if message.notification]
        read_at = time.monotonic()
        try:
            results = self._enrich_all(notifications)
        except Exception as defect:  # noqa: BLE001 - a defect must not lose the batch
            results = [report_defect("enrich", describe_defect(defect))] * len(messages)
        for message, result in zip(messages, results, strict=True):
            if isinstance(result, WorkerError):
                message.outcome = _failure_outcome(message, "enrich", result)
            else:
                message.enriched = result
                _judge_reading(message, read_at)

    def _transform(self, messages: Sequence[Message]) -> None:
        for message in messages:
            _run_pure_stage(message, "transform", partial(_transform, message, self._mapping))

    def _send(self, messages: Sequence[Message]) -> None:
        operations = [operation for message in messages for operation in message.operations]
        for message in messages:
            message.written_versions = None  # this send can change Klaviyo even if it fails
        try:
            results = iter(self._send_all(operations))
        except Exception as defect:  # noqa: BLE001 - a defect must not lose the batch
            results = iter([SendResult(report_defect("send", describe_defect(defect)), 0)] * len(operations))
        for message in messages:
            own_results = [next(results) for _ in message.operations]
            message.requests += sum(result.requests for result in own_results)
            message.erased += sum(result.erased for result in own_results)
            if message.requests and message.enriched:
                as_of = message.enriched.as_of
                message.written_since = min(message.written_since or as_of, as_of)
            follow_ups = message.follow_ups.union(*(result.follow_ups for result in own_results))
            is_complete = follow_ups == message.follow_ups
            message.follow_ups = follow_ups
            errors = [result.error for result in own_results if result.error]
            _conclude_send(message, errors, is_complete=is_complete)

    def _settle(self, messages: Sequence[Message]) -> None:
        """Settle with the queue, failures first. If that raises an error, no message of the batch is acked."""
        nacked: dict[tuple[float, Failure], list[Delivery]] = defaultdict(list)
        acked: list[Message] = []
        for message in messages:
            assert message.outcome is not None
            message.is_returned = message.outcome.disposition is not Disposition.ACK
            failure = Failure(message.outcome.reason, message.outcome.stage, message.outcome.error)
            match message.outcome.disposition:
                case Disposition.ACK:
                    acked.append(message)
                case Disposition.NACK:
                    nacked[message.outcome.delay, failure].append(message.delivery)
                case Disposition.DEAD_LETTER:
                    if not self._queue.dead_letter(message.delivery, _with_message(failure, message.notification)):
                        message.outcome = replace(message.outcome, disposition=Disposition.NACK)
        for (delay, failure), deliveries in nacked.items():
            self._queue.nack(deliveries, delay, failure)
        self._ack(acked)
        self._listener.on_endings([Ended(message, _ending(message)) for message in messages])

    def _ack(self, messages: Sequence[Message]) -> None:
        """Ack messages. If the queue has redelivered one in the meantime, ack its new delivery, too."""
        while messages:
            deliveries = [message.delivery for message in messages]
            self._queue.ack(deliveries)
            messages = [
                message for message, acked in zip(messages, deliveries, strict=True) if message.delivery is not acked
            ]


def _with_history(notification: Notification, message: Message) -> Notification:
    """Return the notification with what earlier readings of its message found, and since when it has written."""
    seen = (*message.known_versions, *message.follow_ups)
    if not seen and message.written_since is None:
        return notification
    return replace(notification, seen=seen, written_since=message.written_since)


def _ending(message: Message) -> Ending:
    assert message.outcome is not None
    match message.outcome.disposition:
        case Disposition.ACK:
            # A lane forgets the operations of a held message.
            has_effect = message.operations or message.written_versions is not None
            return Ending.SENT if has_effect else Ending.IGNORED
        case Disposition.DEAD_LETTER:
            return Ending.DEAD_LETTERED
        case _:
            return Ending.RETRIED


def _with_message(failure: Failure, notification: Notification | None) -> Failure:
    """Return the failure with the type and resource of the message, if the message could be parsed."""
    if notification is None:
        return failure
    return replace(
        failure,
        message_type=notification.type,
        resource_type=notification.resource_type,
        resource_id=notification.resource_id,
    )


def _parse(message: Message, mapping: MappingConfig, project: str) -> None:
    """Parse the message. If this raises Ignored, no data is fetched."""
    message.notification = parse(message.delivery.body)
    if project:
        check_project(message.notification, project)
    handler_for(message.notification, mapping)


def _transform(message: Message, mapping: MappingConfig) -> None:
    assert message.enriched is not None
    message.operations = transform(message.enriched, mapping)


def _reset_held(messages: Sequence[Message]) -> None:
    """Let held messages be processed again, except those that a bulk job can still overwrite."""
    now = time.monotonic()
    for message in messages:
        if message.is_held and message.not_before <= now:
            message.outcome = None
            if message.written_versions is None:
                message.operations = ()


def _judge_reading(message: Message, read_at: float) -> None:
    """Set the outcome if the reading proves that the written state is current, or that the reading is stale."""
    assert message.enriched is not None
    try:
        check_reading(message, read_at)
    except Transient as error:
        message.outcome = _failure_outcome(message, "enrich", error)
        if isinstance(error, StaleRead) and not message.due_at:  # once per message
            kind, name = message.key
            log.warning("reading_stale", extra={"resource_type": kind, "resource_id": name, "reason": str(error)})
        return
    if message.written_versions is not None and message.written_versions == message.enriched.versions:
        message.outcome = Outcome(Disposition.ACK, "send")


def _conclude_send(message: Message, errors: Sequence[WorkerError], *, is_complete: bool) -> None:
    """Set the outcome of a message whose operations had these errors.

    A written state has no outcome yet: the next reading shows whether it is current. If it is not complete, the next
    round writes more.
    """
    assert message.enriched is not None
    if waits := [error.retry_after or 0.0 for error in errors if isinstance(error, JobUnfinished)]:
        message.not_before = time.monotonic() + max(waits)
    cause = min(errors, key=lambda error: _PRECEDENCE.index(error.disposition), default=None)
    if cause is None and not message.operations:  # never ack a message without an effect
        cause = report_defect("send", "transform returned no operations and no reason; please report it")
    if cause is not None:
        message.outcome = _failure_outcome(message, "send", cause)
    elif any(operation.kind in _STATE_WRITES for operation in message.operations):
        message.written_versions = message.enriched.versions if is_complete else None
    else:
        message.outcome = Outcome(Disposition.ACK, "send")


def _run_pure_stage(message: Message, stage: str, work: Callable[[], None]) -> None:
    """Run a pure stage for one message. An unexpected error dead-letters the message: a retry would fail again."""
    try:
        work()
    except Ignored as reason:
        message.outcome = Outcome(Disposition.ACK, stage, reason)
    except WorkerError as error:
        message.outcome = _failure_outcome(message, stage, error)
    except Exception as error:  # noqa: BLE001 - hostile data must not stop the worker
        message.outcome = _failure_outcome(message, stage, Rejected(describe_defect(error)))


def _failure_outcome(message: Message, stage: str, error: WorkerError) -> Outcome:
    message.times_blocked = message.times_blocked + 1 if isinstance(error, RequestBlocked) else 0
    if message.times_blocked == MAX_TIMES_BLOCKED:
        error = Rejected(f"{error.reason}, {MAX_TIMES_BLOCKED} times in a row")
    return Outcome(error.disposition, stage, error, _nack_delay(message))


def _nack_delay(message: Message) -> float:
    """Return the number of seconds before a nacked message is redelivered. It doubles with every attempt."""
    return min(FIRST_DELAY * 2.0 ** min((message.delivery.attempt or 1) - 1, 16), MAX_DELAY)
