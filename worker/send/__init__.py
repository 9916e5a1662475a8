"""[Operation] -> what became of each. The only stage that writes to Klaviyo; every write may be repeated.

A few operations go one by one (single.py), many of a kind in bulk: events.py, profiles.py, catalog.py.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from worker.model import Operation, OperationKind, SendResult
from worker.send.catalog import BulkCatalog
from worker.send.events import BulkEvents
from worker.send.jobs import BulkJobs
from worker.send.one_by_one import SingleSender
from worker.send.profiles import BulkProfiles
from worker.send.requests import Request, request_for

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from threading import Event

    from worker.klaviyo.client import KlaviyoClient
    from worker.send.bulk import Bulk
    from worker.send.events import Mode

__all__ = ["Request", "Sender", "request_for"]

# What later phases need must be there first; within a phase operations go side by side.
PHASES: tuple[frozenset[OperationKind], ...] = (
    frozenset(
        {
            OperationKind.CREATE_EVENT,
            OperationKind.UPSERT_PROFILE,
            OperationKind.UPSERT_CATEGORY,
            OperationKind.ENSURE_CATEGORY,
        }
    ),
    frozenset({OperationKind.UPSERT_ITEM, OperationKind.DELETE_PROFILE}),
    frozenset(
        {OperationKind.DELETE_STALE_VARIANTS, OperationKind.DELETE_VARIANT}
    ),  # first: a sku may have moved to another product
    frozenset({OperationKind.UPSERT_VARIANT, OperationKind.UPDATE_INVENTORY}),
    frozenset({OperationKind.DELETE_ITEM, OperationKind.DELETE_CATEGORY}),
)


class Sender:
    """Carries out operations: a few side by side, many of a kind in bulk. Safe for many threads.

    `stopping` ends the wait for jobs that Klaviyo works on.
    """

    def __init__(
        self,
        client: KlaviyoClient,
        concurrency: int,
        stopping: Event,
        *,
        bulk_events: Mode = "auto",
        bulk_threshold: int = 10,
    ) -> None:
        events, profiles, catalog = (ThreadPoolExecutor(concurrency, thread_name_prefix="klaviyo") for _ in range(3))
        # As with the lanes: no order waits for threads that the limits for deletions, say, keep waiting.
        self._executors = dict.fromkeys(OperationKind, catalog) | {
            OperationKind.CREATE_EVENT: events,
            OperationKind.UPSERT_PROFILE: profiles,
            OperationKind.DELETE_PROFILE: profiles,
        }
        self._single = SingleSender(client)
        jobs = BulkJobs(client, stopping)
        self._bulks: tuple[Bulk, ...] = (
            BulkEvents(client, self._one_by_one, bulk_events, bulk_threshold),
            BulkProfiles(jobs, self._one_by_one, bulk_threshold),
            BulkCatalog(client, jobs, self._single, catalog, self._one_by_one, bulk_threshold),
        )

    def send(self, operations: Sequence[Operation]) -> list[SendResult]:
        """Carry out the operations; return what became of each, in their order.

        Operations of one kind and key are done once: the last counts for all of them.
        """
        ways = {name: bulk for bulk in self._bulks for name in bulk.select(operations)}
        distinct = {(operation.kind, operation.key): operation for operation in operations}
        results: dict[tuple[OperationKind, str], SendResult] = {}
        for phase in PHASES:
            group = {name: operation for name, operation in distinct.items() if name[0] in phase}
            singly = {name: operation for name, operation in group.items() if name not in ways}
            under_way = self._one_by_one(list(singly.values()))
            for bulk in self._bulks:
                theirs = {name: operation for name, operation in group.items() if ways.get(name) is bulk}
                if theirs:
                    results |= zip(theirs, bulk.send(list(theirs.values())), strict=True)
            results |= zip(singly, under_way, strict=True)
        return [results[operation.kind, operation.key] for operation in operations]

    def close(self) -> None:
        """Drop what has not begun."""
        for executor in set(self._executors.values()):
            executor.shutdown(wait=False, cancel_futures=True)

    def _one_by_one(self, operations: Sequence[Operation]) -> Iterable[SendResult]:
        """Begin to carry out operations of one effect side by side, and yield their results."""
        if len(operations) <= 1:  # an idle worker pays for no thread hop
            return map(self._single.send, operations)
        return self._executors[operations[0].kind].map(self._single.send, operations)
