"""The bulk sender for events: it selects events, and sends them in bulk calls that several lanes share.

A bulk call is one request with many events. If Klaviyo rejects a bulk call, it records none of its events, so the valid
events are sent in bulk again. If a bulk call fails without a usable response, Klaviyo may have recorded its events, so
they are never sent in bulk again (docs/decisions/0011-bulk-events.md).
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

# Limits of a bulk call: https://developers.klaviyo.com/en/reference/bulk_create_events
MAX_EVENTS = 1_000
MAX_BYTES = 5_000_000
REMEMBERED_EVENTS = 50_000  # minimum number; if an event is forgotten, a retry can send it in bulk and duplicate it
PATH = "/api/event-bulk-create-jobs"
_HEAD = b'{"data":{"type":"event-bulk-create-job","attributes":{"events-bulk-create":{"data":['
_TAIL = b"]}}}}"
_ENTRY = (b'{"type":"event-bulk-create","attributes":{"profile":', b',"events":{"data":[', b"]}}}")
_CULPRIT = re.compile(r"/data/attributes/events-bulk-create/data/(\d+)(?:/attributes/events/data/(\d+))?(?:/|$)")

BulkMode = Literal["auto", "always", "never"]


@dataclass(slots=True)
class _SendProgress:
    """Counts of the events that a lane sends together: those that wait for a bulk call, and those without a result."""

    waiting: int = 0
    unfinished: int = 0


@dataclass(slots=True, eq=False, repr=False)
class _BulkEvent:
    """An event as bytes for a bulk call, with its result."""

    profile: bytes  # JSON. A backfill appends `,"backfill":true`, which Klaviyo expects in the entry and in the event
    event: bytes  # JSON
    progress: _SendProgress  # of the lane that sends the event
    can_send_in_bulk: Callable[[], bool]  # checked before every request
    is_finished: bool = False
    result: BulkResult = None


_Entries = dict[bytes, list[_BulkEvent]]  # profile -> its events, in the order of the bulk call


class _EmptyCallError(Exception):
    """A bulk call has no events left. It is not a WorkerError, because the circuit breaker must not count it."""


class BulkEvents:
    """The bulk sender for events. Safe for many threads. Their events share bulk calls."""

    def __init__(
        self, client: KlaviyoClient, send_individually: SendIndividually, mode: BulkMode, threshold: int
    ) -> None:
        self._batcher = _CallBatcher(client)
        self._send_individually = send_individually
        self._mode = mode
        self._threshold = threshold
        # Hashes of the ids of sent events, in two generations. After a collision, an event is sent individually.
        self._sent: set[int] = set()
        self._sent_earlier: set[int] = set()
        self._lock = Lock()

    def select(self, operations: Sequence[Operation]) -> list[OperationId]:
        """Return the ids of the events to send in bulk, or [] if there are too few.

        Every event of the batch is remembered as sent, because the result of a request can stay unknown.
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
        has_id = all(event_id)  # without ids, Klaviyo treats events of the same second as duplicates
        if self._mode == "auto":
            return has_id and len(events) == 1 and _is_first_delivery(events[0]) and not self._was_sent(event_id)
        return has_id and self._mode == "always"

    def _was_sent(self, event_id: tuple[str, str]) -> bool:
        return hash(event_id) in self._sent or hash(event_id) in self._sent_earlier

    def _remember(self, event_ids: Iterable[tuple[str, str]]) -> None:
        self._sent.update(map(hash, event_ids))
        if len(self._sent) >= REMEMBERED_EVENTS:
            self._sent_earlier = self._sent
            self._sent = set()

    def _bulk_check(self, event: Operation) -> Callable[[], bool]:
        return event.is_first_delivery if self._mode == "auto" and event.is_first_delivery else _always

    def send(self, operations: Sequence[Operation]) -> list[SendResult]:
        """Send the events and return their results in the same order. Their metric and unique_id must be distinct.

        If a bulk call fails, all its events get its error. If Klaviyo rejects it, it is split: see isolate_rejected.
        """
        progress = _SendProgress()
        events = [_bulk_event(operation, progress, self._bulk_check(operation)) for operation in operations]
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
        before = self._client.requests_sent()
        try:
            self._finish(self._send_isolating_rejected(taken), None)
        except WorkerError as error:
            # If the bulk call failed before it was granted, it has taken no events. Then fail this lane's events.
            result = SendResult(error, min(self._client.requests_sent() - before, 1))
            self._finish(taken or self._withdraw(progress, release_claim=True), result)
        except BaseException:
            # The messages of this lane are redelivered. Other lanes must not send their events, or duplicates result.
            own = self._withdraw(progress, release_claim=not taken)
            self._finish([*taken, *own], SendResult(Transient("a bulk call of events failed unexpectedly"), 1))
            raise

    def _send_isolating_rejected(self, taken: list[_BulkEvent]) -> list[_BulkEvent]:
        """Send waiting events in a bulk call and add them to `taken`. Return the events to send individually."""

        def send(part: list[_BulkEvent]) -> None:
            with suppress(_EmptyCallError):
                self._client.call("POST", PATH, partial(self._next_body, part), idempotent=False)
                self._finish(part, SendResult(None, 1))

        return isolate_rejected(taken, send, _culprits)

    def _next_body(self, events: list[_BulkEvent]) -> bytes:
        """Return the body of the next request. The client calls this when the rate limiter has granted the request.

        Before the first request `events` is empty, and the waiting events are added to it. Events that can no longer be
        sent in bulk are removed from it. Raises _EmptyCallError if no event remains.
        """
        if not events:
            events.extend(self._take_waiting())
        self._finish([event for event in events if not event.can_send_in_bulk()], None)
        events[:] = [event for event in events if not event.is_finished]
        if not events:
            raise _EmptyCallError
        return _encode(_entries(events))

    def _take_waiting(self) -> list[_BulkEvent]:
        """Take the waiting events for this bulk call, and let another lane claim the next one."""
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
        """Take back the waiting events of this lane and return them.

        If `release_claim` is True, this lane cannot make the bulk call that it has claimed: let another lane claim it.
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
    """Return the body of one bulk call with these events."""
    return _encode(_entries(_bulk_event(operation, _SendProgress(), _always) for operation in operations))


def _event_id(event: Operation) -> tuple[str, str]:
    """Return metric and unique_id, without the profile: Klaviyo can know a profile by several identifiers."""
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
    """Return the number of bytes that an event adds to a bulk call that already has these profiles.

    Each part has a comma.
    """
    entry = 0 if event.profile in profiles else len(b"".join(_ENTRY)) + len(event.profile) + 1
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
