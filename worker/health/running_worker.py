"""The implementation of WorkerState for a running worker."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adapters import Counts, SupportsCounts
from worker.health.cached_reading import CachedReading

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from adapters import QueueAdapter
    from worker.commercetools.client import Commercetools
    from worker.klaviyo.client import Klaviyo
    from worker.runtime.runner import Runner
    from worker.telemetry.state import BulkEventsStatus


class RunningWorkerState:
    """The WorkerState of a running worker. It reads the runner, the clients and the queue."""

    def __init__(
        self,
        runner: Runner,
        queue: QueueAdapter,
        lanes: int,
        commercetools: Commercetools,
        klaviyo: Klaviyo,
        bulk_events: Callable[[], BulkEventsStatus],
    ) -> None:
        self._runner = runner
        self._counts = CachedReading(queue.counts if isinstance(queue, SupportsCounts) else lambda: Counts(None, None))
        self._lanes = lanes
        self._commercetools = commercetools
        self._klaviyo = klaviyo
        self.has_received = runner.has_received
        self.stall_reason = runner.stall_reason
        self.paused_reason = runner.paused_reason
        self.is_stopping = runner.is_stopping
        self.in_flight = runner.in_flight
        self.held = runner.held
        self.oldest_age = runner.oldest_age
        self.parked_reason = runner.parked_reason
        self.batch_sizes = runner.batch_sizes
        self.rate_limit_status = klaviyo.rate_limit_status
        self.bulk_events = bulk_events

    def lanes(self) -> int:
        """Return the number of lanes."""
        return self._lanes

    def outage_reasons(self) -> Mapping[str, str]:
        """Return the reason for the outage of each service; "" if a service has no outage."""
        return {
            "commercetools": self._commercetools.outage_reason(),
            "klaviyo": self._klaviyo.outage_reason(),
        }

    def refused_endpoints(self) -> Sequence[str]:
        """Return the reason of each endpoint that refuses the worker, while its service accepts the credentials."""
        return [*self._commercetools.refused_endpoints().values(), *self._klaviyo.refused_endpoints().values()]

    def backlog(self) -> int | None:
        """Return the number of messages on the queue that are not settled. The value is cached."""
        return self._counts.read().backlog

    def dead_letters(self) -> int | None:
        """Return the number of dead letters. The value is cached."""
        return self._counts.read().dead_letters
