"""Klaviyo's bulk jobs: accepted at once, worked on one entry at a time, asked about afterwards."""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from queue import SimpleQueue
from threading import RLock, Thread
from typing import TYPE_CHECKING

from worker.sandbox.klaviyo.catalog import PREFIX
from worker.sandbox.klaviyo.rules import ApiError

if TYPE_CHECKING:
    from collections.abc import Callable

    from worker.sandbox.klaviyo.catalog import Json

MAX_JOBS = 500  # of the catalog, in progress
_JOB_EXPIRES = 7 * 24 * 3600  # seconds


@dataclass(slots=True)
class Job:
    """A bulk job, as far as it got."""

    kind: str
    total: int
    id: str = field(default_factory=lambda: secrets.token_hex(13).upper())
    created: float = field(default_factory=time.time)
    begins: float = 0.0
    ends: float = 0.0
    errors: list[Json] | None = None  # None: not complete

    @property
    def is_of_catalog(self) -> bool:
        """Tell whether this is one of the catalog's jobs."""
        return self.kind.startswith("catalog-")

    @property
    def status(self) -> str:
        """Return queued, processing or complete."""
        return "complete" if self.errors is not None else "processing" if time.time() >= self.begins else "queued"

    def document(self) -> Json:
        """Return the job as the API shows it."""
        status = self.status
        failed = len(self.errors or ())
        attributes = {
            "status": status,
            "created_at": _stamp(self.created),
            "total_count": self.total,
            "completed_count": self.total - failed if status == "complete" else 0,
            "failed_count": failed,
            "completed_at": _stamp(self.ends) if status == "complete" else None,
            "expires_at": _stamp(self.created + _JOB_EXPIRES),
        }
        if self.is_of_catalog:
            attributes["errors"] = self.errors or []
        else:
            attributes["started_at"] = None if status == "queued" else _stamp(self.begins)
        return {"type": self.kind, "id": self.id, "attributes": attributes}


class Jobs:
    """Bulk jobs, in the order they came: queued for half of `seconds`, then processing."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._lock = RLock()
        self._jobs: dict[str, Job] = {}
        self._going_on = 0  # of the catalog
        self._waiting: SimpleQueue[tuple[Job, list[Json], Callable[[Json], object]]] = SimpleQueue()
        if seconds:
            Thread(target=self._work_off, daemon=True).start()

    def start(self, kind: str, entries: list[Json], work: Callable[[Json], object]) -> Json:
        """Accept a job that works on each entry. Raises ApiError when too many are in progress."""
        with self._lock:
            job = Job(kind, len(entries))
            if job.is_of_catalog and self._going_on >= MAX_JOBS:
                raise ApiError(429, "throttled", f"At most {MAX_JOBS} jobs can be in progress.")
            self._going_on += job.is_of_catalog
            job.begins = job.created + self._seconds / 2
            self._jobs[job.id] = job
        accepted = job.document()
        if self._seconds:
            self._waiting.put((job, entries, work))
        else:
            self._finish(job, entries, work)
        return accepted

    def _work_off(self) -> None:
        while True:  # all take the same time: first in, first out
            job, entries, work = self._waiting.get()
            time.sleep(max(0.0, job.created + self._seconds - time.time()))
            self._finish(job, entries, work)

    def get(self, kind: str, job_id: str) -> Job:
        """Return a job. Raises ApiError when there is none."""
        job = self._jobs.get(job_id)
        if job is None or job.kind != kind:
            raise ApiError(404, "not_found", f"A {kind} with this id does not exist.")
        return job

    def of_kind(self, kind: str) -> list[Job]:
        """Return the jobs of a kind, oldest first."""
        with self._lock:
            return [job for job in self._jobs.values() if job.kind == kind]

    def _finish(self, job: Job, entries: list[Json], work: Callable[[Json], object]) -> None:
        errors = []
        for entry in entries:
            try:
                work(entry)
            except ApiError as refused:
                errors.append(_job_error(job.kind, entry, refused))
        with self._lock:
            self._going_on -= job.is_of_catalog
        job.ends = time.time()
        job.errors = errors


def _job_error(kind: str, entry: Json, refused: ApiError) -> Json:
    error = refused.document()["errors"][0]
    if kind.startswith("catalog-"):
        external_id = entry.get("attributes", {}).get("external_id") or entry["id"].removeprefix(PREFIX)
        return {"detail": error["detail"], "meta": {"external_id": external_id}, "source": error["source"]}
    attributes = {name: error[name] for name in ("code", "title", "detail", "source")}
    attributes["original_payload"] = entry
    return {"type": "import-error", "id": secrets.token_hex(13).upper(), "attributes": attributes}


def _stamp(moment: float) -> str:
    return datetime.fromtimestamp(moment, UTC).isoformat()
