"""The number of resources per page."""

from __future__ import annotations

from worker.commercetools.page_sizes import MAX_PAGE_SIZE, PAGE_BYTES, PageSizes
from worker.commercetools.queries import CUSTOMERS, ORDERS, PRODUCTS, PRODUCTS_BY_SKU


def test_size_follows_the_last_resources() -> None:
    """A few large resources are forgotten after some pages. Each endpoint has its own size."""
    sizes = PageSizes()
    sizes.observe(ORDERS, PAGE_BYTES, 40)
    assert sizes.next_size(ORDERS) == 40
    assert sizes.next_size(CUSTOMERS) == MAX_PAGE_SIZE
    sizes.observe(ORDERS, 1_000, 1)
    assert 40 < sizes.next_size(ORDERS) < 50
    for _ in range(40):
        sizes.observe(ORDERS, 1_000, 1)
    assert sizes.next_size(ORDERS) == MAX_PAGE_SIZE


def test_empty_page_shows_no_size() -> None:
    """It neither divides by zero nor enlarges the next page."""
    sizes = PageSizes()
    before = sizes.next_size(PRODUCTS)
    sizes.observe(PRODUCTS, 100, 0)
    assert sizes.next_size(PRODUCTS) == before < MAX_PAGE_SIZE


def test_too_large_page_is_halved_down_to_one_resource() -> None:
    """Queries of one endpoint share its sizes."""
    sizes = PageSizes()
    requested = [sizes.next_size(PRODUCTS)]
    while requested[-1] > 1:
        sizes.halve(PRODUCTS_BY_SKU, requested[-1])
        requested.append(sizes.next_size(PRODUCTS))
    assert requested == [20, 10, 5, 2, 1]
