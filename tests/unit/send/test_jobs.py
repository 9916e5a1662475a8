"""Chunks of bulk jobs and filters of lookups."""

from __future__ import annotations

from typing import Self
from urllib.parse import unquote

from hypothesis import given
from hypothesis import strategies as st

from worker.errors import JobUnfinished, Transient
from worker.model import Operation, OperationKind, SendResult
from worker.send import jobs
from worker.send.catalog import reader
from worker.send.catalog.batch import CatalogBatch
from worker.send.jobs import BulkJobType, JobEntry
from worker.transform.catalog import catalog_id

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
