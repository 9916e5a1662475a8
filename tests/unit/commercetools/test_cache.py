"""Catalog data: remembered for a while, and read once however many threads ask."""

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
    ORDERS,
    PRODUCT_CATEGORIES,
    PRODUCTS,
    Query,
    QueryResult,
)
from worker.errors import Transient

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

WAIT = 5.0


class SlowReader:
    """Answers, when it may, with a resource for every value but "none"; notes what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, frozenset[str]]] = []
        self.begun = Event()
        self.may_answer = Event()
        self.may_answer.set()
        self.error: Exception | None = None

    def find(self, query: Query, values: Collection[str]) -> QueryResult:
        self.asked.append((query.path, frozenset(values)))
        self.begun.set()
        assert self.may_answer.wait(WAIT)
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


@pytest.mark.parametrize("query", [PRODUCT_CATEGORIES, CATEGORY_NAMES, DISCOUNT_CODES], ids=lambda query: query.path)
def test_what_is_known_is_not_read_again(query: Query, reader: SlowReader) -> None:
    """Only what is new is asked for, and only what is needed is kept."""
    remembered = CachedReader(reader, 60)
    remembered.find(query, ["a", "b"])
    found = remembered.find(query, ["a", "b", "c"])
    assert reader.asked == [(query.path, frozenset("ab")), (query.path, frozenset("c"))]
    assert [resource["id"] for value in "abc" for resource in found[value]] == ["a", "b", "c"]  # type: ignore[union-attr]
    assert "extra" not in found["a"][0]  # type: ignore[index]


def test_what_must_be_current_is_always_read(reader: SlowReader) -> None:
    """An order, or a product for its own message."""
    remembered = CachedReader(reader, 60)
    for query in (ORDERS, PRODUCTS):
        remembered.find(query, ["a"])
        remembered.find(query, ["a"])
    assert len(reader.asked) == 4


def test_what_does_not_exist_is_asked_for_again(reader: SlowReader) -> None:
    """It may be created at any moment."""
    remembered = CachedReader(reader, 60)
    assert remembered.find(CATEGORY_NAMES, ["none"]) == {"none": []}
    assert remembered.find(CATEGORY_NAMES, ["none"]) == {"none": []}
    assert len(reader.asked) == 2


def test_nothing_is_remembered_without_a_lifetime(reader: SlowReader) -> None:
    """KLAVIYO_WORKER_CACHE_TTL=0."""
    remembered = CachedReader(reader, 0)
    remembered.find(CATEGORY_NAMES, ["a"])
    remembered.find(CATEGORY_NAMES, ["a"])
    assert len(reader.asked) == 2


def test_what_several_threads_miss_is_read_once(reader: SlowReader, threads: ThreadPoolExecutor) -> None:
    """A backlog of orders of one product, at the start: one query, not one for each lane."""
    remembered = CachedReader(reader, 60)
    reader.may_answer.clear()
    first = threads.submit(remembered.find, CATEGORY_NAMES, ["a", "b"])
    assert reader.begun.wait(WAIT)
    others = [threads.submit(remembered.find, CATEGORY_NAMES, ["a", "b"]) for _ in range(5)]
    reader.may_answer.set()
    for each in (first, *others):
        assert {value: found[0]["id"] for value, found in each.result(WAIT).items()} == {"a": "a", "b": "b"}  # type: ignore[index]
    assert reader.asked == [("categories", frozenset("ab"))]


@pytest.mark.parametrize("error", [Transient("503"), ZeroDivisionError()], ids=["an outage", "a defect"])
def test_a_reading_that_fails_fails_all_that_wait_for_it_and_is_not_remembered(
    error: Exception, reader: SlowReader, threads: ThreadPoolExecutor
) -> None:
    """Nobody waits for ever, and the next one asks again."""
    remembered = CachedReader(reader, 60)
    reader.error = error
    reader.may_answer.clear()
    first = threads.submit(remembered.find, CATEGORY_NAMES, ["a"])
    assert reader.begun.wait(WAIT)
    second = threads.submit(remembered.find, CATEGORY_NAMES, ["a"])
    reader.may_answer.set()
    for each in (first, second):
        if isinstance(error, Transient):
            assert each.result(WAIT) == {"a": error}
        else:
            assert each.exception(WAIT) is error
    reader.error = None
    assert remembered.find(CATEGORY_NAMES, ["a"])["a"]


def test_threads_that_miss_each_others_values_do_not_wait_for_each_other(
    reader: SlowReader, threads: ThreadPoolExecutor
) -> None:
    """Each reads its own before it waits for the other's."""
    remembered = CachedReader(reader, 60)
    reader.may_answer.clear()
    first = threads.submit(remembered.find, CATEGORY_NAMES, ["a", "b"])
    assert reader.begun.wait(WAIT)
    second = threads.submit(remembered.find, CATEGORY_NAMES, ["b", "c"])
    third = threads.submit(remembered.find, PRODUCT_CATEGORIES, ["b"])
    reader.may_answer.set()
    assert set(first.result(WAIT)) == {"a", "b"}
    assert set(second.result(WAIT)) == {"b", "c"}
    assert third.result(WAIT)["b"]
    asked = [("categories", "ab"), ("categories", "c"), ("product-projections", "b")]
    assert Counter(reader.asked) == Counter((path, frozenset(values)) for path, values in asked)
