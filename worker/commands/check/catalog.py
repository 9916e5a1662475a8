"""The check of the catalog: whether the worker can write the products of the shop, and finds their prices."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING

from worker.commands.check.check_result import CheckResult
from worker.commercetools import queries
from worker.errors import ExitCode, WorkerError
from worker.json_access import as_key, unique
from worker.transform.prices import CurrentPrices, has_standalone_prices, prices_of
from worker.transform.product_state import all_variants, is_readable

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from worker.commercetools.client import Commercetools
    from worker.mapping import MappingConfig
    from worker.model import Json


def check_catalog(reader: Commercetools, mapping: MappingConfig) -> Iterator[CheckResult]:
    """Yield a failure if the first published products show that the catalog would be wrong. Raises WorkerError."""
    products = reader.page(queries.PRODUCTS)
    if not all(map(is_readable, products)):
        text = "the project uses the catalog model Modular, which is not supported: products are ignored"
        yield _failure(text, "use the catalog model Classic, or disable the product types (disabled_types)")
        return
    now = datetime.now(UTC)
    groups = [CurrentPrices(prices, mapping, now) for prices in _prices(reader, products) if prices]
    if not groups or any(prices.catalog_price() is not None for prices in groups):
        return
    names = {name for prices in groups for name in prices.metadata()[1]}
    countries = sorted(name.removeprefix("currency_") for name in names)
    if countries and not mapping.price.country:
        text = f"all prices are for countries ({', '.join(countries[:5])}), so no catalog entry has a price"
        yield _failure(text, "set price.country in the mapping file")
    else:
        text = f"no price of the first {len(products)} products fits currency, price.channel and price.country"
        yield _failure(text, "correct them in the mapping file, or PREFERRED_CURRENCY")


def _failure(text: str, todo: str) -> CheckResult:
    return CheckResult("catalog", "failed", text, todo, ExitCode.USAGE)


def _prices(reader: Commercetools, products: list[Json]) -> Iterator[Sequence[Json]]:
    """Yield the prices of each variant. Raises WorkerError."""
    standalone = [product for product in products if has_standalone_prices(product)]
    skus = unique(as_key(variant.get("sku")) for product in standalone for variant in all_variants(product))
    by_sku: dict[str, list[Json]] = {}
    for sku, found in reader.find(queries.STANDALONE_PRICES_BY_SKU, skus).items():
        if isinstance(found, WorkerError):
            raise found
        by_sku[sku] = found
    for product in products:
        for variant in all_variants(product):
            yield prices_of(product, variant, by_sku)
