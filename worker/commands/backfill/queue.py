"""The queue from which the runner receives the messages of a backfill. Records are read on demand."""

from __future__ import annotations

import heapq
import logging
import time
from collections import deque
from datetime import UTC, datetime
from itertools import count
from threading import Condition
from typing import TYPE_CHECKING

from adapters.base import Failure, InertQueue
from worker.commands.backfill.records import BackfillRecord, RecordDelivery, notifications_for
from worker.errors import CommercetoolsMisconfigured, EndpointRefused, Rejected, Transient
from worker.json_access import parse_time
from worker.telemetry.log import ConditionLog

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from adapters.base import Delivery
    from worker.commands.backfill.pages import RecordPages
    from worker.commands.backfill.recorder import BackfillRecorder
    from worker.commands.backfill.records import RecordSelection
    from worker.model import Json

ORDER_DELAY = 60.0  # seconds after an order's last change within which the worker sends that change
MAX_DELAYED = 10_000  # delayed messages; at this number, no more records are read
MAX_TRIES = 5  # of a message, each with a hold; then its record counts as failed


class RecordQueue(InertQueue):
    """The selected records as a finite queue. Implements QueueAdapter. `limit` is the maximum number of records.

    A recently changed order is delayed, so that the worker sends it first. `down_reason` returns why a service is down.
    """

    def __init__(
        self,
        pages: RecordPages,
        selection: RecordSelection,
        recorder: BackfillRecorder,
        limit: int | None,
        down_reason: Callable[[], str],
    ) -> None:
        self._pages = pages
        self._selection = selection
        self._recorder = recorder
        self._limit = limit
        self._down_reason = down_reason
        self._is_exhausted = False
        self._page_error = ConditionLog("page_not_read", "page_read", logging.WARNING)
        self._ready: deque[RecordDelivery] = deque()
        self._delayed: list[tuple[float, int, RecordDelivery]] = []  # a heap by monotonic seconds
        self._sequence = count()
        self._changed = Condition()

    def receive(self, max_messages: int, wait: float) -> Sequence[RecordDelivery]:
        """Return ready messages; read the next page if there are none. Raises Misconfigured."""
        deliveries = self._take_ready(max_messages)
        if not deliveries and not self._is_exhausted and len(self._delayed) < MAX_DELAYED:
            self._read_page()
            deliveries = self._take_ready(max_messages)
        if not deliveries:
            with self._changed:
                self._changed.wait(wait)
        return deliveries

    def ack(self, deliveries: Sequence[Delivery]) -> None:
        """Do nothing, because BackfillRecorder records the outcomes."""

    def nack(self, deliveries: Sequence[Delivery], delay: float = 0.0, failure: Failure | None = None) -> None:
        """Redeliver the messages. A message fails permanently at its MAX_TRIES-th failure while the services are up."""
        for delivery in deliveries:
            assert isinstance(delivery, RecordDelivery)
            delivery.tries += failure is not None and not self._down_reason()
            if failure and delivery.tries >= MAX_TRIES:
                self._recorder.record_failure(delivery.record, failure)
            else:
                self._put(delivery, delay)

    def backlog(self) -> int:
        """Return the number of messages that are not received yet. All unread records count as one."""
        with self._changed:
            return len(self._ready) + len(self._delayed) + (not self._is_exhausted)

    def stop(self) -> None:
        """Stop reading records."""
        self._is_exhausted = True

    def close(self) -> None:
        """Save the checkpoint. Raises OSError."""
        self._recorder.save()

    def _take_ready(self, max_messages: int) -> list[RecordDelivery]:
        now = time.monotonic()
        with self._changed:
            while self._delayed and self._delayed[0][0] <= now:
                self._ready.append(heapq.heappop(self._delayed)[2])
            return [self._ready.popleft() for _ in range(min(max_messages, len(self._ready)))]

    def _read_page(self) -> None:
        """Read a page. After a transient error, the next `receive` reads the page again, any number of times.

        Raises Misconfigured, also if a scope is missing: there is nothing else to read.
        """
        try:
            page = self._pages.next_page()[: self._limit]
        except EndpointRefused as error:
            raise CommercetoolsMisconfigured(error.reason, todo=error.todo) from None
        except Transient as error:
            self._page_error.log(str(error))
            return
        self._page_error.log("")
        self._limit = None if self._limit is None else self._limit - len(page)
        self._is_exhausted = not page or self._limit == 0
        for record_id, resource in page:
            self._start(record_id, resource)

    def _start(self, record_id: str, resource: Json | Rejected) -> None:
        if isinstance(resource, Rejected):
            record = BackfillRecord(record_id, 1)
            self._recorder.start(record)
            self._recorder.record_failure(record, Failure(str(resource), "enrich", type(resource).__name__))
            return
        notifications = notifications_for(self._selection, resource)
        record = BackfillRecord(record_id, len(notifications))
        self._recorder.start(record)
        delay = self._order_delay(resource)
        for body in notifications:
            self._put(RecordDelivery(record, body), delay)

    def _order_delay(self, resource: Json) -> float:
        """Return the seconds during which the worker can still send the order's last change.

        If the backfill sent that event first, Klaviyo would drop the worker's event and start no flow.
        """
        changed_at = parse_time(resource.get("lastModifiedAt"))
        if self._selection.name != "orders" or changed_at is None:
            return 0.0
        age = (datetime.now(UTC) - changed_at).total_seconds()
        return min(max(ORDER_DELAY - age, 0.0), ORDER_DELAY)

    def _put(self, delivery: RecordDelivery, delay: float) -> None:
        with self._changed:
            if delay > 0:
                heapq.heappush(self._delayed, (time.monotonic() + delay, next(self._sequence), delivery))
            else:
                self._ready.append(delivery)
            self._changed.notify_all()
