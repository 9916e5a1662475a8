"""Klaviyo's bulk jobs: accepted immediately, processed entry by entry, polled by the client."""

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

    from worker.sandbox.http import Json

MAX_JOBS = 500  # catalog jobs in progress
_JOB_EXPIRES = 7 * 24 * 3600  # seconds


@dataclass(slots=True)
class BulkJob:
    """A bulk job and its progress."""

    kind: str
    total: int
    id: str = field(default_factory=lambda: secrets.token_hex(13).upper())
    created_at: float = field(default_factory=time.time)
    started_at: float = 0.0
    completed_at: float = 0.0
    errors: list[Json] | None = None  # None: not complete

    @property
    def is_of_catalog(self) -> bool:
        """Return True for a catalog job."""
        return self.kind.startswith("catalog-")

    @property
    def status(self) -> str:
        """Return queued, processing or complete."""
        return "complete" if self.errors is not None else "processing" if time.time() >= self.started_at else "queued"

    def document(self) -> Json:
        """Return the job in the format of the API."""
        status = self.status
        failed = len(self.errors or ())
        attributes = {
            "status": status,
            "created_at": _timestamp(self.created_at),
            "total_count": self.total,
            "completed_count": self.total - failed if status == "complete" else 0,
            "failed_count": failed,
            "completed_at": _timestamp(self.completed_at) if status == "complete" else None,
            "expires_at": _timestamp(self.created_at + _JOB_EXPIRES),
        }
        if self.is_of_catalog:
            attributes["errors"] = self.errors or []
        else:
            attributes["started_at"] = None if status == "queued" else _timestamp(self.started_at)
        return {"type": self.kind, "id": self.id, "attributes": attributes}


class BulkJobs:
    """Bulk jobs in order of arrival. Each is queued for half of `seconds` and then processed for the other half."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._lock = RLock()
        self._jobs: dict[str, BulkJob] = {}
        self._catalog_jobs_in_progress = 0
        self._queued: SimpleQueue[tuple[BulkJob, list[Json], Callable[[Json], object]]] = SimpleQueue()
        if seconds:
            Thread(target=self._run_queued, daemon=True).start()

    def start(self, kind: str, entries: list[Json], work: Callable[[Json], object]) -> Json:
        """Accept a job that calls `work` for each entry. Raises ApiError if too many are in progress."""
        with self._lock:
            job = BulkJob(kind, len(entries))
            if job.is_of_catalog and self._catalog_jobs_in_progress >= MAX_JOBS:
                raise ApiError(429, "throttled", f"At most {MAX_JOBS} jobs can be in progress.")
            self._catalog_jobs_in_progress += job.is_of_catalog
            job.started_at = job.created_at + self._seconds / 2
            self._jobs[job.id] = job
        accepted = job.document()
        if self._seconds:
            self._complete_later(job, entries, work)
        else:
            self._complete(job, entries, work)
        return accepted

    def _complete_later(self, job: BulkJob, entries: list[Json], work: Callable[[Json], object]) -> None:
        """Complete the job after `seconds`. The tests' simulation of time has its own way."""
        self._queued.put((job, entries, work))

    def _run_queued(self) -> None:
        while True:  # all jobs take equally long, so the oldest ends first
            job, entries, work = self._queued.get()
            time.sleep(max(0.0, job.created_at + self._seconds - time.time()))
            self._complete(job, entries, work)

    def get(self, kind: str, job_id: str) -> BulkJob:
        """Return a job. Raises ApiError if there is none."""
        job = self._jobs.get(job_id)
        if job is None or job.kind != kind:
            raise ApiError(404, "not_found", f"A {kind} with this id does not exist.")
        return job

    def of_kind(self, kind: str) -> list[BulkJob]:
        """Return the jobs of a kind, oldest first."""
        with self._lock:
            return [job for job in self._jobs.values() if job.kind == kind]

    def _complete(self, job: BulkJob, entries: list[Json], work: Callable[[Json], object]) -> None:
        errors = []
        for entry in entries:
            try:
                work(entry)
            except ApiError as error:
                errors.append(_job_error(job.kind, entry, error))
        with self._lock:
            self._catalog_jobs_in_progress -= job.is_of_catalog
        job.completed_at = time.time()
        job.errors = errors


def _job_error(kind: str, entry: Json, error: ApiError) -> Json:
    details = error.document()["errors"][0]
    if kind.startswith("catalog-"):
        external_id = entry.get("attributes", {}).get("external_id") or entry["id"].removeprefix(PREFIX)
        return {"detail": details["detail"], "meta": {"external_id": external_id}, "source": details["source"]}
    attributes = {name: details[name] for name in ("code", "title", "detail", "source")}
    attributes["original_payload"] = entry
    return {"type": "import-error", "id": secrets.token_hex(13).upper(), "attributes": attributes}


def _timestamp(moment: float) -> str:
    return datetime.fromtimestamp(moment, UTC).isoformat()
