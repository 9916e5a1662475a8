"""The bulk sender for profiles. It uses Klaviyo's import jobs."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import orjson

from worker.json_access import as_text
from worker.model import Json, Operation, OperationKind, SendResult
from worker.send.bulk import with_fallback
from worker.send.identifiers import IDENTIFIER_PRIORITY
from worker.send.jobs import PROFILES, BulkJobType, JobEntry
from worker.transform.profiles import without_clears

if TYPE_CHECKING:
    from collections.abc import Sequence

    from worker.send.bulk import OperationId, SendIndividually
    from worker.send.jobs import BulkJobs

_IMPORT = BulkJobType(PROFILES, "profiles", 10_000)  # https://developers.klaviyo.com/en/reference/bulk_import_profiles


class BulkProfiles:
    """The bulk sender for profiles. Failed profiles are sent individually, which resolves conflicts."""

    def __init__(self, jobs: BulkJobs, send_individually: SendIndividually, threshold: int) -> None:
        self._jobs = jobs
        self._send_individually = send_individually
        self._threshold = threshold

    def select(self, operations: Sequence[Operation]) -> list[OperationId]:
        """Return the ids of the upserts to send in bulk, or [] if there are too few.

        Upserts that share an identifier are sent individually, because Klaviyo documents no order within a job.
        """
        upserts = {o.key: o for o in operations if o.kind is OperationKind.UPSERT_PROFILE}
        uses = Counter(identifier for upsert in upserts.values() for identifier in _identifiers(upsert))
        selected = [key for key, upsert in upserts.items() if all(uses[each] == 1 for each in _identifiers(upsert))]
        return [(OperationKind.UPSERT_PROFILE, key) for key in selected] if len(selected) > self._threshold else []

    def send(self, operations: Sequence[Operation]) -> list[SendResult]:
        """Import the profiles and return their results in the same order."""
        entries = [
            JobEntry(_external_id(upsert), orjson.dumps(without_clears(upsert.resource or {}))) for upsert in operations
        ]
        return with_fallback(operations, self._jobs.run(_IMPORT, entries), self._send_individually)


def _attributes(upsert: Operation) -> Json:
    attributes: Json = (upsert.resource or {})["attributes"]
    return attributes


def _body(upsert: Operation) -> bytes:
    return orjson.dumps(without_clears(upsert.resource or {}))


def _external_id(upsert: Operation) -> str:
    return as_text(_attributes(upsert).get("external_id"))


def _identifiers(upsert: Operation) -> list[tuple[str, str]]:
    attributes = _attributes(upsert)
    return [(name, as_text(attributes[name])) for name in IDENTIFIER_PRIORITY if name in attributes]
