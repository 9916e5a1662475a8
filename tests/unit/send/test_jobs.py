"""Chunks of bulk jobs and filters of lookups."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from threading import Barrier, Event
from typing import TYPE_CHECKING, Self
from urllib.parse import unquote

from hypothesis import given
from hypothesis import strategies as st

from worker.errors import JobUnfinished, Transient
from worker.model import Json, Operation, OperationKind, SendResult
from worker.send import jobs
from worker.send.catalog import reader
from worker.send.catalog.batch import CatalogBatch
from worker.send.jobs import BulkJobs, BulkJobType, JobEntry
from worker.transform.catalog import catalog_id

if TYPE_CHECKING:
    import pytest

KIND = BulkJobType("catalog-item-bulk-create-job", "items", 100)
FRAME = len(b'{"data":{"type":"catalog-item-bulk-create-job","attributes":{"items":{"data":[]}}}}')


@given(st.lists(st.integers(1, 6_000_000), max_size=300))
def test_chunk_is_within_the_limits_of_a_job(sizes: list[int]) -> None:
    """A chunk has at most 100 entries and 5 MB. No entry is lost. A larger entry is alone in its chunk."""
    entries = [JobEntry(str(number), b"") for number in range(len(sizes))]
    for entry, size in zip(entries, sizes, strict=True):
        entry.body = _Sized(size)
    chunks = list(jobs._chunks(KIND, entries))
    assert [entry for chunk in chunks for entry in chunk] == entries
    for chunk in chunks:
        assert 1 <= len(chunk) <= KIND.max_entries
        assert FRAME + sum(len(entry.body) + 1 for entry in chunk) <= jobs.MAX_BYTES or len(chunk) == 1


def test_chunks_are_as_large_as_possible() -> None:
    """Jobs have a rate limit, so the number of jobs is minimal."""
    assert [len(chunk) for chunk in jobs._chunks(KIND, [JobEntry("", b"{}")] * 250)] == [100, 100, 50]
    large = JobEntry("", b"x" * 1_000_000)
    assert [len(chunk) for chunk in jobs._chunks(KIND, [large] * 9)] == [4, 4, 1]


class _Sized(bytes):
    """Bytes with a faked length."""

    _size: int

    def __new__(cls, size: int) -> Self:
        made = super().__new__(cls)
        made._size = size
        return made

    def __len__(self) -> int:
        return self._size


def test_filter_has_up_to_a_hundred_ids() -> None:
    """A filter has fewer ids if they are long."""
    assert [len(chunk) for chunk in reader._chunks(f"s{number}" for number in range(250))] == [100, 100, 50]
    long = list(reader._chunks("s" * 200 + str(number) for number in range(100)))
    assert sum(map(len, long)) == 100
    assert 6_000 < max(len(reader._filter(chunk)) for chunk in long) < 7_200


@given(st.lists(st.text(min_size=1, max_size=256), max_size=150, unique=True))
def test_filter_fits_a_uri(keys: list[str]) -> None:
    """Any SKUs give filters of at most 100 ids and 8 KB, with each SKU once."""
    chunks = list(reader._chunks(keys))
    assert sorted(key for chunk in chunks for key in chunk) == sorted(keys)
    for chunk in chunks:
        text = reader._filter(chunk)
        assert len(text) < 8_000
        assert text.count("%22$custom") == len(chunk) <= reader.MAX_ENTRIES
        assert all(catalog_id(key)[:20] in unquote(text) for key in chunk)


def test_unfinished_deletion_of_a_variant_precedes_other_errors() -> None:
    """The job can still delete a SKU that another product gets, so no worker may process the message."""
    stale = Operation(OperationKind.DELETE_STALE_VARIANTS, "p", checked_skus=frozenset("abc"))
    unfinished = JobUnfinished("a job has not ended yet", 600.0)
    results = {"a": SendResult(None, 1), "b": SendResult(Transient("503"), 1), "c": SendResult(unfinished, 1)}
    batch = CatalogBatch([stale], frozenset())
    batch._found = {reader.ITEMS: {"p": reader.Entry({}, {key: {} for key in "abcd"})}}
    batch.conclude_stale(stale, results)
    assert batch.results_of([stale]) == [SendResult(unfinished, 4, 0, frozenset({("sku", "d")}))]


class SimulatedTime(Event):
    """A clock that moves only while a job is waited for. `waits` has the seconds of each wait."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1_000.0
        self.waits: list[float] = []

    def monotonic(self) -> float:
        return self.now

    def wait(self, timeout: float | None = None) -> bool:
        self.waits.append(round(timeout or 0.0, 3))
        self.now += timeout or 0.0
        return False


class JobsThatTake:
    """Klaviyo, whose jobs take `seconds`."""

    def __init__(self, time: SimulatedTime, seconds: float) -> None:
        self.time = time
        self.seconds = seconds

    def call(self, method: str, path: str, body: object = None, *, idempotent: bool = True) -> Json:
        if method == "POST":
            return {"data": {"id": str(self.time.now)}}
        created_at = float(path.rpartition("/")[2])
        if self.time.now < created_at + self.seconds:
            return {"data": {"attributes": {"status": "processing"}}}
        times = {"created_at": _timestamp(created_at), "completed_at": _timestamp(created_at + self.seconds)}
        return {"data": {"attributes": {"status": "complete", "failed_count": 0, **times}}}

    def requests_sent(self) -> int:
        return 0


def _timestamp(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat()


def test_first_poll_is_when_the_last_job_would_have_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short jobs are not waited for longer than they take, and long jobs are not polled often."""
    time = SimulatedTime()
    monkeypatch.setattr(jobs, "time", time)
    klaviyo = JobsThatTake(time, 1.0)
    runner = BulkJobs(klaviyo, time, timeout=600.0, stop_wait=8.0)
    expected = {
        1.0: [0.25, 0.25, 0.375, 0.562],  # the first job
        1.2: [1.0, 0.25],
        0.0: [1.2],
        400.0: [jobs.MIN_POLL, 0.25, 0.375],
        7.0: [jobs.MAX_PAUSE, 0.25, 0.375],
    }
    with ThreadPoolExecutor(1) as executor:
        for seconds, waits in expected.items():
            klaviyo.seconds, time.waits = seconds, []
            assert runner.run(KIND, [JobEntry("a", b"{}")], executor) == [SendResult(None, 1)]
            assert time.waits[: len(waits)] == waits


class Meeting:
    """Klaviyo, which answers only if two requests are sent at the same time."""

    def __init__(self) -> None:
        self.barrier = Barrier(2, timeout=60.0)

    def call(self, method: str, path: str, body: object = None, *, idempotent: bool = True) -> Json:
        self.barrier.wait()
        return {"data": {"id": "1", "attributes": {"status": "complete", "failed_count": 0}}}

    def requests_sent(self) -> int:
        return 0


def test_jobs_of_a_batch_are_started_and_polled_at_the_same_time() -> None:
    """A batch waits for one request, not for one per job."""
    with ThreadPoolExecutor(2) as executor:
        results = BulkJobs(Meeting(), Event(), 600.0, 8.0).run(KIND, [JobEntry("", b"{}")] * 150, executor)
    assert results == [SendResult(None, 1)] * 150
