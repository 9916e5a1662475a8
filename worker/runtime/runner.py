"""The runner: pulls messages, distributes them to lanes, extends leases, parks, and shuts down."""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from threading import Event, Thread
from typing import TYPE_CHECKING, Protocol

from adapters.base import QueueError, QueueRefusedError
from worker.model import OperationKind
from worker.runtime.in_flight import InFlight
from worker.runtime.lane import LaneCallbacks
from worker.runtime.lanes import Lanes
from worker.telemetry.log import ConditionLog, log

if TYPE_CHECKING:
    from collections.abc import Sequence

    from adapters.base import Delivery, QueueAdapter
    from worker.errors import Misconfigured
    from worker.model import Effect, Message
    from worker.pipeline import Pipeline
    from worker.settings import Settings
    from worker.telemetry.message_log import Telemetry

RECEIVE_WAIT = 1.0  # seconds; a waiting receive loop notices within this time that it must stop
DRAIN_WAIT = 0.05  # seconds; with `once`, the receive loop notices within this time that the lanes are done
IDLE_TIMEOUT = 10.0  # seconds without messages after which `once` treats a queue that reports no backlog as empty
LEASE_EXTENSION_TIMEOUT = 10.0  # seconds to wait for an extension in progress when the run ends
STALL_TIMEOUT = 60.0  # seconds without an iteration after which the receive loop counts as stalled
SLOW_PULL = 250  # messages per pull while the budget of a slow effect is full
SLOW_PULL_INTERVAL = 1.0  # seconds between two such pulls if messages had to go back to the queue
MIN_RETURN_DELAY = 60.0  # seconds; the limit of the delay of these messages is `outage_hold`, or this if that is less
# An order can be processed again at once: a job of guests could only repeat its write.
_OF_ORDERS = frozenset({OperationKind.CREATE_EVENT, OperationKind.UPSERT_GUEST})


class ShutdownTimeoutError(Exception):
    """The grace period ended before all messages in flight were processed. The rest was returned to the queue."""


class Services(Protocol):
    """The questions of the runner to the clients of commercetools and Klaviyo."""

    def refusal_reason(self) -> str:
        """Return why a service refuses the worker, or "" if both accept it."""

    def down_reason(self) -> str:
        """Return why a service as a whole is down, so that no message can be processed; "" if both are up."""


class Runner:
    """The engine of a worker. It pulls messages and distributes them to lanes. A resource always has the same lane.

    Pulling pauses while no message can be processed, because a service is down or refuses the worker. It also pauses
    while the budget of an effect is full (see budget.py).
    """

    def __init__(
        self,
        queue: QueueAdapter,
        pipeline: Pipeline,
        services: Services,
        settings: Settings,
        telemetry: Telemetry,
        stopping: Event,
    ) -> None:
        self._queue = queue
        self._pipeline = pipeline
        self._services = services
        self._settings = settings
        self._telemetry = telemetry
        self._stopping = stopping
        self._abort = Event()  # set to stop without waiting for the messages in progress
        self._pulling_ended = Event()
        self._once = False
        self._fatal: Exception | None = None
        self._left_reason = ""  # why `once` ended while messages were left
        max_delay = max(settings.outage_hold, MIN_RETURN_DELAY)
        self._in_flight = InFlight(settings.max_in_flight, settings.max_in_flight_bytes, max_delay)
        callbacks = LaneCallbacks(self._return_unprocessed, self._fail, self._on_refusal)
        self._lanes = Lanes(pipeline, self._in_flight, settings, stopping, callbacks)
        self._queue_refusal = ""  # why the queue refuses this worker
        self._refused_at = 0.0  # monotonic seconds
        self._pull_at = 0.0  # monotonic seconds; no pull before, because the previous one returned messages
        self._heartbeat = time.monotonic()
        self._has_received = False
        self._parked = ConditionLog("parked", "unparked", logging.ERROR)
        self._paused = ConditionLog("pulling_paused", "pulling_resumed", logging.WARNING)
        self._over_budget = ConditionLog("budget_exceeded", "budget_sufficient", logging.WARNING)

    def stop(self) -> None:
        """Stop pulling and finish the messages in progress. If called again, do not wait for these messages."""
        if self._stopping.is_set():
            self._abort.set()
        self._stopping.set()
        self._in_flight.wake()

    def has_received(self) -> bool:
        """Return whether the queue has answered at least once: with messages, without messages or with a refusal."""
        return self._has_received

    def stall_reason(self) -> str:
        """Return why a thread has stopped working, so that a restart helps. "" if all work, and after they ended."""
        if self._stopping.is_set() or self._pulling_ended.is_set():
            return ""
        if time.monotonic() - self._heartbeat >= STALL_TIMEOUT:
            return "the receive loop hangs"
        return self._lanes.stall_reason()

    def is_stopping(self) -> bool:
        """Return whether the worker is stopping or has stopped."""
        return self._stopping.is_set()

    def in_flight(self) -> int:
        """Count the messages in flight."""
        return len(self._in_flight)

    def held(self) -> int:
        """Count the messages in flight that are held."""
        return self._in_flight.held()

    def paused_reason(self) -> str:
        """Return why pulling pauses until a service is up; "" if it does not."""
        return self._services.down_reason()

    def oldest_age(self) -> float | None:
        """Return the number of seconds since the oldest message in flight was published: 0 without messages."""
        return self._in_flight.oldest_age()

    def batch_sizes(self) -> dict[str, list[int]]:
        """Return the number of messages in the current batch of each lane, by effect; 0 if the lane is idle."""
        return self._lanes.batch_sizes()

    def parked_reason(self) -> str:
        """Return why the worker is parked; "" if it is not."""
        return self._queue_refusal or self._services.refusal_reason()

    def run(self, *, once: bool = False, max_wait: float = 600.0) -> str:
        """Run until `stop` is called, or with `once` until the queue is empty.

        Return why `once` left messages in the queue; "" if it left none. `max_wait` is the total number of seconds
        that `once` waits for held and delayed messages. Raises QueueError, ShutdownTimeoutError and, with `once`,
        Misconfigured.
        """
        self._once = once
        lease_extender = Thread(target=self._extend_leases, daemon=True)
        self._heartbeat = time.monotonic()
        self._lanes.start()
        lease_extender.start()
        try:
            self._pull(max_wait)
        except Exception as error:  # noqa: BLE001 - the messages in flight must be returned before `run` raises
            self._fail(error)
        self._finish()
        lease_extender.join(LEASE_EXTENSION_TIMEOUT)
        unfinished = self._close_queue()
        if self._fatal is not None:
            raise self._fatal
        if unfinished:
            raise ShutdownTimeoutError(f"{unfinished} messages in flight were returned to the queue")
        return self._left_reason

    def _pull(self, max_wait: float) -> None:
        waited_s = 0.0  # total time in which no message could be processed
        idle_s = 0.0  # time since a message was last in flight
        while not self._stopping.is_set():
            self._heartbeat = time.monotonic()
            self._log_conditions()
            if self._once and self._is_done(idle_s, waited_s, max_wait):
                return
            started_at = time.monotonic()
            had_only_held = self._once and self._in_flight.has_only_held()
            deliveries = self._receive()
            self._has_received = True
            self._telemetry.record_received(len(deliveries))
            seconds = time.monotonic() - started_at if had_only_held and not deliveries else 0.0
            waited_s += seconds
            idle_s = 0.0 if deliveries or self._in_flight else idle_s + seconds
            self._dispatch(deliveries)
        if self._once:
            self._left_reason = "stopped before the queue was empty"

    def _log_conditions(self) -> None:
        """Log that the worker is parked, that pulling is paused or that a budget is exceeded, and when that ends."""
        fields = {"messages": len(self._in_flight)}
        self._parked.log(self.parked_reason(), **fields)
        self._paused.log(self.paused_reason(), **fields)
        slow = ", ".join(effect.value for effect in self._in_flight.slow_effects())
        self._over_budget.log(f"{slow}: as many messages as allowed wait for Klaviyo" if slow else "", **fields)

    def _is_done(self, idle_s: float, waited_s: float, max_wait: float) -> bool:
        """Return whether `once` ends: no message can be processed now, and none is left or `max_wait` is over."""
        if not self._in_flight.has_only_held():
            return False
        remaining = len(self._in_flight) or self._queue.backlog()
        if remaining is None:
            return self._is_queue_empty(idle_s)
        return remaining == 0 or self._is_wait_over(waited_s, max_wait, remaining)

    def _is_queue_empty(self, idle_s: float) -> bool:
        """Return whether a queue that reports no backlog counts as empty. Raises QueueError if it is unreachable."""
        if idle_s < IDLE_TIMEOUT:
            return False
        self._queue.check()
        return True

    def _is_wait_over(self, waited_s: float, max_wait: float, remaining: int) -> bool:
        if waited_s < max_wait:
            return False
        log.warning("wait_timed_out", extra={"waiting": remaining, "waited_s": round(waited_s)})
        self._left_reason = f"{remaining} messages are left after waiting {max_wait:g} s"
        return True

    def _receive(self) -> Sequence[Delivery]:
        """Receive as many messages as there is capacity for. Without capacity, wait briefly and return ()."""
        capacity = self._wait_for_capacity()
        if capacity <= 0:
            return ()
        is_draining = self._once and len(self._in_flight) > 0
        try:
            deliveries = self._queue.receive(capacity, DRAIN_WAIT if is_draining else RECEIVE_WAIT)
        except QueueRefusedError as error:
            if self._once:
                raise
            self._queue_refusal = str(error)
            self._refused_at = time.monotonic()
            return ()
        # A new stream reports a refusal only after a moment. No messages and no error do not mean that access is
        # granted, until a second retry has passed without a refusal.
        if deliveries or time.monotonic() > self._refused_at + 2 * self._settings.park_retry_interval:
            self._queue_refusal = ""
        return deliveries

    def _wait_for_capacity(self) -> int:
        """Return how many messages can be received now. If there is no capacity, first wait briefly for it."""
        wait = DRAIN_WAIT if self._once else RECEIVE_WAIT
        if self._is_paused(time.monotonic()):
            self._in_flight.wait_for_change(wait)
            return 0
        # With `once`, all messages must be settled before the run ends, so none goes back to the queue.
        capacity = self._in_flight.wait_for_capacity(wait, skip_slow=not self._once)
        return min(capacity, SLOW_PULL) if self._in_flight.slow_effects() else capacity

    def _is_paused(self, now: float) -> bool:
        is_refused = self._queue_refusal and now < self._refused_at + self._settings.park_retry_interval
        return bool(is_refused or now < self._pull_at or self._services.refusal_reason() or self.paused_reason())

    def _dispatch(self, deliveries: Sequence[Delivery]) -> None:
        """Put messages into their lanes. Return those that are beyond the budget of a slow effect to the queue.

        Those among them that have an outcome need no lane, so they are settled at once. The lanes get all messages
        together, because a lane processes what is in its inbox as one batch.
        """
        accepted: list[tuple[Effect, Message]] = []
        excess: defaultdict[Effect, list[Message]] = defaultdict(list)
        decided: list[Message] = []
        for delivery in deliveries:
            if self._in_flight.renew(delivery):
                continue
            message = self._pipeline.parse(delivery)
            if self._once or not self._in_flight.is_beyond_budget(message):
                accepted.append((self._in_flight.add(message), message))
            elif message.outcome is None:
                excess[message.effect].append(message)
            else:
                decided.append(message)
        for effect, message in accepted:
            self._lanes.put(effect, message)
        if decided:
            self._pipeline.process(decided)
        for effect, messages in excess.items():
            delay = self._in_flight.return_delay(effect, len(messages))
            self._pipeline.give_back(messages, delay)
            self._pull_at = time.monotonic() + SLOW_PULL_INTERVAL

    def _return_unprocessed(self, messages: Sequence[Message]) -> None:
        """Give messages back to the queue after pulling has ended."""
        self._pulling_ended.wait()  # otherwise this worker could receive the messages again
        self._pipeline.give_back(messages)
        self._in_flight.remove(messages)

    def _fail(self, error: Exception) -> None:
        """Stop the worker because of an error. `run` raises the first error."""
        self._fatal = self._fatal or error
        self._stopping.set()

    def _on_refusal(self, error: Misconfigured) -> None:
        self._parked.log(str(error), messages=len(self._in_flight))
        if self._once:
            self._fail(error)

    def _extend_leases(self) -> None:
        """Extend the leases of all messages in flight whenever a third of the lease time has passed."""
        while (lease := self._queue.lease_seconds) is not None and not self._abort.wait(lease / 3):
            try:
                self._queue.extend([message.delivery for message in self._in_flight.messages()], lease)
            except Exception as error:  # noqa: BLE001 - if this thread ended, all leases would expire
                reason = str(error) if isinstance(error, QueueError) else f"unexpected {type(error).__name__}"
                log.warning("lease_extension_failed", extra={"reason": reason})

    def _finish(self) -> None:
        """Give back the messages that no lane has started. Let the lanes end within the grace period."""
        deadline = time.monotonic() + self._settings.shutdown_grace_period
        try:
            self._queue.stop()
        except Exception as error:  # noqa: BLE001 - the messages in flight must be returned before `run` raises
            self._fail(error)
        self._pulling_ended.set()
        try:
            if self._stopping.is_set():
                self._return_unprocessed(self._lanes.drain_inboxes())
        except Exception as error:  # noqa: BLE001 - the lanes must end before `run` raises
            self._fail(error)
        self._lanes.end()
        while self._lanes.is_any_alive() and not self._abort.is_set():
            if self._stopping.is_set() and time.monotonic() > deadline:
                break
            self._abort.wait(0.02)
        self._abort.set()  # this also ends the thread that extends leases

    def _close_queue(self) -> int:
        """Give the unfinished messages back to the queue and close it. Return the number of these messages."""
        unfinished = self._in_flight.messages()
        _keep_away_from_jobs(unfinished, self._settings)
        try:
            if unfinished:
                self._return_unprocessed(unfinished)
            self._queue.close()
        except Exception as error:  # noqa: BLE001 - `run` raises the first error
            self._fail(error)
        return len(unfinished)


def _keep_away_from_jobs(messages: Sequence[Message], settings: Settings) -> None:
    """Let no worker process messages that a lane is sending, while a bulk job can still write their old state.

    Fewer operations than `bulk_threshold` are not sent in a job.
    """
    sending = [m for m in messages if m.outcome is None and any(o.kind not in _OF_ORDERS for o in m.operations)]
    if sum(len(message.operations) for message in sending) > settings.bulk_threshold:
        for message in sending:
            message.not_before = max(message.not_before, time.monotonic() + settings.job_timeout)
