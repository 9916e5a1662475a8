"""Transform notifications without any network: the debugger, and the engine of the golden tests."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

import orjson

from worker.commercetools import Snapshot
from worker.dryrun import operation_line
from worker.enrich import Enricher
from worker.errors import WorkerError
from worker.loose import as_dicts
from worker.parse import parse
from worker.transform import handler_for, transform

if TYPE_CHECKING:
    from collections.abc import Iterator

    from worker.mapping import Mapping
    from worker.model import Json, Notification

# Where a message's own payload stands, and which collection it stands in for.
_PAYLOADS = {
    "customer": "customers",
    "category": "categories",
    "productProjection": "product-projections",
    "payment": "payments",
}


def documents(content: bytes) -> Iterator[bytes]:
    """Yield the notifications in a file: the whole file when it is one JSON document, else its lines."""
    try:
        orjson.loads(content)
    except orjson.JSONDecodeError:
        yield from (line for line in content.splitlines() if line.strip())
    else:
        yield content


def transform_offline(body: bytes, snapshot: dict[str, list[Json]], mapping: Mapping) -> Iterator[str]:
    """Yield a JSON line per operation, taking `snapshot` and the message's payload for what commercetools holds.

    Raises Ignored, Rejected or Transient.
    """
    notification = parse(body)
    handler_for(notification, mapping)
    enricher = Enricher(Snapshot(_with_payload(snapshot, notification)), mapping, read_lag=0.0)
    (enriched,) = enricher.enrich([notification])
    if isinstance(enriched, WorkerError):
        raise enriched
    yield from map(operation_line, transform(enriched, mapping))


def _with_payload(snapshot: dict[str, list[Json]], notification: Notification) -> dict[str, list[Json]]:
    """Add the payload's resource, unless the snapshot has a newer word on it."""
    resources: dict[str, list[Json]] = defaultdict(list, {path: list(entries) for path, entries in snapshot.items()})
    for name, path in _PAYLOADS.items():
        payload = notification.payload.get(name)
        known = [entry.get("id") for entry in as_dicts(resources[path])]
        if isinstance(payload, dict) and payload.get("id") not in known:
            resources[path].append(payload)
    return resources
