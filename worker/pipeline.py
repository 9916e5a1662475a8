"""The journey of a message: parse -> enrich -> transform -> send, then settle.

A delivery is acked only when its effect is in Klaviyo or there is nothing to do. Everything else is an error
that says what becomes of the message (worker/errors.py): dead letter, nack, or kept and tried again. Stages see
only jobs still without an outcome, so one bad message never stops its neighbours.
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

FIRST_DELAY, MAX_DELAY = 2.0, 600.0  # seconds before a nacked message comes again
STALE_AFTER = 2.0  # seconds from reading commercetools to the effect in Klaviyo; it is read again then
MIN_LEASE = 10.0  # seconds, where nothing can extend it: Pub/Sub's shortest ack deadline
_STATE_WRITES = frozenset(OperationKind) - {OperationKind.CREATE_EVENT, OperationKind.DELETE_PROFILE}
_SEVERITY = (Disposition.PARK, Disposition.HOLD, Disposition.NACK, Disposition.DEAD_LETTER)


class Enrich(Protocol):
    """The enrich stage."""

    def __call__(self, notifications: Sequence[Notification]) -> Sequence[Enriched | WorkerError]:
        """Return every notification with its data, or why it cannot be had, in their order."""


class Send(Protocol):
    """The send stage."""

    def __call__(self, operations: Sequence[Operation]) -> Sequence[SendResult]:
        """Carry out the operations; return what became of each, in their order."""


class Pipeline:
    """Takes deliveries through the stages. Safe for many threads; keeps nothing between batches."""

    def __init__(
        self, queue: QueueAdapter, enrich: Enrich, send: Send, mapping: MappingConfig, telemetry: Telemetry
    ) -> None:
        self._queue = queue
        self._enrich_all = enrich
        self._send_all = send
        self._mapping = mapping
        self._telemetry = telemetry

    def accept(self, delivery: Delivery) -> Message:
        """Parse a delivery. Done before lanes are chosen, as the lane depends on the resource."""
        now = time.monotonic()
        # Half: the client may have held the message for a while before it was received.
        job = Message(delivery, received_at=now, lease=Lease(now + (self._queue.lease_seconds or MIN_LEASE) / 2))
        with self._telemetry.stage("parse"):
            _guarded(job, "parse", partial(_parse, job, self._mapping))
        return job

    def process(self, jobs: Sequence[Message]) -> list[Message]:
        """Take a batch through the stages and settle it; return the jobs to be kept and processed again."""
        for job in jobs:
            if job.is_held:
                job.outcome, job.operations = None, ()
        for name, stage in (("enrich", self._enrich), ("transform", self._transform), ("send", self._send)):
            with self._telemetry.stage(name):
                stage([job for job in jobs if job.outcome is None])
        self._telemetry.processed(jobs)
        self._settle([job for job in jobs if not job.is_held])
        return [job for job in jobs if job.is_held]

    def return_to_queue(self, jobs: Sequence[Message], delay: float) -> None:
        """Return kept jobs to the queue, for `delay` seconds at least: what they waited for takes too long."""
        for job in jobs:
            assert job.outcome is not None
            job.outcome = replace(job.outcome, disposition=Disposition.NACK, delay=max(delay, _delay(job)))
        self._settle(jobs)

    def _enrich(self, jobs: Sequence[Message]) -> None:
        notifications = [job.notification for job in jobs if job.notification is not None]
        try:
            results = self._enrich_all(notifications)
        except Exception as defect:  # noqa: BLE001 - a defect of ours must not lose the batch
            results = [_defect("enrich", defect)] * len(jobs)
        for job, result in zip(jobs, results, strict=True):
            if isinstance(result, WorkerError):
                job.outcome = _failed(job, "enrich", result)
            else:
                job.enriched = result

    def _transform(self, jobs: Sequence[Message]) -> None:
        for job in jobs:
            _guarded(job, "transform", partial(_transform, job, self._mapping))

    def _send(self, jobs: Sequence[Message]) -> None:
        operations = [operation for job in jobs for operation in job.operations]
        begun = [job.events_may_be_sent for job in jobs]
        for job in jobs:
            job.last_sent = ()  # from now on, no longer what Klaviyo has for sure
            job.events_may_be_sent = job.events_may_be_sent or _sends_events_first(job)
        try:
            results = iter(self._send_all(operations))
        except Exception as defect:  # noqa: BLE001 - a defect of ours must not lose the batch
            results = iter([SendResult(_defect("send", defect), 0)] * len(operations))
        for job, was_begun in zip(jobs, begun, strict=True):
            sent = [next(results) for _ in job.operations]
            job.requests += sum(each.requests for each in sent)
            job.events_may_be_sent = was_begun or (job.events_may_be_sent and any(each.requests for each in sent))
            job.outcome = _outcome_of(job, [each.error for each in sent if each.error is not None])

    def _settle(self, jobs: Sequence[Message]) -> None:
        """Tell the queue. Acks come last: what must come again is safe before what is done is forgotten."""
        retried: dict[tuple[float, Failure], list[Delivery]] = defaultdict(list)
        acked: list[Delivery] = []
        for job in jobs:
            assert job.outcome is not None
            failure = Failure(job.outcome.reason, job.outcome.stage, job.outcome.error)
            match job.outcome.disposition:
                case Disposition.ACK:
                    acked.append(job.delivery)
                case Disposition.NACK:
                    retried[job.outcome.delay, failure].append(job.delivery)
                case Disposition.DEAD_LETTER:
                    if not self._queue.dead_letter(job.delivery, _with_message(failure, job.notification)):
                        job.outcome = replace(job.outcome, disposition=Disposition.NACK)
        for (delay, failure), deliveries in retried.items():
            self._queue.nack(deliveries, delay, failure)
        if acked:
            self._queue.ack(acked)
        self._telemetry.settled(jobs)


def _with_message(failure: Failure, about: Notification | None) -> Failure:
    """Add to a dead letter's reason what message it is, as far as it could be read."""
    if about is None:
        return failure
    return replace(failure, message_type=about.type, resource_type=about.resource_type, resource_id=about.resource_id)


def _parse(job: Message, mapping: MappingConfig) -> None:
    job.notification = parse(job.delivery.body)
    handler_for(job.notification, mapping)  # raises Ignored, so that nothing is fetched in vain


def _transform(job: Message, mapping: MappingConfig) -> None:
    assert job.enriched is not None
    is_first = job.delivery.attempt == 1 and not job.events_may_be_sent
    job.operations = transform(job.enriched, mapping, job.lease.is_valid if is_first else None)
    if job.last_sent and job.operations == job.last_sent:
        job.outcome = Outcome(Disposition.ACK, "send")


def _outcome_of(job: Message, errors: Sequence[WorkerError]) -> Outcome:
    """Return how a job ends whose operations were carried out, or not."""
    worst = min(errors, key=lambda error: _SEVERITY.index(error.disposition), default=None)
    if worst is None and not job.operations:  # never ack what nothing was done for
        worst = _defect("send", AssertionError())
    if worst is None and _is_stale(job):
        job.last_sent = job.operations
        worst = StaleWrite("written long after it was read: read again")
    return Outcome(Disposition.ACK, "send") if worst is None else _failed(job, "send", worst)


def _is_stale(job: Message) -> bool:
    """Tell whether a newer state may have been written before this one: jobs and rate limits take their time."""
    assert job.enriched is not None
    age = (datetime.now(UTC) - job.enriched.as_of).total_seconds()
    return age > STALE_AFTER and any(operation.kind in _STATE_WRITES for operation in job.operations)


def _sends_events_first(job: Message) -> bool:
    """Tell whether a next delivery could take events for new that this one sends."""
    return job.delivery.attempt == 1 and any(
        operation.kind is OperationKind.CREATE_EVENT for operation in job.operations
    )


def _guarded(job: Message, stage: str, work: Callable[[], None]) -> None:
    """Run a pure stage for one job. What it raises is about this message: repeating cannot help."""
    try:
        work()
    except Ignored as reason:
        job.outcome = Outcome(Disposition.ACK, stage, reason)
    except WorkerError as error:
        job.outcome = _failed(job, stage, error)
    except Exception as error:  # noqa: BLE001 - hostile data must not stop the worker
        job.outcome = _failed(job, stage, Rejected(_describe(error)))


def _failed(job: Message, stage: str, error: WorkerError) -> Outcome:
    return Outcome(error.disposition, stage, error, _delay(job))


def _delay(job: Message) -> float:
    """Return how long a nacked message is to stay away: doubling with every attempt."""
    return min(FIRST_DELAY * 2.0 ** min((job.delivery.attempt or 1) - 1, 16), MAX_DELAY)


def _defect(stage: str, error: Exception) -> WorkerError:
    where = _describe(error)
    log.error("defect", extra={"stage": stage, "reason": where})
    return WorkerError(where)


def _describe(error: Exception) -> str:
    """Describe an error of ours by class and place: its text may quote what belongs to a person."""
    frames = traceback.extract_tb(error.__traceback__)[-3:]
    places = " < ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in reversed(frames))
    return f"unexpected {type(error).__name__} at {places}; please report it"
