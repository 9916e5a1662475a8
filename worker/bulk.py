"""Events in bulk: which may go, in calls within Klaviyo's limits, narrowed to the culprit when one is refused.

A refused call has recorded nothing, so its events may go in bulk again. A call without a proper answer may have
recorded all: it is never repeated in bulk (docs/decisions/0011-bulk-events.md).
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass
from threading import Lock
from typing import TYPE_CHECKING, Literal, Protocol

import cachetools
import orjson

from worker.errors import Rejected, WorkerError
from worker.loose import as_dict, as_text
from worker.model import Json, Kind, Operation, Sent

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

MAX_EVENTS, MAX_BYTES = 1_000, 5_000_000  # of a call: https://developers.klaviyo.com/en/reference/bulk_create_events
MAX_REFUSALS = 20  # of one call's parts; two culprits among 1,000 are found without pointers
_REMEMBERED = 50_000  # events sent lately; forgetting one could double it where Klaviyo does not count earlier calls
_PATH = "/api/event-bulk-create-jobs"
_HEAD = b'{"data":{"type":"event-bulk-create-job","attributes":{"events-bulk-create":{"data":['
_TAIL = b"]}}}}"
_ENTRY = (b'{"type":"event-bulk-create","attributes":{"profile":', b',"events":{"data":[', b"]}}}")
_CULPRIT = re.compile(r"/data/attributes/events-bulk-create/data/(\d+)(?:/attributes/events/data/(\d+))?(?:/|$)")

Mode = Literal["auto", "always", "never"]


class Client(Protocol):
    """What sending in bulk needs of Klaviyo."""

    def call(self, method: str, path: str, body: Json | bytes | None = None, *, repeat: bool = True) -> Json:
        """Call an endpoint, once or repeatedly, and return the decoded answer. Raises WorkerError."""

    def made(self) -> int:
        """Return how many requests the calling thread has made."""


@dataclass(frozen=True, slots=True)
class _Record:
    """An event as the bytes of a bulk call; `number` is its place among the events to send."""

    number: int
    profile: bytes
    event: bytes


_Entries = dict[bytes, list[_Record]]  # by profile, in the order of the call


class BulkEvents:
    """Sends events in bulk. Safe for many threads.

    `one_by_one` sends events singly, for those a bulk call must do without.
    """

    def __init__(
        self, client: Client, one_by_one: Callable[[Sequence[Operation]], Iterable[Sent]], mode: Mode, threshold: int
    ) -> None:
        self._client = client
        self._one_by_one = one_by_one
        self._mode = mode
        self._threshold = threshold
        self._sent: cachetools.LRUCache[tuple[str, str], bool] = cachetools.LRUCache(_REMEMBERED)
        self._lock = Lock()

    def choose(self, operations: Sequence[Operation]) -> frozenset[str]:
        """Return the keys of the events that are to go in bulk; none, when they are only a handful.

        All events count as sent from now on: what becomes of a call may never be known.
        """
        named: dict[tuple[str, str], list[Operation]] = defaultdict(list)
        for operation in operations:
            if operation.kind is Kind.CREATE_EVENT:
                named[_name(operation)].append(operation)
        with self._lock:
            keys = [same[-1].key for name, same in named.items() if self._may_go(name, same)]
            self._sent.update(dict.fromkeys(named, True))
        return frozenset(keys if len(keys) > self._threshold else ())

    def _may_go(self, name: tuple[str, str], same: Sequence[Operation]) -> bool:
        metric_and_id = all(name)  # without an id, two events of a second would be one
        if self._mode == "auto":
            return metric_and_id and len(same) == 1 and same[0].fresh and name not in self._sent
        return metric_and_id and self._mode == "always"

    def send(self, events: Sequence[Operation]) -> list[Sent]:
        """Send the events, no metric and unique_id twice; return what became of each, in their order.

        A call that fails leaves its own events and those not sent yet with its error. N events that fill C calls
        cost at most C * (2 * MAX_REFUSALS + 1) bulk calls and N single ones, however many are refused. With
        pointers, B culprits, at most MAX_REFUSALS in a call, cost C + B bulk calls and C + B single ones.
        """
        before, accepted = self._client.made(), set[int]()
        records = [_record(number, event) for number, event in enumerate(events)]
        try:
            alone = [record.number for call in _calls(records) for record in self._narrow(call, accepted)]
        except WorkerError as error:
            was_sent = min(self._client.made() - before, 1)
            return [Sent(None if number in accepted else error, was_sent) for number in range(len(events))]
        verdicts = dict(zip(alone, self._one_by_one([events[number] for number in alone]), strict=True))
        return [verdicts.get(number, Sent(None, 1)) for number in range(len(events))]

    def _narrow(self, records: list[_Record], accepted: set[int]) -> list[_Record]:
        """Send records in as few calls as their culprits allow; return those that are to go alone."""
        waiting, alone, refusals = [records], list[_Record](), 0
        while waiting:
            part = waiting.pop()
            if len(part) <= 1 or refusals == MAX_REFUSALS:
                alone += part
                continue
            entries = _entries(part)
            try:
                self._client.call("POST", _PATH, _body(entries), repeat=False)
            except Rejected as error:
                refusals += 1
                culprits = _culprits(entries, error.pointer)
                alone += culprits
                waiting += [_except(culprits, part)] if culprits else _halves(part)
            else:
                accepted |= {record.number for record in part}
        return alone


def _name(event: Operation) -> tuple[str, str]:
    """Return metric and unique_id. The profile is left out: Klaviyo may know one by several identifiers."""
    attributes = as_dict(as_dict(event.resource).get("attributes"))
    metric = as_dict(as_dict(as_dict(attributes.get("metric")).get("data")).get("attributes"))
    return as_text(metric.get("name")), as_text(attributes.get("unique_id"))


def _record(number: int, event: Operation) -> _Record:
    resource = event.resource or {}
    attributes = {name: value for name, value in resource["attributes"].items() if name != "profile"}
    profile = orjson.dumps(resource["attributes"]["profile"])
    return _Record(number, profile, orjson.dumps(resource | {"attributes": attributes}))


def _calls(records: Iterable[_Record]) -> Iterator[list[_Record]]:
    """Split records so that each call is within the limits, or has a single record that alone is not."""
    call: list[_Record] = []
    profiles: set[bytes] = set()
    size = len(_HEAD + _TAIL)
    for record in records:
        added = _size(record, profiles)
        if call and (len(call) == MAX_EVENTS or size + added > MAX_BYTES):
            yield call
            call, profiles, size = [], set(), len(_HEAD + _TAIL)
            added = _size(record, profiles)
        call.append(record)
        profiles.add(record.profile)
        size += added
    if call:
        yield call


def _size(record: _Record, profiles: set[bytes]) -> int:
    """Return how many bytes a record adds to a call that names these profiles; a comma is counted for each."""
    entry = 0 if record.profile in profiles else len(b"".join(_ENTRY)) + len(record.profile) + 1
    return entry + len(record.event) + 1


def _entries(records: Iterable[_Record]) -> _Entries:
    entries: _Entries = defaultdict(list)
    for record in records:
        entries[record.profile].append(record)
    return entries


def _body(entries: _Entries) -> bytes:
    """Join the fragments: nothing is serialised twice."""
    begin, middle, end = _ENTRY
    written = (
        b"".join((begin, profile, middle, b",".join(record.event for record in records), end))
        for profile, records in entries.items()
    )
    return b"".join((_HEAD, b",".join(written), _TAIL))


def _culprits(entries: _Entries, pointer: str) -> list[_Record]:
    """Return the event a pointer names, or all of the profile it names; [] when it names none that is there."""
    match = _CULPRIT.match(pointer)
    entry = list(entries.values())[int(match[1]) :][:1] if match else []
    records = entry[0] if entry else []
    return records[int(match[2]) :][:1] if match and match[2] else records


def _except(culprits: Iterable[_Record], records: Iterable[_Record]) -> list[_Record]:
    numbers = {record.number for record in culprits}
    return [record for record in records if record.number not in numbers]


def _halves(records: list[_Record]) -> list[list[_Record]]:
    middle = len(records) // 2
    return [records[middle:], records[:middle]]
