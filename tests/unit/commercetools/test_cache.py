"""The cache: its lifetime, and one read for all threads that miss the same value."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from threading import Event
from typing import TYPE_CHECKING

import pytest

from worker.commercetools.cache import CachedReader
from worker.commercetools.queries import (
    CATEGORY_NAMES,
    DISCOUNT_CODES,
    LINE_PRODUCTS,
    ORDERS,
    PRODUCTS,
    InMemoryReader,
    Query,
    QueryResult,
)
from worker.errors import Transient

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

WAIT = 5.0


class SlowReader:
    """A Reader that finds a resource for every value except "none". It can be blocked, and records its queries."""

    def __init__(self) -> None:
        self.queries: list[tuple[str, frozenset[str]]] = []
        self.started = Event()
        self.unblocked = Event()
        self.unblocked.set()
        self.error: Exception | None = None

    def find(self, query: Query, values: Collection[str]) -> QueryResult:
        self.queries.append((query.path, frozenset(values)))
        self.started.set()
        assert self.unblocked.wait(WAIT)
        if isinstance(self.error, Transient):
            return dict.fromkeys(values, self.error)
        if self.error:
            raise self.error
        return {value: [] if value == "none" else [{"id": value, "extra": "x" * 1_000}] for value in values}


@pytest.fixture
def reader() -> SlowReader:
    return SlowReader()


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as executor:
        yield executor


@pytest.mark.parametrize("query", [LINE_PRODUCTS, CATEGORY_NAMES, DISCOUNT_CODES], ids=lambda query: query.path)
def test_cached_values_are_not_read_again(query: Query, reader: SlowReader) -> None:
    """Only missing values are read, and only the cached fields are kept."""
    cached = CachedReader(reader, 60)
    cached.find(query, ["a", "b"])
    found = cached.find(query, ["a", "b", "c"])
    assert reader.queries == [(query.path, frozenset("ab")), (query.path, frozenset("c"))]
    assert [resource["id"] for value in "abc" for resource in found[value]] == ["a", "b", "c"]  # type: ignore[union-attr]
    assert "extra" not in found["a"][0]  # type: ignore[index]


def test_only_named_attributes_are_cached() -> None:
    """The attributes of a product can be large texts in many languages."""
    brand, text = {"name": "brand", "value": "Acme"}, {"name": "text", "value": "x" * 1_000}
    product = {"id": "a", "categories": [], "attributes": [text, brand]}
    cached = CachedReader(InMemoryReader({"product-projections": [product]}), 60, ("brand",))
    cached.find(LINE_PRODUCTS, ["a"])
    assert cached.find(LINE_PRODUCTS, ["a"]) == {"a": [product | {"attributes": [brand]}]}


def test_queries_without_cached_fields_are_always_read(reader: SlowReader) -> None:
    """An order, or a product for its own message, must be current."""
    cached = CachedReader(reader, 60)
    for query in (ORDERS, PRODUCTS):
        cached.find(query, ["a"])
        cached.find(query, ["a"])
    assert len(reader.queries) == 4


def test_missing_resources_are_not_cached(reader: SlowReader) -> None:
    """A missing resource can be created at any time."""
    cached = CachedReader(reader, 60)
    assert cached.find(CATEGORY_NAMES, ["none"]) == {"none": []}
    assert cached.find(CATEGORY_NAMES, ["none"]) == {"none": []}
    assert len(reader.queries) == 2


def test_lifetime_of_zero_disables_the_cache(reader: SlowReader) -> None:
    """KLAVIYO_WORKER_CACHE_TTL=0."""
    cached = CachedReader(reader, 0)
    cached.find(CATEGORY_NAMES, ["a"])
    cached.find(CATEGORY_NAMES, ["a"])
    assert len(reader.queries) == 2


def test_concurrent_misses_are_read_once(reader: SlowReader, threads: ThreadPoolExecutor) -> None:
    """At startup, many orders for one product need one query in total, not one per lane."""
    cached = CachedReader(reader, 60)
    reader.unblocked.clear()
    first = threads.submit(cached.find, CATEGORY_NAMES, ["a", "b"])
    assert reader.started.wait(WAIT)
    others = [threads.submit(cached.find, CATEGORY_NAMES, ["a", "b"]) for _ in range(5)]
    reader.unblocked.set()
    for each in (first, *others):
        assert {value: found[0]["id"] for value, found in each.result(WAIT).items()} == {"a": "a", "b": "b"}  # type: ignore[index]
    assert reader.queries == [("categories", frozenset("ab"))]


@pytest.mark.parametrize("error", [Transient("503"), ZeroDivisionError()], ids=["transient", "unexpected"])
def test_failed_read_fails_all_waiting_threads_and_is_not_cached(
    error: Exception, reader: SlowReader, threads: ThreadPoolExecutor
) -> None:
    """No thread waits indefinitely, and the next call reads again."""
    cached = CachedReader(reader, 60)
    reader.error = error
    reader.unblocked.clear()
    first = threads.submit(cached.find, CATEGORY_NAMES, ["a"])
    assert reader.started.wait(WAIT)
    second = threads.submit(cached.find, CATEGORY_NAMES, ["a"])
    reader.unblocked.set()
    for each in (first, second):
        if isinstance(error, Transient):
            assert each.result(WAIT) == {"a": error}
        else:
            assert each.exception(WAIT) is error
    reader.error = None
    assert cached.find(CATEGORY_NAMES, ["a"])["a"]


def test_threads_that_miss_overlapping_values_do_not_deadlock(reader: SlowReader, threads: ThreadPoolExecutor) -> None:
    """Each thread reads its own values before it waits for those of another thread."""
    cached = CachedReader(reader, 60)
    reader.unblocked.clear()
    first = threads.submit(cached.find, CATEGORY_NAMES, ["a", "b"])
    assert reader.started.wait(WAIT)
    second = threads.submit(cached.find, CATEGORY_NAMES, ["b", "c"])
    third = threads.submit(cached.find, LINE_PRODUCTS, ["b"])
    reader.unblocked.set()
    assert set(first.result(WAIT)) == {"a", "b"}
    assert set(second.result(WAIT)) == {"b", "c"}
    assert third.result(WAIT)["b"]
    queries = [("categories", "ab"), ("categories", "c"), ("product-projections", "b")]
    assert Counter(reader.queries) == Counter((path, frozenset(values)) for path, values in queries)
