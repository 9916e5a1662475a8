"""Klaviyo's bulk jobs: the worker starts them, polls them until they end, and sets the result of each entry.

A job that has started cannot be stopped, and it writes the state that it was started with. The worker therefore waits
for every job. If it cannot, the entries get JobUnfinished, so that no worker writes them while the job can still do so.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from functools import partial
from itertools import chain
from math import inf
from threading import Lock
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from adapters.shared.chunks import chunked
from worker.errors import (
    EndpointRefused,
    JobUnfinished,
    KlaviyoMisconfigured,
    NotForwarded,
    Rejected,
    RequestBlocked,
    Throttled,
    Transient,
    WorkerError,
)
from worker.json_access import as_dict, as_dicts, as_int, as_text, parse_time
from worker.klaviyo.client import iter_resources
from worker.model import Json, SendResult
from worker.send.bulk import isolate_rejected

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from concurrent.futures import Executor
    from threading import Event

    from worker.klaviyo.client import KlaviyoClient
    from worker.send.bulk import BulkResult

T = TypeVar("T")
R = TypeVar("R")

MAX_BYTES = 5_000_000  # of the request for a job: https://developers.klaviyo.com/en/reference/bulk_import_profiles
ENVELOPE_BYTES = 200  # maximum number of bytes around the entries in a request
MAX_CONCURRENT_JOBS = 25  # per batch; Klaviyo accepts 500 per account
MIN_POLL = 0.05  # seconds from the start of a job to its first poll; more if the last job of its type took longer
FIRST_PAUSE, MAX_PAUSE = 0.25, 5.0  # seconds; the shortest and the longest time between two polls of a job
AVOID_FACTOR = 3  # after a job that takes too long, no job of its type is started for this number of timeouts
PROFILES = "profile-bulk-import-job"
_CULPRIT = re.compile(r"/data/attributes/\w+/data/(\d+)(?:/|$)")
_ENDED = frozenset({"complete", "cancelled"})
_NOT_STARTED = (Throttled, EndpointRefused, RequestBlocked, NotForwarded)  # answers that prove that no job has started


class BulkJobType(NamedTuple):
    """A type of bulk job: its JSON:API type, the name of its list of entries, and the maximum number of entries."""

    type: str
    member: str
    max_entries: int

    @property
    def family(self) -> str:
        """Return "profile" or "catalog". Jobs of a family take about as long, and need the same scopes."""
        return self.type.partition("-")[0]

    @property
    def path(self) -> str:
        """Return the path of the endpoint."""
        return f"/api/{self.type}s"


@dataclass(slots=True, eq=False, repr=False)
class JobEntry:
    """An entry of a bulk job: its external id (a guest's email address), its JSON and its result."""

    key: str
    body: bytes
    result: BulkResult = None


class _BulkJob(NamedTuple):
    id: str
    entries: list[JobEntry]
    started_at: float  # monotonic seconds


class _Failures(NamedTuple):
    """The keys of a job's failed entries. If `is_complete` is False, other entries have possibly failed."""

    keys: frozenset[str]
    is_complete: bool

    def can_include(self, entry: JobEntry) -> bool:
        """Return whether the entry has failed or has possibly failed."""
        return not self.is_complete or entry.key in self.keys


_UNKNOWN = _Failures(frozenset(), is_complete=False)


class BulkJobs:
    """A runner of bulk jobs. Safe for many threads. Threads that poll import jobs share their requests.

    Import jobs need more scopes than other requests. If the key lacks these scopes, or if a job took too long recently,
    the results of all entries are unknown, so that the entries are sent individually.

    A job ends within `timeout` seconds. After `stopping` is set, jobs are waited for `stop_wait` seconds at most.
    """

    def __init__(self, client: KlaviyoClient, stopping: Event, timeout: float, stop_wait: float) -> None:
        self._timeout = timeout
        self._stop_wait = stop_wait
        self._stopped_at: float | None = None  # monotonic seconds
        self._seconds_taken: dict[str, float] = {}  # by the last job of each type
        self._avoided: dict[str, float] = {}  # family -> no job is started until then, in monotonic seconds
        self._client = client
        self._stopping = stopping
        self._recent: dict[str, Json] = {}  # job id -> import job, as listed at `_listed_at`
        self._listed_at = float("-inf")  # monotonic seconds
        self._lock = Lock()

    def run(self, job_type: BulkJobType, entries: Sequence[JobEntry], executor: Executor) -> list[BulkResult]:
        """Run jobs with the entries and return the results of the entries in the same order.

        The executor sends the requests about several jobs. No thread of it waits for the end of a job.
        """
        chunks = list(_chunks(job_type, entries))
        for first in range(0, len(chunks), MAX_CONCURRENT_JOBS):
            if time.monotonic() < self._avoided.get(job_type.family, 0.0):
                break  # the results of the remaining entries stay unknown
            part = chunks[first : first + MAX_CONCURRENT_JOBS]
            started = _map(executor, partial(self._start_jobs, job_type), part)
            self._wait_for(job_type, list(chain.from_iterable(started)), executor)
        return [entry.result for entry in entries]

    def _start_jobs(self, job_type: BulkJobType, chunk: list[JobEntry]) -> list[_BulkJob]:
        """Start a job for the chunk and return it. If Klaviyo rejects entries, start jobs for the others."""
        before = self._client.requests_sent()
        jobs: list[_BulkJob] = []

        def send(part: list[JobEntry]) -> None:
            jobs.append(_BulkJob(self._start(job_type, part), part, time.monotonic()))

        try:
            isolate_rejected(chunk, send, _culprits)
        except EndpointRefused:  # the circuit breaker logs it
            pass
        except WorkerError as error:
            result = SendResult(error, min(self._client.requests_sent() - before, 1))
            for entry in chunk:  # the entries of started jobs get another result later
                entry.result = result
        return jobs

    def _start(self, job_type: BulkJobType, entries: list[JobEntry]) -> str:
        """Start a job and return its id. Raises WorkerError; JobUnfinished if the job has possibly started."""
        if self._stopping.is_set():
            raise Transient(f"the worker stopped before it could start a {job_type.type}")
        head = f'{{"data":{{"type":"{job_type.type}","attributes":{{"{job_type.member}":{{"data":['.encode()
        body = b"".join((head, b",".join(entry.body for entry in entries), b"]}}}}"))
        before = self._client.requests_sent()
        try:
            response = self._client.call("POST", job_type.path, body, idempotent=False)
        except _NOT_STARTED:
            raise
        except Transient as error:
            if self._client.requests_sent() == before:
                raise
            raise self._unfinished(job_type, f"has possibly started: {error}") from None
        return as_text(as_dict(response.get("data")).get("id"))

    def _unfinished(self, job_type: BulkJobType, reason: str) -> JobUnfinished:
        return JobUnfinished(f"a {job_type.type} {reason}", self._timeout)

    def _wait_for(self, job_type: BulkJobType, jobs: Sequence[_BulkJob], executor: Executor) -> None:
        """Poll the jobs until all have ended. Every job is polled at least once."""
        polled_at = max((job.started_at for job in jobs), default=0.0)
        pause, next_pause = self._seconds_taken.get(job_type.type, FIRST_PAUSE), FIRST_PAUSE
        while jobs:
            self._sleep_until(polled_at + pause, jobs)
            previous_poll, polled_at = polled_at, time.monotonic()
            have_ended = _map(executor, partial(self._poll_and_conclude, job_type, previous_poll), jobs)
            jobs = [job for job, has_ended in zip(jobs, have_ended, strict=True) if not has_ended]
            pause, next_pause = next_pause, min(next_pause * 1.5, MAX_PAUSE)

    def _poll_and_conclude(self, job_type: BulkJobType, since: float, job: _BulkJob) -> bool:
        """Poll a job. If it has ended, set the results of its entries and return True. That of failed ones stays None.

        `since`: see _poll.
        """
        failures = _UNKNOWN
        try:
            attributes = self._poll_once(job_type, since, job)
            if attributes is None:
                return False
            failures = self._failures(job_type, job, attributes)
        except (Rejected, EndpointRefused):  # Klaviyo does not know the errors of the job, or the key cannot read them
            pass
        except RequestBlocked as error:  # the job's id is blocked, which is no record's fault
            self._set_results(job, Transient(error.reason))
            return True
        except WorkerError as error:
            self._set_results(job, error)
            return True
        for entry in job.entries:
            entry.result = None if failures.can_include(entry) else SendResult(None, 1)
        return True

    def _set_results(self, job: _BulkJob, error: WorkerError) -> None:
        for entry in job.entries:
            entry.result = SendResult(error, 1)

    def _poll_once(self, job_type: BulkJobType, since: float, job: _BulkJob) -> Json | None:
        """Poll the job. Return its attributes if it has ended. Raises JobUnfinished if it has not ended in time."""
        reason = "has not ended yet"
        try:
            attributes = as_dict(self._poll(job_type, job.id, since).get("attributes"))
        except EndpointRefused as error:
            self._avoided[job_type.family] = inf
            raise self._unfinished(job_type, f"has started, but cannot be read: {error}") from None
        except (Transient, KlaviyoMisconfigured) as error:
            attributes = {}
            reason = f"has not ended yet, as far as is known: {error}"
        except Rejected as error:
            raise self._unfinished(job_type, f"has started, but cannot be read: {error}") from None
        if attributes.get("status") in _ENDED:
            self._learn_duration(job_type, attributes)
            return attributes
        if time.monotonic() < self._deadline(job):
            return None
        if not self._stopping.is_set():  # another job could take as long, so entries are sent individually
            self._avoided[job_type.family] = time.monotonic() + AVOID_FACTOR * self._timeout
        raise self._unfinished(job_type, reason)

    def _learn_duration(self, job_type: BulkJobType, attributes: Json) -> None:
        """Remember how long a job took by Klaviyo's clock: the next one is first polled when it has possibly ended."""
        created_at, completed_at = parse_time(attributes.get("created_at")), parse_time(attributes.get("completed_at"))
        if created_at and completed_at:
            seconds = (completed_at - created_at).total_seconds()
            self._seconds_taken[job_type.type] = min(max(seconds, MIN_POLL), MAX_PAUSE)

    def _sleep_until(self, moment: float, jobs: Iterable[_BulkJob]) -> None:
        """Sleep until a moment (monotonic seconds), but not beyond the end of the wait for one of the jobs."""
        if self._stopping.wait(max(moment - time.monotonic(), 0.0)):
            end = min(moment, *map(self._deadline, jobs))
            time.sleep(max(end - time.monotonic(), 0.0))

    def _deadline(self, job: _BulkJob) -> float:
        """Return when the wait for the job ends, in monotonic seconds."""
        end = job.started_at + self._timeout
        if not self._stopping.is_set():
            return end
        if self._stopped_at is None:
            self._stopped_at = time.monotonic()
        return min(end, self._stopped_at + self._stop_wait)

    def _poll(self, job_type: BulkJobType, job_id: str, since: float) -> Json:
        """Return the job, read later than `since` (monotonic seconds).

        All threads share a list of the recent import jobs, because the endpoint accepts only 150 requests a minute.
        """
        if job_type.type == PROFILES:
            with self._lock:
                if self._listed_at <= since:
                    self._listed_at = time.monotonic()
                    self._recent = self._list_recent(job_type)
                if found := self._recent.get(job_id):
                    return found
        return as_dict(self._client.call("GET", f"{job_type.path}/{job_id}").get("data"))

    def _list_recent(self, job_type: BulkJobType) -> dict[str, Json]:
        fields = f"fields%5B{job_type.type}%5D=status,failed_count,created_at,completed_at"
        path = f"{job_type.path}?sort=-created_at&page%5Bsize%5D=100&{fields}"
        return {as_text(job.get("id")): job for job in as_dicts(self._client.call("GET", path).get("data"))}

    def _failures(self, job_type: BulkJobType, job: _BulkJob, attributes: Json) -> _Failures:
        """Return which entries of a job have failed. Raises WorkerError."""
        if attributes.get("status") != "complete":
            return _UNKNOWN
        count = as_int(attributes.get("failed_count"))  # Klaviyo can return null
        errors = as_dicts(attributes.get("errors"))
        if count != 0 and job_type.type == PROFILES:
            path = f"{job_type.path}/{job.id}/import-errors?page%5Bsize%5D=100"
            errors = [as_dict(error.get("attributes")) for error in iter_resources(self._client, path)]
        keys = frozenset(map(_key_of, errors))
        known = {entry.key for entry in job.entries if entry.key}
        return _Failures(keys, is_complete=len(keys) >= (count or 0) and keys <= known)


def _map(executor: Executor, function: Callable[[T], R], values: Sequence[T]) -> list[R]:
    """Return the results of a function in order. One call runs in this thread: a switch would only add latency."""
    return list(executor.map(function, values) if len(values) > 1 else map(function, values))


def _chunks(job_type: BulkJobType, entries: Sequence[JobEntry]) -> Iterator[list[JobEntry]]:
    """Split entries into chunks that Klaviyo accepts in one job."""
    return chunked(entries, lambda entry: len(entry.body) + 1, MAX_BYTES - ENVELOPE_BYTES, job_type.max_entries)


def _culprits(entries: list[JobEntry], pointer: str) -> list[JobEntry]:
    match = _CULPRIT.match(pointer)
    return entries[int(match[1]) :][:1] if match else []


def _key_of(error: Json) -> str:
    """Return the key of a failed entry, or "". Catalog jobs return the external id; import jobs return the entry."""
    quoted = as_dict(error.get("original_payload"))
    sources = (as_dict(error.get("meta")), as_dict(quoted.get("attributes")), quoted)
    found = (as_text(source.get(name)) for name in ("external_id", "email") for source in sources)
    return next(filter(None, found), "")
