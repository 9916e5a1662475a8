"""The receive loop: flow control, order per resource, leases, pauses, parking, shutdown."""

from __future__ import annotations

import logging
import time
from threading import Event, Thread
from typing import TYPE_CHECKING

from adapters.base import Failure, QueueError, QueueRefusedError
from worker.http.backoff import MAX_BACKOFF
from worker.runtime.in_flight import InFlight
from worker.runtime.lane import Lane, LaneCallbacks
from worker.telemetry.log import ConditionLog, log

if TYPE_CHECKING:
    from collections.abc import Sequence

    from adapters.base import Delivery, QueueAdapter
    from worker.errors import Misconfigured
    from worker.model import Message
    from worker.pipeline import Pipeline
    from worker.settings import Settings
    from worker.telemetry.message_log import Telemetry

RECEIVE_WAIT = 1.0  # seconds; how soon an idle loop notices that it is to stop
DRAIN_WAIT = 0.05  # seconds; how soon `once` notices that the lanes are done
IDLE_TIMEOUT = 10.0  # seconds without a message after which `once` takes a queue that cannot tell for empty
STALL_TIMEOUT = 60.0  # seconds after which a loop that did not come round is taken for dead
LANE_GROUPS = ("events", "profiles", "catalog")  # none waits for the jobs of others
# Resources by the place in LANE_GROUPS of the lanes that are theirs.
LANE_GROUP = {"customer": 1, "category": 2, "product": 2, "inventory-entry": 2}
_INTERRUPTED = Failure("was in work when the worker stopped", "send", "Interrupted")


class ShutdownTimeoutError(Exception):
    """The grace period ended before all work in flight did; the rest went back to the queue."""


class Runner:
    """Pulls deliveries and has lanes process them, a resource always in the same lane.

    Events, profiles and the catalog have lanes of their own.

    No more is held than `max_in_flight` messages and bytes. Pulling pauses while the worker is parked, and slows
    to a message in a while when all that is held waits for an outage to end: a fresh message is how it notices
    that only the others cannot be handled.
    """

    def __init__(
        self, queue: QueueAdapter, pipeline: Pipeline, settings: Settings, telemetry: Telemetry, stopping: Event
    ) -> None:
        self._queue = queue
        self._pipeline = pipeline
        self._settings = settings
        self._telemetry = telemetry
        self._stopping = stopping
        self._abort = Event()
        self._pulling_ended = Event()
        self._once = False
        self._fatal: Exception | None = None
        self._in_flight = InFlight(settings.max_in_flight, settings.max_in_flight_bytes)
        ends = LaneCallbacks(self._return_unprocessed, self._fail, self._refused)
        self._lanes = [Lane(pipeline, self._in_flight, settings, stopping, ends) for _ in range(settings.threads)]
        self._queue_refused = ""
        self._refused_at = 0.0  # monotonic seconds, as all times here
        self._pulled_at = 0.0
        self._has_begun = False
        self._parked = ConditionLog("parked", "unparked", logging.ERROR)
        self._stuck = ConditionLog("pulling_paused", "pulling_resumed", logging.WARNING)
        self._heartbeat = time.monotonic()

    def stop(self) -> None:
        """Stop pulling and finish; called again: do not wait for what is in flight."""
        if self._stopping.is_set():
            self._abort.set()
        self._stopping.set()
        self._in_flight.wake()

    def has_polled(self) -> bool:
        """Tell whether the receive loop has come round: the queue gave messages, none, or a refusal."""
        return self._has_begun

    def is_alive(self) -> bool:
        """Tell whether the receive loop comes round, or has ended in order."""
        return self._pulling_ended.is_set() or time.monotonic() - self._heartbeat < STALL_TIMEOUT

    def is_stopping(self) -> bool:
        """Tell whether no more messages are pulled, for good."""
        return self._stopping.is_set()

    def in_flight(self) -> int:
        """Count the messages received and not settled."""
        return len(self._in_flight)

    def held(self) -> int:
        """Count those of them that have to wait."""
        return self._in_flight.held

    def oldest_age(self) -> float | None:
        """Return how many seconds ago the oldest of the messages in flight was published; see InFlight."""
        return self._in_flight.oldest_age()

    def batch_sizes(self) -> dict[str, list[int]]:
        """Count the messages that each lane handles now, by what lanes are for; 0: it is idle."""
        number = self._settings.lanes
        return {
            name: [lane.batch_sizes for lane in self._lanes[effect * number : (effect + 1) * number]]
            for effect, name in enumerate(LANE_GROUPS)
        }

    def parked_reason(self) -> str:
        """Return why the worker is parked; "" when it is not."""
        return self._queue_refused or self._in_flight.parked_reason()

    def run(self, *, once: bool = False, max_wait: float = 600.0) -> None:
        """Work until `stop`; with `once`, until the queue is empty.

        `max_wait`: seconds that `once` waits, in all, for what cannot be handled yet. Raises QueueError,
        ShutdownTimeoutError and, with `once`, Misconfigured.
        """
        self._once = once
        keeper = Thread(target=self._keep_leases, daemon=True)
        for thread in (*self._lanes, keeper):
            thread.start()
        try:
            self._pull(max_wait)
        except Exception as error:  # noqa: BLE001 - whatever it is, what is held must go back
            self._fail(error)
        self._finish()
        keeper.join()
        left = self._close()
        if self._fatal is not None:
            raise self._fatal
        if left:
            raise ShutdownTimeoutError(f"{left} messages in flight went back to the queue")

    def _pull(self, max_wait: float) -> None:
        waited = quiet = 0.0
        while not self._stopping.is_set():
            self._heartbeat = time.monotonic()
            self._report()
            if self._once and self._nothing_left(quiet, waited, max_wait):
                return
            began, is_idle = time.monotonic(), self._in_flight.is_idle
            deliveries = self._receive()
            self._has_begun = True
            self._telemetry.received(len(deliveries))
            spent = time.monotonic() - began if is_idle and not deliveries else 0.0
            waited, quiet = waited + spent, 0.0 if deliveries or self._in_flight else quiet + spent
            for delivery in deliveries:
                self._dispatch(self._pipeline.accept(delivery))

    def _report(self) -> None:
        """Say that the worker is parked, or has to wait, and that it is over; at most once a minute each."""
        fields = {"messages": len(self._in_flight)}
        self._parked.log(self.parked_reason(), **fields)
        self._stuck.log("all that is held waits for an outage to end" if self._in_flight.is_blocked else "", **fields)

    def _nothing_left(self, quiet: float, waited: float, max_wait: float) -> bool:
        """Tell whether `once` is done: nothing in flight and nothing to come that is worth the wait."""
        if not self._in_flight.is_idle:
            return False
        backlog = len(self._in_flight) or self._queue.backlog()
        if backlog is None and quiet >= IDLE_TIMEOUT:
            self._queue.check()  # a queue out of reach is quiet too
            return True
        if not backlog:
            return backlog == 0
        if waited < max_wait:
            return False
        log.warning("wait_timed_out", extra={"waiting": backlog, "waited_s": round(waited)})
        return True

    def _receive(self) -> Sequence[Delivery]:
        """Receive what there is room for; nothing, a moment later, when there is none."""
        room = self._capacity()
        if room <= 0:
            return ()
        is_draining = self._once and len(self._in_flight) > 0
        try:
            deliveries = self._queue.receive(room, DRAIN_WAIT if is_draining else RECEIVE_WAIT)
        except QueueRefusedError as error:
            if self._once:
                raise
            self._queue_refused, self._refused_at = str(error), time.monotonic()
            return ()
        if deliveries or time.monotonic() > self._refused_at + 2 * self._settings.park_retry_interval:
            self._queue_refused = ""
        return deliveries

    def _capacity(self) -> int:
        """Return how many messages may be received now; wait a moment when none."""
        now = time.monotonic()
        is_refused = self._queue_refused and now < self._refused_at + self._settings.park_retry_interval
        is_blocked = self._in_flight.is_blocked
        if is_blocked and now >= self._pulled_at + MAX_BACKOFF:
            self._pulled_at = now
            return min(1, self._in_flight.wait_for_capacity(0.0))
        if is_blocked or is_refused or self._in_flight.parked_reason():
            self._in_flight.wait_for_change(DRAIN_WAIT if self._once else RECEIVE_WAIT)
            return 0
        self._pulled_at = now
        return self._in_flight.wait_for_capacity(RECEIVE_WAIT)

    def _dispatch(self, job: Message) -> None:
        self._in_flight.add(job)
        effect, lanes = LANE_GROUP.get(job.key[0], 0), self._settings.lanes
        self._lanes[effect * lanes + hash(job.key) % lanes].put(job)

    def _return_unprocessed(self, jobs: Sequence[Message]) -> None:
        """Return messages unhandled, once they cannot come back to this very worker.

        A lane may still be at work on them: the jobs are its own to change. What was begun costs a delivery
        attempt, once: on a first delivery its events would be taken for new.
        """
        self._pulling_ended.wait()
        returned: dict[bool, list[Delivery]] = {False: [], True: []}  # begun or not
        for job in jobs:
            returned[job.events_may_be_sent].append(job.delivery)
        self._queue.nack(returned[False])
        if returned[True]:
            self._queue.nack(returned[True], failure=_INTERRUPTED)
        self._telemetry.returned(jobs)
        self._in_flight.remove(jobs)

    def _fail(self, error: Exception) -> None:
        self._fatal = self._fatal or error
        self._stopping.set()

    def _refused(self, error: Misconfigured) -> None:
        self._parked.log(str(error), held=len(self._in_flight))
        if self._once:  # a script wants to know
            self._fail(error)

    def _keep_leases(self) -> None:
        """Extend the leases of all that is held, long before they end."""
        while (lease := self._queue.lease_seconds) is not None and not self._abort.wait(lease / 3):
            jobs, began = self._in_flight.jobs(), time.monotonic()
            try:
                self._queue.extend([job.delivery for job in jobs], lease)
            except Exception as error:  # noqa: BLE001 - leases that nobody extends any more bring all that is held again
                reason = str(error) if isinstance(error, QueueError) else f"unexpected {type(error).__name__}"
                log.warning("leases_not_extended", extra={"reason": reason})
            else:
                for job in jobs:
                    job.lease.extend(began, lease)

    def _finish(self) -> None:
        """Return at once what no lane has begun, and let the lanes end inside the grace period."""
        deadline = time.monotonic() + self._settings.shutdown_grace_period
        try:
            self._queue.stop()
        except Exception as error:  # noqa: BLE001 - whatever it is, what is held must go back
            self._fail(error)
        self._pulling_ended.set()
        try:
            if self._stopping.is_set():
                self._return_unprocessed([job for lane in self._lanes for job in lane.drain_inbox()])
        except Exception as error:  # noqa: BLE001 - likewise
            self._fail(error)
        for lane in self._lanes:
            lane.end()
        while any(lane.is_alive() for lane in self._lanes) and not self._abort.is_set():
            if self._stopping.is_set() and time.monotonic() > deadline:
                break
            self._abort.wait(0.02)
        self._abort.set()

    def _close(self) -> int:
        """Return to the queue what the lanes still hold, close it, and return how many that were."""
        left = self._in_flight.jobs()
        try:
            if left:
                self._return_unprocessed(left)
            self._queue.close()
        except Exception as error:  # noqa: BLE001 - the first error is the one that is raised
            self._fail(error)
        return len(left)
