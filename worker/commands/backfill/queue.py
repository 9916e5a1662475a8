"""A queue that the runner receives a backfill from: records are read as there is room for them."""

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
from worker.commands.backfill.progress import Record, RecordDelivery
from worker.commands.backfill.records import bodies
from worker.errors import Rejected, Transient, WorkerError
from worker.json_access import parse_time
from worker.telemetry.log import ConditionLog

if TYPE_CHECKING:
    from collections.abc import Sequence

    from adapters.base import Delivery
    from worker.commands.backfill.listing import Listing
    from worker.commands.backfill.recorder import Recorder
    from worker.commands.backfill.records import Selection
    from worker.model import Json

SETTLED_AFTER = 60.0  # seconds since an order's last change; the worker has sent by then what it was told about it
MAX_LATER = 10_000  # messages that wait for their time before no more records are read
MAX_DEFECTS = 5  # times a message is tried that meets a defect of ours


class Source(InertQueue):
    """A QueueAdapter of records. An order that was changed a moment ago is left to the worker first.

    `limit`: records at the most.
    """

    def __init__(self, listing: Listing, selection: Selection, recorder: Recorder, limit: int | None) -> None:
        self._listing = listing
        self._selection = selection
        self._recorder = recorder
        self._limit = limit
        self._is_listed = False
        self._unread = ConditionLog("page_not_read", "page_read", logging.WARNING)
        self._ready: deque[RecordDelivery] = deque()
        self._later: list[tuple[float, int, RecordDelivery]] = []  # a heap by monotonic seconds
        self._numbers = count()
        self._changed = Condition()

    def receive(self, max_messages: int, wait: float) -> Sequence[RecordDelivery]:
        """Return what is ready, or the beginning of the next page. Raises Misconfigured."""
        if not (taken := self._take(max_messages)) and not self._is_listed and len(self._later) < MAX_LATER:
            self._list()
            taken = self._take(max_messages)
        if not taken:
            with self._changed:
                self._changed.wait(wait)
        return taken

    def ack(self, deliveries: Sequence[Delivery]) -> None:
        """Do nothing: the recorder is told how messages ended, and whether something was sent."""

    def nack(self, deliveries: Sequence[Delivery], delay: float = 0.0, failure: Failure | None = None) -> None:
        """Have the messages come again; one that meets a defect again and again has failed."""
        for message in deliveries:
            assert isinstance(message, RecordDelivery)
            if failure and failure.error == WorkerError.__name__:
                message.defects += 1
            if failure and message.defects >= MAX_DEFECTS:
                self._recorder.failed(message.record, failure)
            else:
                self._put(message, delay)

    def backlog(self) -> int:
        """Count what is still to be received; records that were not read yet are one."""
        with self._changed:
            return len(self._ready) + len(self._later) + (not self._is_listed)

    def stop(self) -> None:
        """Read no more."""
        self._is_listed = True

    def close(self) -> None:
        """Write down how far all records have ended. Raises OSError."""
        self._recorder.save()

    def _take(self, max_messages: int) -> list[RecordDelivery]:
        now = time.monotonic()
        with self._changed:
            while self._later and self._later[0][0] <= now:
                self._ready.append(heapq.heappop(self._later)[2])
            return [self._ready.popleft() for _ in range(min(max_messages, len(self._ready)))]

    def _list(self) -> None:
        """Read a page. One that cannot be read now is asked for again, however long that takes."""
        try:
            page = self._listing.next_page()[: self._limit]
        except Transient as error:
            self._unread.log(str(error))
            return
        self._unread.log("")
        self._limit = None if self._limit is None else self._limit - len(page)
        self._is_listed = not page or self._limit == 0
        for record_id, resource in page:
            self._begin(record_id, resource)

    def _begin(self, record_id: str, resource: Json | Rejected) -> None:
        if isinstance(resource, Rejected):
            record = Record(record_id, 1)
            self._recorder.begin(record)
            self._recorder.failed(record, Failure(str(resource), "enrich", type(resource).__name__))
            return
        messages = bodies(self._selection, resource)
        record = Record(record_id, len(messages))
        self._recorder.begin(record)
        delay = self._until_settled(resource)
        for body in messages:
            self._put(RecordDelivery(record, body), delay)

    def _until_settled(self, resource: Json) -> float:
        """Return how long the worker may still be about to send what the order's last change was.

        Its event would come second otherwise, and flows do not begin for one that Klaviyo has from a backfill.
        """
        changed_at = parse_time(resource.get("lastModifiedAt"))
        if self._selection.name != "orders" or changed_at is None:
            return 0.0
        age = (datetime.now(UTC) - changed_at).total_seconds()
        return min(max(SETTLED_AFTER - age, 0.0), SETTLED_AFTER)

    def _put(self, message: RecordDelivery, delay: float) -> None:
        with self._changed:
            if delay > 0:
                heapq.heappush(self._later, (time.monotonic() + delay, next(self._numbers), message))
            else:
                self._ready.append(message)
            self._changed.notify_all()
