"""Bulk creation of events: which events qualify, calls that lanes share, and the search for rejected events.

Klaviyo records nothing of a call that it refuses, so the other events of such a call can be sent in bulk again. If a
call fails without a usable response, Klaviyo may have recorded its events. Such a call is never repeated in bulk
(docs/decisions/0011-bulk-events.md).
"""

from __future__ import annotations

import re
from collections import defaultdict, deque
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from threading import Condition, Lock
from typing import TYPE_CHECKING, Literal

import orjson

from worker.errors import Transient, WorkerError
from worker.json_access import as_dict, as_text
from worker.model import Operation, OperationKind, SendResult
from worker.send.bulk import isolate_rejected, with_fallback

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from worker.klaviyo.client import KlaviyoClient
    from worker.send.bulk import BulkResult, OperationId, SendIndividually

# Limits of a call: https://developers.klaviyo.com/en/reference/bulk_create_events
MAX_EVENTS = 1_000
MAX_BYTES = 5_000_000
REMEMBERED_EVENTS = 50_000  # at least; a forgotten event can be sent in bulk again, as a duplicate
PATH = "/api/event-bulk-create-jobs"
_HEAD = b'{"data":{"type":"event-bulk-create-job","attributes":{"events-bulk-create":{"data":['
_TAIL = b"]}}}}"
_ENTRY = (b'{"type":"event-bulk-create","attributes":{"profile":', b',"events":{"data":[', b"]}}}")
_CULPRIT = re.compile(r"/data/attributes/events-bulk-create/data/(\d+)(?:/attributes/events/data/(\d+))?(?:/|$)")

BulkMode = Literal["auto", "always", "never"]


@dataclass(slots=True)
class _SendProgress:
    """The events that a lane sends together: how many wait for a call, and how many have no result yet."""

    waiting: int = 0
    unfinished: int = 0


@dataclass(slots=True, eq=False, repr=False)
class _BulkEvent:
    """An event as the bytes of a bulk call, with its result."""

    profile: bytes  # JSON; followed by `,"backfill":true` for history, which Klaviyo expects in the entry too
    event: bytes
    progress: _SendProgress
    can_send_in_bulk: Callable[[], bool]  # called before every request
    is_finished: bool = False
    result: BulkResult = None


_Entries = dict[bytes, list[_BulkEvent]]  # profile -> its events, in the order of the call


class _EmptyCallError(Exception):
    """No event of a call may be sent in bulk any more. Not a WorkerError: the circuit breaker must not count it."""


class BulkEvents:
    """Bulk sender for events. Safe for many threads, whose events share calls."""

    def __init__(
        self, client: KlaviyoClient, send_individually: SendIndividually, mode: BulkMode, threshold: int
    ) -> None:
        self._batcher = _CallBatcher(client)
        self._send_individually = send_individually
        self._mode = mode
        self._threshold = threshold
        # Hashes of the ids of sent events, in two generations. A collision costs one single call.
        self._sent: set[int] = set()
        self._sent_before: set[int] = set()
        self._lock = Lock()

    def select(self, operations: Sequence[Operation]) -> list[OperationId]:
        """Return the ids of the events to send in bulk; none if there are too few.

        From now on every event of the batch counts as sent, because the result of a call can stay unknown.
        """
        by_id: dict[tuple[str, str], list[Operation]] = defaultdict(list)
        for operation in operations:
            if operation.kind is OperationKind.CREATE_EVENT:
                by_id[_event_id(operation)].append(operation)
        with self._lock:
            selected = [events[-1] for event_id, events in by_id.items() if self._is_eligible(event_id, events)]
            self._remember(by_id)
        return [(event.kind, event.key) for event in selected] if len(selected) > self._threshold else []

    def _is_eligible(self, event_id: tuple[str, str], events: Sequence[Operation]) -> bool:
        has_id = all(event_id)  # without an id, Klaviyo treats two events of one second as duplicates
        if self._mode == "auto":
            return has_id and len(events) == 1 and _is_first_delivery(events[0]) and not self._was_sent(event_id)
        return has_id and self._mode == "always"

    def _was_sent(self, event_id: tuple[str, str]) -> bool:
        return hash(event_id) in self._sent or hash(event_id) in self._sent_before

    def _remember(self, event_ids: Iterable[tuple[str, str]]) -> None:
        self._sent.update(map(hash, event_ids))
        if len(self._sent) >= REMEMBERED_EVENTS:
            self._sent_before = self._sent
            self._sent = set()

    def _bulk_check(self, event: Operation) -> Callable[[], bool]:
        return event.is_first_delivery if self._mode == "auto" and event.is_first_delivery else _always

    def send(self, operations: Sequence[Operation]) -> list[SendResult]:
        """Send the events and return their results in the same order. No two may have the same metric and unique_id.

        The error of a failed call is the result of its events. A refused call is split, see bulk.isolate_rejected.
        """
        progress = _SendProgress()
        events = [_bulk_event(operation, progress, self._bulk_check(operation)) for operation in operations]
        self._batcher.send([event for event in events if _fits_alone(event)], progress)
        return with_fallback(operations, [event.result for event in events], self._send_individually)


class _CallBatcher:
    """Bulk calls that several lanes fill together (group commit).

    One lane at a time claims the next call and waits until Klaviyo's rate limit grants it. Then the call takes all
    waiting events, of this lane and the others, up to the limits of a call. The longer the wait, the fuller the call.
    """

    def __init__(self, client: KlaviyoClient) -> None:
        self._client = client
        self._waiting: deque[_BulkEvent] = deque()
        self._changed = Condition()
        self._is_next_call_claimed = False  # by a lane that waits until the rate limit grants it

    def send(self, events: Sequence[_BulkEvent], progress: _SendProgress) -> None:
        """Return when every event is finished."""
        with self._changed:
            progress.waiting = progress.unfinished = len(events)
            self._waiting.extend(events)
        while self._claim_next_call(progress):
            self._make_call(progress)

    def _claim_next_call(self, progress: _SendProgress) -> bool:
        """Wait until this lane can make the next call, and return True; return False when its events are finished."""
        with self._changed:
            self._changed.wait_for(
                lambda: not progress.unfinished or (progress.waiting and not self._is_next_call_claimed)
            )
            if not progress.unfinished:
                return False
            self._is_next_call_claimed = True
            return True

    def _make_call(self, progress: _SendProgress) -> None:
        """Make a call, and further ones if Klaviyo refuses it; finish all its events."""
        taken: list[_BulkEvent] = []
        before = self._client.requests_sent()
        try:
            self._finish(self._send_isolating_rejected(taken), None)
        except WorkerError as error:
            # If the call failed before the rate limit granted it, it has no events: fail this lane's own events only.
            result = SendResult(error, min(self._client.requests_sent() - before, 1))
            self._finish(taken or self._withdraw(progress, release_claim=True), result)
        except BaseException:
            # This lane returns its messages. No other lane may send their waiting events, or they could be duplicated.
            own = self._withdraw(progress, release_claim=not taken)
            self._finish([*taken, *own], SendResult(Transient("a bulk call of events failed unexpectedly"), 1))
            raise

    def _send_isolating_rejected(self, taken: list[_BulkEvent]) -> list[_BulkEvent]:
        """Send waiting events in a call and add them to `taken`; return the events to send one by one."""

        def send(part: list[_BulkEvent]) -> None:
            with suppress(_EmptyCallError):
                self._client.call("POST", PATH, partial(self._body, part), idempotent=False)
                self._finish(part, SendResult(None, 1))

        return isolate_rejected(taken, send, _culprits)

    def _body(self, events: list[_BulkEvent]) -> bytes:
        """Return the body of the next request. The client calls this when the rate limit has granted the request.

        `events` is empty before the first request of a call: the waiting events are added to it now, so that the call
        holds all that arrived during the wait. Events that may no longer be sent in bulk are removed from it.
        """
        if not events:
            events.extend(self._take_waiting())
        self._finish([event for event in events if not event.can_send_in_bulk()], None)
        events[:] = [event for event in events if not event.is_finished]
        if not events:
            raise _EmptyCallError
        return _body(_entries(events))

    def _take_waiting(self) -> list[_BulkEvent]:
        """Remove from the queue the events of this call, and let another lane claim the next one."""
        taken: list[_BulkEvent] = []
        profiles: set[bytes] = set()
        size = len(_HEAD + _TAIL)
        with self._changed:
            while self._waiting and len(taken) < MAX_EVENTS:
                size += _size(self._waiting[0], profiles)
                if taken and size > MAX_BYTES:
                    break
                event = self._waiting.popleft()
                event.progress.waiting -= 1
                profiles.add(event.profile)
                taken.append(event)
            self._is_next_call_claimed = False
            self._changed.notify_all()
        return taken

    def _withdraw(self, progress: _SendProgress, *, release_claim: bool) -> list[_BulkEvent]:
        """Remove the waiting events of this lane from the queue and return them.

        `release_claim`: this lane has claimed the next call and cannot make it, so let another lane claim it.
        """
        with self._changed:
            own = [event for event in self._waiting if event.progress is progress]
            self._waiting = deque(event for event in self._waiting if event.progress is not progress)
            progress.waiting = 0
            if release_claim:
                self._is_next_call_claimed = False
            self._changed.notify_all()
        return own

    def _finish(self, events: Iterable[_BulkEvent], result: BulkResult) -> None:
        with self._changed:
            for event in events:
                if not event.is_finished:
                    event.is_finished = True
                    event.result = result
                    event.progress.unfinished -= 1
            self._changed.notify_all()


def bulk_body(operations: Iterable[Operation]) -> bytes:
    """Return the body of one call with these events."""
    return _body(_entries(_bulk_event(operation, _SendProgress(), _always) for operation in operations))


def _event_id(event: Operation) -> tuple[str, str]:
    """Return metric and unique_id. The profile does not count: Klaviyo can know one by several identifiers."""
    attributes = as_dict(as_dict(event.resource).get("attributes"))
    metric = as_dict(as_dict(as_dict(attributes.get("metric")).get("data")).get("attributes"))
    return as_text(metric.get("name")), as_text(attributes.get("unique_id"))


def _always() -> bool:
    return True


def _is_first_delivery(event: Operation) -> bool:
    return event.is_first_delivery is not None and event.is_first_delivery()


def _bulk_event(event: Operation, progress: _SendProgress, can_send_in_bulk: Callable[[], bool]) -> _BulkEvent:
    resource = event.resource or {}
    attributes = {name: value for name, value in resource["attributes"].items() if name != "profile"}
    profile = orjson.dumps(resource["attributes"]["profile"])
    if attributes.get("backfill"):
        profile += b',"backfill":true'
    return _BulkEvent(profile, orjson.dumps(resource | {"attributes": attributes}), progress, can_send_in_bulk)


def _fits_alone(event: _BulkEvent) -> bool:
    return len(_HEAD + _TAIL) + _size(event, set()) <= MAX_BYTES


def _size(event: _BulkEvent, profiles: set[bytes]) -> int:
    """Return the bytes that an event adds to a call that already has these profiles, with a comma for each part."""
    entry = 0 if event.profile in profiles else len(b"".join(_ENTRY)) + len(event.profile) + 1
    return entry + len(event.event) + 1


def _entries(events: Iterable[_BulkEvent]) -> _Entries:
    entries: _Entries = defaultdict(list)
    for event in events:
        entries[event.profile].append(event)
    return entries


def _body(entries: _Entries) -> bytes:
    """Return the body of a call, joined from the bytes of its events."""
    start, middle, end = _ENTRY
    fragments = (
        b"".join((start, profile, middle, b",".join(event.event for event in events), end))
        for profile, events in entries.items()
    )
    return b"".join((_HEAD, b",".join(fragments), _TAIL))


def _culprits(events: list[_BulkEvent], pointer: str) -> list[_BulkEvent]:
    """Return the event that a pointer names, or all events of the profile that it names; [] if it names neither."""
    match = _CULPRIT.match(pointer)
    entry = list(_entries(events).values())[int(match[1]) :][:1] if match else []
    found = entry[0] if entry else []
    return found[int(match[2]) :][:1] if match and match[2] else found
