"""Follow notifications without any network: the debugger, and the engine of the golden tests."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import orjson

from worker.commercetools import queries
from worker.enrich import Enricher
from worker.errors import Ignored, WorkerError
from worker.json_access import as_dicts
from worker.parse import parse
from worker.transform import handler_for, transform

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence

    from worker.mapping import MappingConfig
    from worker.model import Enriched, Json, Notification, Operation

# Where a message's own payload stands, and which collection it stands in for.
_PAYLOADS = {
    "customer": "customers",
    "category": "categories",
    "productProjection": "product-projections",
    "payment": "payments",
}


@dataclass(slots=True)
class Trace:
    """How far a notification came, what was asked for it, and what it ended with; None: its operations."""

    body: bytes = field(repr=False)
    stage: str = "parse"
    notification: Notification | None = None
    lookups: list[tuple[queries.Query, queries.QueryResult]] = field(default_factory=list, repr=False)
    enriched: Enriched | None = None
    operations: Sequence[Operation] = ()
    ending: Ignored | WorkerError | None = None


def documents(content: bytes) -> Iterator[bytes]:
    """Yield the notifications in a file: the whole file when it is one JSON document, else its lines."""
    try:
        orjson.loads(content)
    except orjson.JSONDecodeError:
        yield from (line for line in content.splitlines() if line.strip())
    else:
        yield content


def trace_notification(body: bytes, snapshot: dict[str, list[Json]], mapping: MappingConfig) -> Trace:
    """Take a notification through the stages but the sending.

    `snapshot` and the message's payload are what commercetools holds.
    """
    trace = Trace(body)
    try:
        _run_stages(trace, snapshot, mapping)
    except (Ignored, WorkerError) as ending:
        trace.ending = ending
    return trace


def _run_stages(trace: Trace, snapshot: dict[str, list[Json]], mapping: MappingConfig) -> None:
    trace.notification = parse(trace.body)
    handler_for(trace.notification, mapping)
    trace.stage = "enrich"
    reader = _Recorder(queries.InMemoryReader(_with_payload(snapshot, trace.notification)), trace.lookups)
    (enriched,) = Enricher(reader, mapping, read_lag=0.0).enrich([trace.notification])
    if isinstance(enriched, WorkerError):
        raise enriched
    trace.enriched = enriched
    trace.stage = "transform"
    trace.operations = transform(enriched, mapping)


class _Recorder:
    """A Reader that notes what another is asked and what it answers."""

    def __init__(self, reader: queries.Reader, lookups: list[tuple[queries.Query, queries.QueryResult]]) -> None:
        self._reader = reader
        self._lookups = lookups

    def find(self, query: queries.Query, values: Collection[str]) -> queries.QueryResult:
        """Find with the other."""
        found = self._reader.find(query, values)
        self._lookups.append((query, found))
        return found


def _with_payload(snapshot: dict[str, list[Json]], notification: Notification) -> dict[str, list[Json]]:
    """Add the payload's resource, unless the snapshot has a newer word on it."""
    resources: dict[str, list[Json]] = defaultdict(list, {path: list(entries) for path, entries in snapshot.items()})
    for name, path in _PAYLOADS.items():
        payload = notification.payload.get(name)
        known = [entry.get("id") for entry in as_dicts(resources[path])]
        if isinstance(payload, dict) and payload.get("id") not in known:
            resources[path].append(payload)
    return resources
