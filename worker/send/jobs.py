"""Klaviyo's bulk jobs: posted in chunks, waited for, and what in them did not succeed."""

from __future__ import annotations

import logging
import re
import time
from dataclasses import dataclass
from threading import Lock
from typing import TYPE_CHECKING, NamedTuple

from worker.errors import KlaviyoMisconfigured, Rejected, Transient, WorkerError
from worker.http.chunks import chunked
from worker.json_access import as_dict, as_dicts, as_int, as_text
from worker.klaviyo.client import iter_resources
from worker.model import Json, SendResult
from worker.send.bulk import isolate_rejected
from worker.telemetry.log import ConditionLog

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from threading import Event

    from worker.klaviyo.client import KlaviyoClient

MAX_BYTES = 5_000_000  # of a call: https://developers.klaviyo.com/en/reference/bulk_import_profiles
ENVELOPE_BYTES = 200  # bytes of a call around its entries, at most
MAX_CONCURRENT_JOBS = 25  # jobs of one batch at a time; Klaviyo takes 500 of an account
FIRST_POLL, MAX_POLL = 0.25, 5.0  # seconds until Klaviyo is asked how far a job is
JOB_TIMEOUT = 120.0  # seconds for a job; after that its entries go one by one
PROFILES = "profile-bulk-import-job"
_CULPRIT = re.compile(r"/data/attributes/\w+/data/(\d+)(?:/|$)")
_ENDED = frozenset({"complete", "cancelled"})


class BulkJobType(NamedTuple):
    """A kind of job: its JSON:API type, what its entries are called, and how many a call takes."""

    type: str
    member: str
    most: int

    @property
    def path(self) -> str:
        """Return the endpoint."""
        return f"/api/{self.type}s"


@dataclass(slots=True, eq=False, repr=False)
class JobEntry:
    """What a job is to work on: external id and JSON. `verdict` None: it must go alone."""

    key: str
    body: bytes
    verdict: SendResult | None = None


class _BulkJob(NamedTuple):
    id: str
    entries: list[JobEntry]
    posted_at: float  # monotonic seconds


class BulkJobs:
    """Has Klaviyo work on many entries at once. Safe for many threads, which share what they ask about jobs.

    Import jobs need more scopes than single calls: a key without them sends its entries one by one.
    """

    def __init__(self, client: KlaviyoClient, stopping: Event) -> None:
        self._client = client
        self._stopping = stopping
        self._listing: dict[str, Json] = {}
        self._listed_at = float("-inf")  # monotonic seconds
        self._lock = Lock()
        self._refused = ConditionLog("bulk_jobs_refused", "bulk_jobs_allowed", logging.WARNING)

    def run(self, kind: BulkJobType, entries: Sequence[JobEntry]) -> list[SendResult | None]:
        """Have entries worked on; return what became of each, None for those that must go alone."""
        chunks = list(_chunks(kind, entries))
        for first in range(0, len(chunks), MAX_CONCURRENT_JOBS):
            jobs: list[_BulkJob] = []
            for chunk in chunks[first : first + MAX_CONCURRENT_JOBS]:
                self._post(kind, chunk, jobs)
            for job in jobs:
                self._wait_for(kind, job)
        return [entry.verdict for entry in entries]

    def _post(self, kind: BulkJobType, chunk: list[JobEntry], jobs: list[_BulkJob]) -> None:
        """Start a job, or several where a refusal is narrowed."""
        before = self._client.requests_sent()

        def send(part: list[JobEntry]) -> None:
            jobs.append(_BulkJob(self._start(kind, part), part, time.monotonic()))

        try:
            isolate_rejected(chunk, send, _culprits)
        except KlaviyoMisconfigured as error:
            self._refused.log(str(error), job=kind.type)
        except WorkerError as error:
            verdict = SendResult(error, min(self._client.requests_sent() - before, 1))
            for entry in chunk:  # those that have a job get another in the end
                entry.verdict = verdict

    def _start(self, kind: BulkJobType, entries: list[JobEntry]) -> str:
        if self._stopping.is_set():  # nobody would wait for it, and it could undo what others write meanwhile
            raise Transient(f"stopped before a {kind.type} was posted")
        head = f'{{"data":{{"type":"{kind.type}","attributes":{{"{kind.member}":{{"data":['.encode()
        body = b"".join((head, b",".join(entry.body for entry in entries), b"]}}}}"))
        job_id = as_text(as_dict(self._client.call("POST", kind.path, body).get("data")).get("id"))
        if not job_id:
            raise Transient(f"Klaviyo answered to POST {kind.path} without a job")
        return job_id

    def _wait_for(self, kind: BulkJobType, job: _BulkJob) -> None:
        """Wait for a job and give its entries their verdicts; those that failed, or may have, get none."""
        try:
            failed = self._failed(kind, job, self._ended(kind, job))
            self._refused.log("")
        except Rejected:
            failed = None
        except KlaviyoMisconfigured as error:
            failed = None
            self._refused.log(str(error), job=kind.type)
        except WorkerError as error:
            for entry in job.entries:
                entry.verdict = SendResult(error, 1)
            return
        for entry in job.entries:
            entry.verdict = None if failed is None or entry.key in failed else SendResult(None, 1)

    def _ended(self, kind: BulkJobType, job: _BulkJob) -> Json:
        """Return the job as it ended, or as it is when that takes too long. Raises WorkerError."""
        looked_at, pause = job.posted_at, FIRST_POLL
        while True:  # once at least: those before it may have taken all the time
            if self._stopping.wait(max(looked_at + pause - time.monotonic(), 0.0)):
                raise Transient(f"stopped while Klaviyo worked on a {kind.type}")
            looking_at = time.monotonic()
            shown = as_dict(self._poll(kind, job.id, looked_at).get("attributes"))
            if shown.get("status") in _ENDED or looking_at - job.posted_at > JOB_TIMEOUT:
                return shown
            looked_at, pause = looking_at, min(pause * 1.5, MAX_POLL)

    def _poll(self, kind: BulkJobType, job_id: str, looked_at: float) -> Json:
        """Return a job as it is. All import jobs are read in one call, as there may be few: 150 a minute."""
        if kind.type == PROFILES:
            with self._lock:
                if self._listed_at <= looked_at:
                    self._listed_at = time.monotonic()
                    self._listing = self._recent(kind)
                if found := self._listing.get(job_id):
                    return found
        return as_dict(self._client.call("GET", f"{kind.path}/{job_id}").get("data"))

    def _recent(self, kind: BulkJobType) -> dict[str, Json]:
        fields = f"fields%5B{kind.type}%5D=status,failed_count"
        path = f"{kind.path}?sort=-created_at&page%5Bsize%5D=100&{fields}"
        return {as_text(job.get("id")): job for job in as_dicts(self._client.call("GET", path).get("data"))}

    def _failed(self, kind: BulkJobType, job: _BulkJob, shown: Json) -> set[str] | None:
        """Return the external ids of what failed; None when that cannot be told. Raises WorkerError."""
        if shown.get("status") != "complete":
            return None
        count = as_int(shown.get("failed_count"))  # may be null
        errors = as_dicts(shown.get("errors"))
        if count != 0 and kind.type == PROFILES:
            path = f"{kind.path}/{job.id}/import-errors?page%5Bsize%5D=100"
            errors = [as_dict(error.get("attributes")) for error in iter_resources(self._client, path)]
        failed = set(map(_key_of, errors))
        is_told = len(failed) >= (count or 0) and failed <= {entry.key for entry in job.entries if entry.key}
        return failed if is_told else None


def _chunks(kind: BulkJobType, entries: Sequence[JobEntry]) -> Iterator[list[JobEntry]]:
    """Split entries so that each call is within the limits."""
    return chunked(entries, lambda entry: len(entry.body) + 1, MAX_BYTES - ENVELOPE_BYTES, kind.most)


def _culprits(entries: list[JobEntry], pointer: str) -> list[JobEntry]:
    match = _CULPRIT.match(pointer)
    return entries[int(match[1]) :][:1] if match else []


def _key_of(error: Json) -> str:
    """Return the external id of the entry an error is about: catalog jobs name it, import jobs quote the entry."""
    quoted = as_dict(error.get("original_payload"))
    about = (as_dict(error.get("meta")), as_dict(quoted.get("attributes")), quoted)
    return next(filter(None, (as_text(each.get("external_id")) for each in about)), "")
