"""Profiles in bulk: import jobs, acknowledged when Klaviyo says they are complete."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import orjson

from worker.json_access import as_text
from worker.model import Json, Operation, OperationKind, SendResult
from worker.send.bulk import with_fallback
from worker.send.identifiers import IDENTIFIER_PRIORITY
from worker.send.jobs import PROFILES, BulkJobType, JobEntry

if TYPE_CHECKING:
    from collections.abc import Sequence

    from worker.send.bulk import OneByOne
    from worker.send.jobs import BulkJobs

_JOB = BulkJobType(PROFILES, "profiles", 10_000)  # https://developers.klaviyo.com/en/reference/bulk_import_profiles


class BulkProfiles:
    """Upserts profiles in bulk; those that fail go one by one, where conflicts are resolved."""

    def __init__(self, jobs: BulkJobs, one_by_one: OneByOne, threshold: int) -> None:
        self._jobs = jobs
        self._one_by_one = one_by_one
        self._threshold = threshold

    def select(self, operations: Sequence[Operation]) -> list[tuple[OperationKind, str]]:
        """Return the names of the upserts that are to go in bulk; none, when they are only a handful.

        Two that share an identifier go one by one: nothing is said about their order within a job.
        """
        upserts = {
            operation.key: operation for operation in operations if operation.kind is OperationKind.UPSERT_PROFILE
        }
        named = Counter(identifier for upsert in upserts.values() for identifier in _identifiers(upsert))
        chosen = [key for key, upsert in upserts.items() if all(named[each] == 1 for each in _identifiers(upsert))]
        return [(OperationKind.UPSERT_PROFILE, key) for key in chosen] if len(chosen) > self._threshold else []

    def send(self, operations: Sequence[Operation]) -> list[SendResult]:
        """Import the profiles; return what became of each, in their order."""
        entries = [JobEntry(_external_id(upsert), orjson.dumps(upsert.resource)) for upsert in operations]
        return with_fallback(operations, self._jobs.run(_JOB, entries), self._one_by_one)


def _attributes(upsert: Operation) -> Json:
    attributes: Json = (upsert.resource or {})["attributes"]
    return attributes


def _external_id(upsert: Operation) -> str:
    return as_text(_attributes(upsert).get("external_id"))


def _identifiers(upsert: Operation) -> list[tuple[str, str]]:
    attributes = _attributes(upsert)
    return [(name, as_text(attributes[name])) for name in IDENTIFIER_PRIORITY if name in attributes]
