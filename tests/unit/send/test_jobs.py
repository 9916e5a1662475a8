"""Chunks of bulk jobs and filters of lookups."""

from __future__ import annotations

from typing import Self
from urllib.parse import unquote

from hypothesis import given
from hypothesis import strategies as st

from worker.errors import JobUnfinished, Transient
from worker.model import Operation, OperationKind, SendResult
from worker.send import catalog, jobs
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
    short = list(catalog._filters(f"s{number}" for number in range(250)))
    assert [each.count("$custom") for each in short] == [100, 100, 50]
    long = list(catalog._filters("s" * 200 + str(number) for number in range(100)))
    assert sum(each.count("$custom") for each in long) == 100
    assert 5_000 < max(map(len, long)) < 6_000


@given(st.lists(st.text(min_size=1, max_size=256), max_size=150, unique=True))
def test_filter_fits_a_uri(keys: list[str]) -> None:
    """Any SKUs give filters of at most 100 ids and 8 KB, with each SKU once."""
    lists = list(catalog._filters(keys))
    assert max(map(len, lists), default=0) < 8_000
    asked = [literal for each in lists for literal in each.split(",%22")]
    assert len(asked) == len(keys)
    assert all(each.count("%22$custom") <= catalog.MAX_ENTRIES for each in lists)
    for key, literal in zip(keys, asked, strict=True):
        assert catalog_id(key)[:20] in unquote(literal)


def test_unfinished_deletion_of_a_variant_precedes_other_errors() -> None:
    """The job can still delete a SKU that another product gets, so no worker may process the message."""
    deletions = [Operation(OperationKind.DELETE_VARIANT, sku) for sku in "abc"]
    unfinished = JobUnfinished("a job has not ended yet", 600.0)
    result_of = {
        "a": SendResult(None, 1),
        "b": SendResult(Transient("503"), 1),
        "c": SendResult(unfinished, 1),
    }
    assert catalog._StaleVariants(deletions).result(result_of) == SendResult(unfinished, 4)
    assert catalog._StaleVariants([], Transient("503")).result({}).error is not None
