"""A large shop: many different resources with an index."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import phonenumbers
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.sandbox.test_commercetools_api import Caller, names
from worker.sandbox import Sandbox, sample_shop
from worker.sandbox.commercetools.copies import WIDE, Copies
from worker.sandbox.commercetools.predicate import parse_predicate

if TYPE_CHECKING:
    from collections.abc import Iterator

COPIES = Copies(sample_shop(), 20)
ALL = {
    name: list(COPIES.candidates(name, []))
    for name in ("orders", "customers", "product-projections", "inventory", "categories")
}


@pytest.fixture
def call() -> Iterator[Caller]:
    with Sandbox(copies=20) as sandbox:
        yield Caller(sandbox)


def test_ids_are_as_documented() -> None:
    """Ids are numbered from 1 to N. The product with many variants comes last."""
    assert [order["id"] for order in ALL["orders"]] == [f"order-{number}" for number in range(1, 21)]
    assert [entry["id"] for entry in ALL["inventory"][:20]] == [f"inventory-entry-{number}" for number in range(1, 21)]
    assert ALL["categories"] == []
    assert list(Copies(sample_shop(), 0).candidates("orders", [])) == []


def test_copies_have_distinct_identifiers() -> None:
    """Otherwise Klaviyo would merge profiles with one phone number and events with one line id."""
    phones = [customer["addresses"][1]["phone"] for customer in ALL["customers"]]
    skus = [sku for product in ALL["product-projections"] for sku in skus_of(product)]
    lines = [line["id"] for order in ALL["orders"] for line in order["lineItems"]]
    emails = [customer["email"] for customer in ALL["customers"]]
    for values, count in ((phones, 20), (skus, 40 + WIDE), (lines, 60), (emails, 20)):
        assert len(set(values)) == len(values) == count
    assert all(phonenumbers.is_valid_number(phonenumbers.parse(phone, "DE")) for phone in phones)


def test_copies_refer_to_each_other() -> None:
    """An order belongs to its customer, an inventory entry to a variant of its product."""
    copies = [resources[:20] for resources in list(ALL.values())[:4]]
    for order, customer, product, entry in zip(*copies, strict=True):
        assert (order["customerId"], order["customerEmail"]) == (customer["id"], customer["email"])
        assert entry["sku"] == product["masterVariant"]["sku"]
        assert len(order["lineItems"]) == 3
    wide = ALL["product-projections"][20]
    assert [entry["sku"] for entry in ALL["inventory"][20:]] == skus_of(wide)


def skus_of(product: dict[str, Any]) -> list[str]:
    return [variant["sku"] for variant in (product["masterVariant"], *product["variants"])]


@pytest.mark.parametrize(
    ("collection", "where", "expected"),
    [
        ("orders", 'id in ("order-2","order-19","order-21")', {"order-2", "order-19"}),
        ("customers", 'id = "customer-7"', {"customer-7"}),
        ("inventory", 'sku in ("sku-3-1","sku-3-2")', {"inventory-entry-3"}),
        ("inventory", '(sku in ("sku-3-1","sku-4-1")) and id > "inventory-entry-3"', {"inventory-entry-4"}),
        (
            "product-projections",
            'masterVariant(sku in ("sku-5-2","sku-6-1")) or variants(sku in ("sku-5-2","sku-6-1"))',
            {"product-5", "product-6"},
        ),
        ("orders", 'lineItems(id in ("line-8-3"))', {"order-8"}),
        ("orders", 'not(id in ("order-1")) and customerId = "customer-9"', {"order-9"}),
    ],
)
def test_query_returns_matching_copies(collection: str, where: str, expected: set[str], call: Caller) -> None:
    """Queries work as for the sample resources."""
    status, document = call.get(collection, ("where", where))
    assert (status, names(document)) == (200, expected)


def test_copy_is_read_by_id(call: Caller) -> None:
    """An unknown id is not found."""
    assert call.get("orders/order-20")[1]["orderNumber"] == "R-20"
    assert call.get("orders/order-21")[0] == 404
    assert call.get("categories/order-20")[0] == 404
    assert call.get("orders", ("limit", "0"))[1]["total"] == 20 + len(sample_shop().orders)


IDS = st.sampled_from([f"order-{number}" for number in range(1, 23)]).map('"{}"'.format)
TERMS = st.one_of(
    st.lists(IDS, min_size=1, max_size=3).map(lambda ids: f"id in ({','.join(ids)})"),
    st.lists(IDS, min_size=1, max_size=3).map(lambda ids: f"id not in ({','.join(ids)})"),
    st.tuples(st.sampled_from(["=", "!=", "<", ">"]), IDS).map(lambda pair: f"id {pair[0]} {pair[1]}"),
    st.integers(1, 22).map(lambda number: f'lineItems(id in ("line-{number}-1") or id = "line-3-2")'),
    st.integers(1, 22).map(lambda number: f'customerId contains any ("customer-{number}")'),
    st.sampled_from(
        ["version = 1", "version = true", "version in (2)", "paymentInfo is defined", "version is defined"]
    ),
)
PREDICATES = st.recursive(
    TERMS,
    lambda inner: (
        st.tuples(inner, st.sampled_from(["and", "or"]), inner).map(
            lambda parts: f"({parts[0]}) {parts[1]} ({parts[2]})"
        )
        | inner.map(lambda term: f"not ({term})")
    ),
    max_leaves=5,
)


@given(st.lists(PREDICATES, max_size=2))
def test_index_misses_no_match(predicates: list[str]) -> None:
    """For any predicates, every match is among the candidates."""
    tests = [parse_predicate(predicate) for predicate in predicates]
    passing = [order["id"] for order in ALL["orders"] if all(test(order) for test in tests)]
    candidates = [order["id"] for order in COPIES.candidates("orders", tests)]
    assert set(passing) <= set(candidates)
    assert len(set(candidates)) == len(candidates)


@pytest.mark.parametrize(
    ("collection", "where", "expected"),
    [
        ("orders", 'id in ("order-1","order-2")', 2),
        ("product-projections", 'masterVariant(sku in ("sku-1-1")) or variants(sku in ("sku-2-2"))', 2),
        ("inventory", '(sku in ("sku-1-1")) and id > "x"', 1),
    ],
)
def test_index_reduces_the_candidates(collection: str, where: str, expected: int) -> None:
    """A query by id or sku does not test every resource."""
    assert len(list(COPIES.candidates(collection, [parse_predicate(where)]))) == expected


def test_copies_share_equal_parts() -> None:
    """Names, prices and images exist once in memory."""
    first, second, *_ = ALL["product-projections"]
    assert first["name"] is second["name"]
    assert first["masterVariant"]["prices"] is second["masterVariant"]["prices"]
    assert sys.getsizeof(first) < 2_000
