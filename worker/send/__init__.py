"""The send stage: sends operations to Klaviyo and returns a result for each.

No other stage writes to Klaviyo. Every operation can be repeated without a second effect. If a batch has few events,
they are sent individually (single.py). If it has many, they are sent in bulk (events.py). profiles.py sends all
profiles, and catalog/ all catalog entries, because they read them first.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple

from worker.model import Effect, Operation, OperationKind, SendResult
from worker.send.catalog.sender import CatalogSender
from worker.send.consent import Consents
from worker.send.event_identity import EventIdentities
from worker.send.events import BulkEvents
from worker.send.jobs import BulkJobs
from worker.send.profiles import GUEST_JOB_TIMEOUT, Profiles
from worker.send.requests import COLLECTION, Request, request_for
from worker.send.single import SingleSender
from worker.telemetry.defects import describe_defect, report_defect

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Sequence
    from threading import Event

    from worker.klaviyo.client import KlaviyoClient
    from worker.send.bulk import BulkSender, OperationId

__all__ = ["Request", "SendOptions", "Sender", "request_for"]

# Phases run in sequence. The operations of a phase are sent concurrently.
PHASES: tuple[frozenset[OperationKind], ...] = (
    frozenset({OperationKind.CREATE_EVENT, OperationKind.UPSERT_GUEST, OperationKind.UPSERT_PROFILE}),
    frozenset({OperationKind.DELETE_PROFILE}),
)


class SendOptions(NamedTuple):
    """How operations are sent.

    More than `bulk_threshold` operations of a kind are sent in bulk. A bulk job ends within `job_timeout` seconds.
    After `stopping` is set, bulk jobs are waited for `stop_wait` seconds at most. `merges_guests`: see Planner.
    `resubscribes`: see Consents.
    """

    bulk_threshold: int
    job_timeout: float
    stop_wait: float
    merges_guests: bool
    resubscribes: bool


class Sender:
    """The send stage: sends operations individually or in bulk. Safe for many threads.

    `max_requests` is the maximum number of concurrent requests per effect. `allows_bulk_events` returns whether events
    may be sent in bulk.
    """

    def __init__(
        self,
        client: KlaviyoClient,
        max_requests: int,
        stopping: Event,
        options: SendOptions,
        *,
        allows_bulk_events: Callable[[], bool],
    ) -> None:
        executors = {effect: ThreadPoolExecutor(max_requests, thread_name_prefix="klaviyo") for effect in Effect}
        catalog = executors[Effect.CATALOG]
        self._executors = dict.fromkeys(OperationKind, catalog) | {
            OperationKind.CREATE_EVENT: executors[Effect.EVENTS],
            OperationKind.UPSERT_GUEST: executors[Effect.EVENTS],
            OperationKind.UPSERT_PROFILE: executors[Effect.PROFILES],
            OperationKind.DELETE_PROFILE: executors[Effect.DELETIONS],
        }
        jobs = BulkJobs(client, stopping, options.job_timeout, options.stop_wait)
        threshold = options.bulk_threshold
        consents = Consents(client, resubscribes=options.resubscribes)
        guest_jobs = BulkJobs(client, stopping, min(options.job_timeout, GUEST_JOB_TIMEOUT), options.stop_wait)
        merges_guests = options.merges_guests
        profiles = Profiles(client, jobs, guest_jobs, executors, consents, threshold, merges_guests=merges_guests)
        self._identities = EventIdentities(client)
        self._single = SingleSender(client, profiles)
        self._bulk_senders: tuple[BulkSender, ...] = (
            BulkEvents(client, self._send_individually, allows_bulk_events, threshold),
            profiles,
        )
        self._catalog = CatalogSender(client, jobs, catalog, threshold)

    def send(self, operations: Sequence[Operation]) -> list[SendResult]:
        """Send the operations and return their results in the same order.

        If several operations have the same kind and key, only one is sent: see _distinct. All of them get its result.
        """
        catalog = [operation for operation in operations if operation.kind in COLLECTION]
        catalog_results = iter(self._send_catalog(catalog))
        others = iter(self._send_others([operation for operation in operations if operation.kind not in COLLECTION]))
        return [next(catalog_results if operation.kind in COLLECTION else others) for operation in operations]

    def _send_catalog(self, operations: Sequence[Operation]) -> list[SendResult]:
        """Send operations on the catalog. After an unexpected error, send them one after the other to isolate it."""
        if not operations:
            return []
        try:
            return self._catalog.send(operations)
        except Exception as defect:  # noqa: BLE001 - a defect must not affect the other operations
            error = report_defect("send", describe_defect(defect))
        if len(operations) == 1:
            return [SendResult(error, 0)]
        return [result for operation in operations for result in self._send_catalog([operation])]

    def _send_others(self, operations: Sequence[Operation]) -> list[SendResult]:
        """Send operations on events and profiles."""
        identified = self._identities.identify(operations)
        results = iter(self._send_identified([each.operation for each in identified if each.error is None]))
        sent = [SendResult(each.error, 0) if each.error else next(results) for each in identified]
        if written := [o for o, result in zip(operations, sent, strict=True) if _is_written_customer(o, result)]:
            self._identities.remember(written)
        return [
            result._replace(requests=result.requests + each.requests)
            for each, result in zip(identified, sent, strict=True)
        ]

    def _send_identified(self, operations: Sequence[Operation]) -> list[SendResult]:
        bulk_sender_of = {name: sender for sender in self._bulk_senders for name in _select(sender, operations)}
        distinct = _distinct(operations)
        results: dict[OperationId, SendResult] = {}
        for phase in PHASES:
            group = {name: operation for name, operation in distinct.items() if name[0] in phase}
            single = {name: operation for name, operation in group.items() if name not in bulk_sender_of}
            single_results = self._send_individually(list(single.values()))  # sent while the bulk senders run
            for sender in self._bulk_senders:
                bulk = {name: operation for name, operation in group.items() if bulk_sender_of.get(name) is sender}
                if bulk:
                    results |= zip(bulk, self._send_in_bulk(sender, list(bulk.values())), strict=True)
            results |= zip(single, single_results, strict=True)
        return [results[operation.kind, operation.key] for operation in operations]

    def close(self) -> None:
        """Cancel the operations that have not started. Do not wait for the others."""
        for executor in set(self._executors.values()):
            executor.shutdown(wait=False, cancel_futures=True)

    def _send_in_bulk(self, sender: BulkSender, operations: Sequence[Operation]) -> Iterable[SendResult]:
        """Send operations in bulk. After an unexpected error, send them individually to isolate it."""
        try:
            return sender.send(operations)
        except Exception as defect:  # noqa: BLE001 - a defect must not affect the other operations
            report_defect("send", describe_defect(defect))
            return self._send_individually(operations)

    def _send_individually(self, operations: Sequence[Operation]) -> Iterable[SendResult]:
        """Send operations of one effect concurrently. Return an iterable of their results in the same order."""
        if len(operations) <= 1:  # in the calling thread, because a thread switch would only add latency
            return map(self._single.send, operations)
        return self._executors[operations[0].kind].map(self._single.send, operations)


def _is_written_customer(operation: Operation, result: SendResult) -> bool:
    return operation.kind is OperationKind.UPSERT_PROFILE and result.error is None


def _distinct(operations: Sequence[Operation]) -> dict[OperationId, Operation]:
    """Return one operation for each kind and key: the last state, or the first event.

    Klaviyo, too, keeps the first event: an order that is shipped and then delivered was fulfilled when it was shipped.
    """
    events = [operation for operation in operations if operation.kind is OperationKind.CREATE_EVENT]
    return {(operation.kind, operation.key): operation for operation in (*operations, *reversed(events))}


def _select(sender: BulkSender, operations: Sequence[Operation]) -> Collection[OperationId]:
    """Return the ids of the operations to send in bulk: none after an unexpected error."""
    try:
        return sender.select(operations)
    except Exception as defect:  # noqa: BLE001 - a defect must not affect the other operations
        report_defect("send", describe_defect(defect))
        return ()
