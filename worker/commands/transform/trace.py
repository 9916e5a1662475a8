"""Runs notifications through parse, enrich and transform, without network access. Also used by the golden tests."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import orjson

from worker.commercetools import queries
from worker.enrich import Enricher
from worker.errors import Ignored, WorkerError
from worker.json_access import as_dict, as_dicts, loads
from worker.parse import parse
from worker.transform import handler_for, transform

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence

    from worker.mapping import MappingConfig
    from worker.model import Enriched, Json, Notification, Operation

# Resources in the payload of a message, and the commercetools endpoint that they replace.
_PAYLOADS = {
    "customer": "customers",
    "category": "categories",
    "productProjection": "product-projections",
    "standalonePrice": "standalone-prices",
    "payment": "payments",
}


@dataclass(slots=True)
class Trace:
    """The stages that a notification reached, and their results.

    `stage`: the last stage that was reached. `lookups`: the queries and their results. `stopped_by`: the reason why
    there are no operations, or None.
    """

    body: bytes = field(repr=False)
    stage: str = "parse"
    notification: Notification | None = None
    lookups: list[tuple[queries.Query, queries.QueryResult]] = field(default_factory=list, repr=False)
    enriched: Enriched | None = None
    operations: Sequence[Operation] = ()
    stopped_by: Ignored | WorkerError | None = None


def split_documents(content: bytes) -> Iterator[bytes]:
    """Yield the notifications in a file: the whole file if it is one JSON document, otherwise its lines."""
    try:
        loads(content)
    except orjson.JSONDecodeError:
        yield from (line for line in content.splitlines() if line.strip())
    else:
        yield content


def trace_notification(body: bytes, snapshot: dict[str, list[Json]], mapping: MappingConfig) -> Trace:
    """Run a notification through all stages except sending.

    `snapshot` (resources by endpoint) and the payload of the message replace commercetools.
    """
    trace = Trace(body)
    try:
        _run_stages(trace, snapshot, mapping)
    except (Ignored, WorkerError) as reason:
        trace.stopped_by = reason
    return trace


def _run_stages(trace: Trace, snapshot: dict[str, list[Json]], mapping: MappingConfig) -> None:
    trace.notification = parse(trace.body)
    handler_for(trace.notification, mapping)
    trace.stage = "enrich"
    reader = _RecordingReader(queries.InMemoryReader(_with_payload(snapshot, trace.notification)), trace.lookups)
    (enriched,) = Enricher(reader, mapping).enrich([trace.notification])
    if isinstance(enriched, WorkerError):
        raise enriched
    trace.enriched = enriched
    trace.stage = "transform"
    trace.operations = transform(enriched, mapping)


class _RecordingReader:
    """A reader that records the queries to another reader, and their results."""

    def __init__(self, reader: queries.Reader, lookups: list[tuple[queries.Query, queries.QueryResult]]) -> None:
        self._reader = reader
        self._lookups = lookups

    def find(self, query: queries.Query, values: Collection[str]) -> queries.QueryResult:
        """Query the other reader."""
        found = self._reader.find(query, values)
        self._lookups.append((query, found))
        return found


def _with_payload(snapshot: dict[str, list[Json]], notification: Notification) -> dict[str, list[Json]]:
    """Add the resource in the payload, unless the snapshot contains it."""
    resources: dict[str, list[Json]] = defaultdict(list, {path: list(entries) for path, entries in snapshot.items()})
    for name, path in _PAYLOADS.items():
        payload = as_dict(notification.payload.get(name))
        known = [entry.get("id") for entry in as_dicts(resources[path])]
        is_resource = payload and "typeId" not in payload  # otherwise it is a reference
        if is_resource and payload.get("id") not in known:
            resources[path].append(payload)
    return resources
