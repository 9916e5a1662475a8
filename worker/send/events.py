"""Events in bulk: which may go, in calls that lanes fill together, narrowed to the culprit when one is refused.

A refused call has recorded nothing, so its events may go in bulk again. A call without a proper answer may have
recorded all: it is never repeated in bulk (docs/decisions/0011-bulk-events.md).
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
    from worker.send.bulk import OneByOne

MAX_EVENTS, MAX_BYTES = 1_000, 5_000_000  # of a call: https://developers.klaviyo.com/en/reference/bulk_create_events
_REMEMBERED = 50_000  # events sent last, at least; one that is forgotten could be doubled
PATH = "/api/event-bulk-create-jobs"
_HEAD = b'{"data":{"type":"event-bulk-create-job","attributes":{"events-bulk-create":{"data":['
_TAIL = b"]}}}}"
_ENTRY = (b'{"type":"event-bulk-create","attributes":{"profile":', b',"events":{"data":[', b"]}}}")
_CULPRIT = re.compile(r"/data/attributes/events-bulk-create/data/(\d+)(?:/attributes/events/data/(\d+))?(?:/|$)")

Mode = Literal["auto", "always", "never"]


@dataclass(slots=True)
class _Submission:
    """How many of a lane's records no call has taken yet, and how many have not ended."""

    untaken: int = 0
    open: int = 0


@dataclass(slots=True, eq=False, repr=False)
class _BulkEvent:
    """An event as the bytes of a bulk call, and how it ended; `verdict` None: it is to go alone."""

    profile: bytes  # and, for history, Klaviyo's `backfill`, which an entry has as well as its events
    event: bytes
    share: _Submission
    may_go: Callable[[], bool]  # asked last before every try of the call
    has_ended: bool = False
    verdict: SendResult | None = None


_Entries = dict[bytes, list[_BulkEvent]]  # by profile, in the order of the call


class _NothingLeftError(Exception):
    """All events of a call must go alone by now. It is not made, and says nothing about Klaviyo."""


class BulkEvents:
    """Sends events in bulk. Safe for many threads, whose events share calls."""

    def __init__(self, client: KlaviyoClient, one_by_one: OneByOne, mode: Mode, threshold: int) -> None:
        self._calls = _CallBatcher(client)
        self._one_by_one = one_by_one
        self._mode = mode
        self._threshold = threshold
        self._sent, self._sent_before = set[int](), set[int]()  # hashes: one that two events share costs a call
        self._lock = Lock()

    def select(self, operations: Sequence[Operation]) -> list[tuple[OperationKind, str]]:
        """Return the names of the events that are to go in bulk; none, when they are only a handful.

        All events count as sent from now on: what becomes of a call may never be known.
        """
        same: dict[tuple[str, str], list[Operation]] = defaultdict(list)
        for operation in operations:
            if operation.kind is OperationKind.CREATE_EVENT:
                same[_id(operation)].append(operation)
        with self._lock:
            chosen = [events[-1] for event_id, events in same.items() if self._may_go(event_id, events)]
            self._remember(same)
        return [(event.kind, event.key) for event in chosen] if len(chosen) > self._threshold else []

    def _may_go(self, event_id: tuple[str, str], events: Sequence[Operation]) -> bool:
        metric_and_id = all(event_id)  # without an id, two events of a second would be one
        if self._mode == "auto":
            return metric_and_id and len(events) == 1 and _is_fresh(events[0]) and not self._was_sent(event_id)
        return metric_and_id and self._mode == "always"

    def _was_sent(self, event_id: tuple[str, str]) -> bool:
        return hash(event_id) in self._sent or hash(event_id) in self._sent_before

    def _remember(self, event_ids: Iterable[tuple[str, str]]) -> None:
        self._sent.update(map(hash, event_ids))
        if len(self._sent) >= _REMEMBERED:
            self._sent, self._sent_before = set(), self._sent

    def _still_may_go(self, event: Operation) -> Callable[[], bool]:
        return event.is_first_delivery if self._mode == "auto" and event.is_first_delivery else lambda: True

    def send(self, operations: Sequence[Operation]) -> list[SendResult]:
        """Send the events, no metric and unique_id twice; return what became of each, in their order.

        A call that fails leaves its error to its events; a refused one is narrowed, see narrow.py.
        """
        share = _Submission()
        records = [_record(event, share, self._still_may_go(event)) for event in operations]
        self._calls.send([record for record in records if _fits(record)], share)
        return with_fallback(operations, [record.verdict for record in records], self._one_by_one)


class _CallBatcher:
    """Bulk calls that several lanes fill together (group commit).

    One lane at a time waits for its turn within Klaviyo's limits. When it comes, it takes all that waits, up to
    a call's limits, whoever's it is: the longer the wait, the fuller the call.
    """

    def __init__(self, client: KlaviyoClient) -> None:
        self._client = client
        self._waiting: deque[_BulkEvent] = deque()
        self._changed = Condition()
        self._is_next_taken = False  # a lane waits for the next call's turn

    def send(self, records: Sequence[_BulkEvent], share: _Submission) -> None:
        """Return once every record has ended."""
        with self._changed:
            share.untaken = share.open = len(records)
            self._waiting.extend(records)
        while self._is_mine_to_make(share):
            self._make(share)

    def _is_mine_to_make(self, share: _Submission) -> bool:
        """Wait until the share has ended, False, or the next call is this lane's to make, True."""
        with self._changed:
            self._changed.wait_for(lambda: not share.open or (share.untaken and not self._is_next_taken))
            self._is_next_taken = self._is_next_taken or share.open > 0
            return share.open > 0

    def _make(self, share: _Submission) -> None:
        """Make a call, and those that follow from its refusal, and end all its records."""
        load: list[_BulkEvent] = []
        before = self._client.requests_sent()
        try:
            self._end(self._call(load), None)
        except WorkerError as error:
            self._end(load or self._take_back(share), SendResult(error, min(self._client.requests_sent() - before, 1)))
        except BaseException:  # a defect: what no call took is not left to others, as nobody would learn of its end
            own = self._take_back(share, has_turn=not load)
            self._end([*load, *own], SendResult(Transient("a bulk call of events broke off"), 1))
            raise

    def _call(self, load: list[_BulkEvent]) -> list[_BulkEvent]:
        """Send what waits when the call's turn has come, the load; return which of it must go alone."""

        def send(part: list[_BulkEvent]) -> None:
            with suppress(_NothingLeftError):
                self._client.call("POST", PATH, partial(self._body, part), idempotent=False)
                self._end(part, SendResult(None, 1))

        return isolate_rejected(load, send, _culprits)

    def _body(self, records: list[_BulkEvent]) -> bytes:
        """Return the call as bytes, at every try. With no records yet, this is its turn to take what waits."""
        if not records:
            records.extend(self._take())
        alone = [record for record in records if not record.may_go()]
        self._end(alone, None)
        records[:] = [record for record in records if not record.has_ended]
        if not records:
            raise _NothingLeftError
        return _body(_entries(records))

    def _take(self) -> list[_BulkEvent]:
        """Take what the next call has room for, and leave the one after it to others."""
        taken: list[_BulkEvent] = []
        profiles: set[bytes] = set()
        size = len(_HEAD + _TAIL)
        with self._changed:
            while self._waiting and len(taken) < MAX_EVENTS:
                size += _size(self._waiting[0], profiles)
                if taken and size > MAX_BYTES:
                    break
                record = self._waiting.popleft()
                record.share.untaken -= 1
                profiles.add(record.profile)
                taken.append(record)
            self._is_next_taken = False
            self._changed.notify_all()
        return taken

    def _take_back(self, share: _Submission, *, has_turn: bool = True) -> list[_BulkEvent]:
        """Take out a lane's own records, and leave the next call, if it was this lane's to make, to others."""
        with self._changed:
            own = [record for record in self._waiting if record.share is share]
            self._waiting = deque(record for record in self._waiting if record.share is not share)
            share.untaken = 0
            self._is_next_taken = self._is_next_taken and not has_turn
            self._changed.notify_all()
        return own

    def _end(self, records: Iterable[_BulkEvent], verdict: SendResult | None) -> None:
        with self._changed:
            for record in records:
                if not record.has_ended:
                    record.has_ended, record.verdict = True, verdict
                    record.share.open -= 1
            self._changed.notify_all()


def _id(event: Operation) -> tuple[str, str]:
    """Return metric and unique_id. The profile is left out: Klaviyo may know one by several identifiers."""
    attributes = as_dict(as_dict(event.resource).get("attributes"))
    metric = as_dict(as_dict(as_dict(attributes.get("metric")).get("data")).get("attributes"))
    return as_text(metric.get("name")), as_text(attributes.get("unique_id"))


def _is_fresh(event: Operation) -> bool:
    return event.is_first_delivery is not None and event.is_first_delivery()


def _record(event: Operation, share: _Submission, may_go: Callable[[], bool]) -> _BulkEvent:
    resource = event.resource or {}
    attributes = {name: value for name, value in resource["attributes"].items() if name != "profile"}
    profile = orjson.dumps(resource["attributes"]["profile"])
    if attributes.get("backfill"):
        profile += b',"backfill":true'
    return _BulkEvent(profile, orjson.dumps(resource | {"attributes": attributes}), share, may_go)


def _fits(record: _BulkEvent) -> bool:
    return len(_HEAD + _TAIL) + _size(record, set()) <= MAX_BYTES


def _size(record: _BulkEvent, profiles: set[bytes]) -> int:
    """Return how many bytes a record adds to a call that names these profiles; a comma is counted for each."""
    entry = 0 if record.profile in profiles else len(b"".join(_ENTRY)) + len(record.profile) + 1
    return entry + len(record.event) + 1


def _entries(records: Iterable[_BulkEvent]) -> _Entries:
    entries: _Entries = defaultdict(list)
    for record in records:
        entries[record.profile].append(record)
    return entries


def body_of(events: Iterable[Operation]) -> bytes:
    """Return the body of one call with these events."""
    return _body(_entries(_record(event, _Submission(), lambda: True) for event in events))


def _body(entries: _Entries) -> bytes:
    """Join the fragments: nothing is serialised twice."""
    begin, middle, end = _ENTRY
    written = (
        b"".join((begin, profile, middle, b",".join(record.event for record in records), end))
        for profile, records in entries.items()
    )
    return b"".join((_HEAD, b",".join(written), _TAIL))


def _culprits(records: list[_BulkEvent], pointer: str) -> list[_BulkEvent]:
    """Return the event a pointer names, or all of the profile it names; [] when it names none that is there."""
    match = _CULPRIT.match(pointer)
    entry = list(_entries(records).values())[int(match[1]) :][:1] if match else []
    found = entry[0] if entry else []
    return found[int(match[2]) :][:1] if match and match[2] else found
