"""The receive loop and its lanes: flow control, order per resource, leases, parking, shutdown."""

from __future__ import annotations

import time
from queue import Empty, SimpleQueue
from threading import Condition, Event, Thread, get_ident
from typing import TYPE_CHECKING

from adapters.base import QueueError
from worker.errors import Misconfigured
from worker.telemetry import log

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from adapters.base import QueueAdapter
    from worker.model import Job
    from worker.pipeline import Pipeline
    from worker.settings import Settings
    from worker.telemetry import Telemetry

RECEIVE_WAIT = 1.0  # seconds; how soon an idle loop notices that it is to stop
DRAIN_WAIT = 0.05  # seconds; how soon `once` notices that the lanes are done
QUIET = 10.0  # seconds without a message after which `once` takes a queue that cannot tell for empty
_Inbox = SimpleQueue["Job | None"]


class ShutdownTimeoutError(Exception):
    """The grace period ended before all work in flight did; the rest went back to the queue."""


class Runner:
    """Pulls deliveries and has lanes process them, a resource always in the same lane.

    A lane takes all that waits for it, up to a batch: an idle worker handles one message at once, a
    backlog makes batches by itself. No more is held than `max_in_flight` messages and bytes.
    """

    def __init__(
        self, queue: QueueAdapter, pipeline: Pipeline, settings: Settings, telemetry: Telemetry, stopping: Event
    ) -> None:
        self._queue = queue
        self._pipeline = pipeline
        self._settings = settings
        self._telemetry = telemetry
        self._stopping = stopping
        self._hurry = Event()
        self._pulling_ended = Event()
        self._held: dict[int, Job] = {}
        self._held_bytes = 0
        self._changed = Condition()
        self._parked: set[int] = set()  # lanes
        self._once = False
        self._fatal: Exception | None = None
        self._inboxes: list[_Inbox] = [SimpleQueue() for _ in range(settings.lanes)]

    def stop(self) -> None:
        """Stop pulling and finish; called again: do not wait for what is in flight."""
        if self._stopping.is_set():
            self._hurry.set()
        self._stopping.set()
        with self._changed:
            self._changed.notify_all()

    def run(self, *, once: bool = False, max_wait: float = 600.0) -> None:
        """Work until `stop`; with `once`, until the queue is empty.

        `max_wait`: seconds that `once` waits, in all, for delayed redeliveries. Raises QueueError,
        ShutdownTimeoutError and, with `once`, Misconfigured.
        """
        self._once = once
        lanes = [Thread(target=self._lane, args=(inbox,), daemon=True) for inbox in self._inboxes]
        keeper = Thread(target=self._keep_leases, daemon=True)
        for thread in (*lanes, keeper):
            thread.start()
        try:
            self._pull(max_wait)
        except Exception as error:  # noqa: BLE001 - whatever it is, what is held must go back
            self._fail(error)
        self._finish(lanes)
        keeper.join()
        left = self._close()
        if self._fatal is not None:
            raise self._fatal
        if left:
            raise ShutdownTimeoutError(f"{left} messages in flight went back to the queue")

    def _pull(self, max_wait: float) -> None:
        waited = quiet = 0.0
        while not self._stopping.is_set():
            if self._once and self._nothing_left(quiet, waited, max_wait):
                return
            room = self._room()
            if room <= 0 or self._stopping.is_set():
                continue
            began, idle = time.monotonic(), not self._held
            deliveries = self._queue.receive(room, DRAIN_WAIT if self._once and not idle else RECEIVE_WAIT)
            spent = time.monotonic() - began if idle and not deliveries else 0.0
            waited, quiet = waited + spent, 0.0 if deliveries else quiet + spent
            for delivery in deliveries:
                self._dispatch(self._pipeline.accept(delivery))

    def _nothing_left(self, quiet: float, waited: float, max_wait: float) -> bool:
        """Tell whether `once` is done: nothing in flight and nothing to come that is worth the wait."""
        if self._held:
            return False
        backlog = self._queue.backlog()
        if backlog is None and quiet >= QUIET:
            self._queue.check()  # a queue out of reach is quiet too
            return True
        if not backlog:
            return backlog == 0
        if waited < max_wait:
            return False
        log.warning("gave_up_waiting", extra={"waiting": backlog, "waited_s": round(waited)})
        return True

    def _room(self) -> int:
        """Return how many messages may be received; wait a moment when none."""
        with self._changed:
            if self._is_full():
                self._changed.wait(RECEIVE_WAIT)
            return 0 if self._is_full() else self._settings.max_in_flight - len(self._held)

    def _is_full(self) -> bool:
        too_many = len(self._held) >= self._settings.max_in_flight
        return bool(self._parked) or too_many or self._held_bytes >= self._settings.max_in_flight_bytes

    def _dispatch(self, job: Job) -> None:
        with self._changed:
            self._held[id(job)] = job
            self._held_bytes += len(job.delivery.body)
        notification = job.notification
        key = (notification.resource_type, notification.resource_id) if notification else job.delivery.id
        self._inboxes[hash(key) % len(self._inboxes)].put(job)

    def _lane(self, inbox: _Inbox) -> None:
        while batch := self._next_batch(inbox):
            try:
                self._work(batch)
            except Exception as error:  # noqa: BLE001 - a lane that dies would stop its resources for ever
                self._fail(error)

    def _next_batch(self, inbox: _Inbox) -> list[Job]:
        """Wait for a job and take all that wait behind it; [] at the end."""
        batch: list[Job] = []
        job = inbox.get()
        while job is not None:
            batch.append(job)
            if len(batch) == self._settings.max_batch:
                return batch
            try:
                job = inbox.get_nowait()
            except Empty:
                return batch
        if batch:
            inbox.put(None)  # the end comes after this batch
        return batch

    def _work(self, batch: Sequence[Job]) -> None:
        waiting = batch
        while waiting and not self._stopping.is_set():
            parked = self._pipeline.process(waiting)
            self._release([job for job in waiting if job not in parked])
            self._set_parked(bool(parked))
            if parked:
                self._wait_parked(parked)
            waiting = parked
        self._set_parked(False)
        if waiting:
            self._give_back(waiting)

    def _wait_parked(self, jobs: Sequence[Job]) -> None:
        """Wait while the worker is not allowed to work; with `once`, end the run instead."""
        cause = jobs[0].outcome.cause if jobs[0].outcome else None
        log.error("parked", extra={"reason": str(cause), "held": len(jobs)})
        if self._once and isinstance(cause, Misconfigured):
            self._fail(cause)
        self._stopping.wait(self._settings.park_seconds)

    def _set_parked(self, parked: bool) -> None:
        """Note whether this lane is parked: pulling pauses from the first parked lane to the last one's success."""
        with self._changed:
            (self._parked.add if parked else self._parked.discard)(get_ident())
            self._changed.notify_all()

    def _release(self, jobs: Sequence[Job]) -> None:
        with self._changed:
            for job in jobs:
                if self._held.pop(id(job), None) is not None:
                    self._held_bytes -= len(job.delivery.body)
            self._changed.notify_all()

    def _give_back(self, jobs: Sequence[Job]) -> None:
        """Return messages unhandled, once they cannot come back to this very worker.

        A lane may still be at work on them: the jobs are its own to change.
        """
        self._pulling_ended.wait()
        self._queue.nack([job.delivery for job in jobs])
        self._telemetry.returned(jobs)
        self._release(jobs)

    def _fail(self, error: Exception) -> None:
        self._fatal = self._fatal or error
        self._stopping.set()

    def _keep_leases(self) -> None:
        """Extend the leases of all that is held, long before they end."""
        lease = self._queue.lease
        while lease is not None and not self._hurry.wait(lease / 3):
            with self._changed:
                deliveries = [job.delivery for job in self._held.values()]
            try:
                self._queue.extend(deliveries, lease)
            except QueueError as error:
                log.warning("leases_not_extended", extra={"reason": str(error)})

    def _finish(self, lanes: Sequence[Thread]) -> None:
        """Return at once what no lane has begun, and let the lanes end inside the grace period."""
        deadline = time.monotonic() + self._settings.grace_period
        try:
            self._queue.stop()
        except Exception as error:  # noqa: BLE001 - whatever it is, what is held must go back
            self._fail(error)
        self._pulling_ended.set()
        try:
            if self._stopping.is_set():
                self._give_back([job for inbox in self._inboxes for job in _emptied(inbox)])
        except QueueError as error:
            self._fail(error)
        for inbox in self._inboxes:
            inbox.put(None)
        while any(lane.is_alive() for lane in lanes) and not self._hurry.is_set():
            if self._stopping.is_set() and time.monotonic() > deadline:
                break
            self._hurry.wait(0.02)
        self._hurry.set()

    def _close(self) -> int:
        """Return to the queue what the lanes still hold, close it, and return how many that were."""
        with self._changed:
            left = list(self._held.values())
        try:
            if left:
                self._give_back(left)
            self._queue.close()
        except QueueError as error:
            self._fail(error)
        return len(left)


def _emptied(inbox: _Inbox) -> Iterator[Job]:
    while True:
        try:
            job = inbox.get_nowait()
        except Empty:
            return
        if job is not None:
            yield job
