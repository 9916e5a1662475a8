"""`check`: whether the catalog of the shop can be written."""

from __future__ import annotations

from copy import deepcopy
from typing import TYPE_CHECKING, Any

import pytest

from tests.integration.conftest import commercetools_for
from worker.commands.check.catalog import check_catalog
from worker.errors import ExitCode, WorkerError
from worker.mapping import MappingConfig
from worker.sandbox import Fault, Sandbox
from worker.sandbox.commercetools.sample_shop import sample_shop
from worker.sandbox.commercetools.shop import price, uid

if TYPE_CHECKING:
    from collections.abc import Sequence

MUG, JEANS = uid("product:enamel-mug"), uid("product:slim-jeans")


def failures(sandbox: Sandbox, **options: Any) -> Sequence[str]:
    found = list(check_catalog(commercetools_for(sandbox, retry_timeout=0), MappingConfig.model_validate(options)))
    assert all(result.exit_code == ExitCode.USAGE for result in found)
    return [f"{result.text} → {result.todo}" for result in found]


def only(sandbox: Sandbox, product: str, **more: Any) -> None:
    sandbox.shop.products = {product: deepcopy(sample_shop().products[product]) | more}


def test_shop_with_prices_passes(sandbox: Sandbox) -> None:
    """Products without any price do not count: nothing shows that the mapping is wrong."""
    assert failures(sandbox) == []
    only(sandbox, uid("product:gift-card"))
    assert failures(sandbox) == []
    only(sandbox, MUG)
    assert failures(sandbox) == []


def test_prices_for_countries_only_need_a_country(sandbox: Sandbox) -> None:
    """Without price.country, no catalog entry would have a price."""
    prices = [price(100, country="FR"), price(200, country="DE")]
    only(sandbox, JEANS, masterVariant={"id": 1, "sku": "J", "prices": prices}, variants=[])
    (failure,) = failures(sandbox)
    assert failure.startswith(
        "all prices are for countries (DE, FR), so no catalog entry has a price → set price.country"
    )
    assert failures(sandbox, price={"country": "DE"}) == []
    only(sandbox, MUG)
    for standalone in sandbox.shop.standalone_prices.values():
        standalone["country"] = "DE"
    assert len(failures(sandbox)) == 1


def test_prices_that_never_fit_are_a_failure(sandbox: Sandbox) -> None:
    """A wrong currency would leave all catalog entries without a price."""
    (failure,) = failures(sandbox, currency="EUR ", price={"country": "DE"})
    assert failure.startswith("no price of the first 6 products fits currency, price.channel and price.country")


def test_modular_catalog_is_a_failure(sandbox: Sandbox) -> None:
    """The worker ignores all products of such a project."""
    only(sandbox, JEANS, variants=[])
    del sandbox.shop.products[JEANS]["masterVariant"]
    (failure,) = failures(sandbox)
    assert failure.startswith("the project uses the catalog model Modular")


def test_prices_that_cannot_be_read_are_an_error(sandbox: Sandbox) -> None:
    """They are not missing."""
    sandbox.commercetools.faults.add(Fault(status=503, times=None, match="standalone-prices"))
    with pytest.raises(WorkerError, match="503"):
        failures(sandbox)
