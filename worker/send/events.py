"""The bulk sender for events: it selects events, and sends them in bulk calls that several lanes share.

A bulk call is one request with many events. It can repeat events that Klaviyo already has, so the worker makes bulk
calls only if the account ignores repeats (docs/decisions/0011-bulk-events.md). If Klaviyo rejects a bulk call, it
records none of its events, so the valid events are sent in bulk again.
"""

from __future__ import annotations

import re
from collections import defaultdict, deque
from dataclasses import dataclass
from functools import partial
from threading import Condition
from typing import TYPE_CHECKING

import orjson

from worker.errors import Transient, WorkerError
from worker.model import Operation, OperationKind, SendResult
from worker.send.bulk import isolate_rejected, with_fallback

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from worker.klaviyo.client import KlaviyoClient
    from worker.send.bulk import BulkResult, OperationId, SendIndividually

# Limits of a bulk call: https://developers.klaviyo.com/en/reference/bulk_create_events
MAX_EVENTS = 1_000
MAX_BYTES = 5_000_000
PATH = "/api/event-bulk-create-jobs"
_HEAD = b'{"data":{"type":"event-bulk-create-job","attributes":{"events-bulk-create":{"data":['
_TAIL = b"]}}}}"
_ENTRY = (b'{"type":"event-bulk-create","attributes":{"profile":', b',"events":{"data":[', b"]}}}")
_ENTRY_BYTES = len(b"".join(_ENTRY))
_CULPRIT = re.compile(r"/data/attributes/events-bulk-create/data/(\d+)(?:/attributes/events/data/(\d+))?(?:/|$)")

EventId = tuple[str, str]  # metric and unique_id, without the profile: Klaviyo can know it by several identifiers


@dataclass(slots=True)
class _SendProgress:
    """Counts of the events that a lane sends together: those that wait for a bulk call, and those without a result."""

    waiting: int
    unfinished: int


@dataclass(slots=True, eq=False, repr=False)
class _BulkEvent:
    """An event as bytes for a bulk call, with its result."""

    id: EventId
    profile: bytes  # JSON. A backfill appends `,"backfill":true`, which Klaviyo expects in the entry and in the event
    event: bytes  # JSON
    progress: _SendProgress  # of the lane that sends the event
    is_finished: bool = False
    result: BulkResult = None


_Entries = dict[bytes, list[_BulkEvent]]  # profile -> its events, in the order of the bulk call


class BulkEvents:
    """The bulk sender for events. Safe for many threads. Their events share bulk calls.

    `is_allowed` returns whether events may be sent in bulk. It is asked for every batch with more than `threshold`
    events.
    """

    def __init__(
        self,
        client: KlaviyoClient,
        send_individually: SendIndividually,
        is_allowed: Callable[[], bool],
        threshold: int,
    ) -> None:
        self._batcher = _CallBatcher(client)
        self._send_individually = send_individually
        self._is_allowed = is_allowed
        self._threshold = threshold

    def select(self, operations: Sequence[Operation]) -> list[OperationId]:
        """Return the ids of the events to send in bulk, or [] if there are too few or bulk calls are not allowed.

        Events without an id are left out, because Klaviyo treats two of them as one if they have the same second. If
        several events have the same id, only the first of them is selected.
        """
        selected: list[OperationId] = []
        seen: set[EventId] = set()
        for event in operations:
            if event.kind is OperationKind.CREATE_EVENT and all(event_id := _event_id(event)) and event_id not in seen:
                seen.add(event_id)
                selected.append((event.kind, event.key))
        return selected if len(selected) > self._threshold and self._is_allowed() else []

    def send(self, operations: Sequence[Operation]) -> list[SendResult]:
        """Send the events and return their results in the same order. Their ids must be distinct.

        If a bulk call fails, all its events get its error. If Klaviyo rejects it, it is split: see isolate_rejected.
        """
        progress = _SendProgress(0, 0)
        events = [_bulk_event(operation, progress) for operation in operations]
        self._batcher.send([event for event in events if _fits_alone(event)], progress)
        return with_fallback(operations, [event.result for event in events], self._send_individually)


class _CallBatcher:
    """Batches the events of all lanes into bulk calls (group commit).

    One lane claims the next bulk call and waits until the rate limiter grants it. The bulk call then takes the waiting
    events of all lanes, up to its limits. During the wait, other lanes can add events, but cannot claim a bulk call.
    """

    def __init__(self, client: KlaviyoClient) -> None:
        self._client = client
        self._waiting: deque[_BulkEvent] = deque()
        self._changed = Condition()
        self._is_next_call_claimed = False  # True while a lane waits until the rate limiter grants the bulk call

    def send(self, events: Sequence[_BulkEvent], progress: _SendProgress) -> None:
        """Send the events of a lane. Return when all of them are finished."""
        with self._changed:
            progress.waiting = progress.unfinished = len(events)
            self._waiting.extend(events)
        while self._claim_next_call(progress):
            self._make_call(progress)

    def _claim_next_call(self, progress: _SendProgress) -> bool:
        """Wait for the next bulk call and claim it. Return False if all events of this lane are finished first."""
        with self._changed:
            self._changed.wait_for(
                lambda: not progress.unfinished or (progress.waiting and not self._is_next_call_claimed)
            )
            if not progress.unfinished:
                return False
            self._is_next_call_claimed = True
            return True

    def _make_call(self, progress: _SendProgress) -> None:
        """Make the claimed bulk call, and more bulk calls if Klaviyo rejects it. Finish all its events."""
        taken: list[_BulkEvent] = []
        try:
            self._finish(isolate_rejected(taken, self._call, _culprits), None)
        except WorkerError as error:
            self._fail(taken, progress, error)
        except BaseException:
            # If this call has taken events, the others of this lane still wait. Other lanes can send them: this lane
            # sends its events individually, and Klaviyo ignores the repeats.
            self._fail(taken, progress, Transient("a bulk call of events failed unexpectedly"))
            raise

    def _call(self, events: list[_BulkEvent]) -> None:
        """Send the events in one bulk call, or the waiting events if there are none. Raises WorkerError."""
        self._client.call("POST", PATH, partial(self._body, events))
        self._finish(events, SendResult(None, 1))

    def _body(self, events: list[_BulkEvent]) -> bytes:
        """Return the body of a request. The client calls this when the rate limiter has granted the request.

        Before the first request `events` is empty, and the waiting events are added to it.
        """
        if not events:
            events.extend(self._take_waiting())
        return _encode(_entries(events))

    def _take_waiting(self) -> list[_BulkEvent]:
        """Take the waiting events for this bulk call, and let another lane claim the next one.

        The bulk call ends before a repeated id: https://developers.klaviyo.com/en/reference/bulk_create_events
        """
        taken: dict[EventId, _BulkEvent] = {}
        profiles: set[bytes] = set()
        size = len(_HEAD + _TAIL)
        with self._changed:
            while self._waiting and len(taken) < MAX_EVENTS:
                event = self._waiting[0]
                size += _size(event, profiles)
                if event.id in taken or (taken and size > MAX_BYTES):
                    break
                self._waiting.popleft()
                event.progress.waiting -= 1
                profiles.add(event.profile)
                taken[event.id] = event
            self._is_next_call_claimed = False
            self._changed.notify_all()
        return list(taken.values())

    def _withdraw(self, progress: _SendProgress) -> list[_BulkEvent]:
        """Take back the waiting events of this lane and return them. Let another lane claim the next bulk call."""
        with self._changed:
            own = [event for event in self._waiting if event.progress is progress]
            self._waiting = deque(event for event in self._waiting if event.progress is not progress)
            progress.waiting = 0
            self._is_next_call_claimed = False
            self._changed.notify_all()
        return own

    def _fail(self, taken: list[_BulkEvent], progress: _SendProgress, error: WorkerError) -> None:
        """Finish the events of a failed bulk call. If it failed before it was granted, these are the lane's own."""
        self._finish(taken or self._withdraw(progress), SendResult(error, 1 if taken else 0))

    def _finish(self, events: Iterable[_BulkEvent], result: BulkResult) -> None:
        with self._changed:
            for event in events:
                if not event.is_finished:
                    event.is_finished = True
                    event.result = result
                    event.progress.unfinished -= 1
            self._changed.notify_all()


def bulk_body(operations: Iterable[Operation]) -> bytes:
    """Return the body of one bulk call with these events."""
    return _encode(_entries(_bulk_event(operation, _SendProgress(0, 0)) for operation in operations))


def _event_id(event: Operation) -> EventId:
    attributes = (event.resource or {})["attributes"]
    return attributes["metric"]["data"]["attributes"]["name"], attributes.get("unique_id", "")


def _bulk_event(event: Operation, progress: _SendProgress) -> _BulkEvent:
    resource = event.resource or {}
    attributes = resource["attributes"].copy()
    profile = orjson.dumps(attributes.pop("profile"))
    if "backfill" in attributes:
        profile += b',"backfill":true'
    return _BulkEvent(_event_id(event), profile, orjson.dumps({**resource, "attributes": attributes}), progress)


def _fits_alone(event: _BulkEvent) -> bool:
    return len(_HEAD + _TAIL) + _size(event, set()) <= MAX_BYTES


def _size(event: _BulkEvent, profiles: set[bytes]) -> int:
    """Return the number of bytes that an event adds to a bulk call that already has these profiles.

    Each part has a comma.
    """
    entry = 0 if event.profile in profiles else _ENTRY_BYTES + len(event.profile) + 1
    return entry + len(event.event) + 1


def _entries(events: Iterable[_BulkEvent]) -> _Entries:
    entries: _Entries = defaultdict(list)
    for event in events:
        entries[event.profile].append(event)
    return entries


def _encode(entries: _Entries) -> bytes:
    """Return the body of a bulk call. It is joined from the bytes of the events."""
    start, middle, end = _ENTRY
    fragments = (
        b"".join((start, profile, middle, b",".join(event.event for event in events), end))
        for profile, events in entries.items()
    )
    return b"".join((_HEAD, b",".join(fragments), _TAIL))


def _culprits(events: list[_BulkEvent], pointer: str) -> list[_BulkEvent]:
    """Return the event that a pointer names, or all events of the profile that it names, or []."""
    match = _CULPRIT.match(pointer)
    entry = list(_entries(events).values())[int(match[1]) :][:1] if match else []
    found = entry[0] if entry else []
    return found[int(match[2]) :][:1] if match and match[2] else found
