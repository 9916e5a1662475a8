"""The prices of a variant: one rule selects the price of the catalog and every price of the metadata.

The rule is commercetools' own price selection, without a customer group:
https://docs.commercetools.com/api/pricing-and-discounts-overview#price-selection.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, NamedTuple

from worker.json_access import as_dict, as_dicts, as_key, as_text, parse_time
from worker.transform.fields import currency, money

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from worker.mapping import MappingConfig
    from worker.model import Json

_NEVER = datetime.max.replace(tzinfo=UTC)
_ALWAYS = datetime.min.replace(tzinfo=UTC)
_Window = tuple[datetime, datetime]
_UNLIMITED: _Window = (_ALWAYS, _NEVER)


class _Price(NamedTuple):
    """A price that holds now, for all channels or that of the mapping.

    Of the prices that fit, the one with the lowest `precedence` is selected. A price for the channel precedes a price
    for the country. Among equally specific prices, one with a validity period precedes those without one; then the
    first currency by code and the earliest period precede the others.
    """

    precedence: tuple[bool, bool, bool, str, _Window]
    country: str
    code: str
    resource: Json


class CurrentPrices:
    """The prices of a variant that hold at `as_of`. `prices` are its embedded or standalone prices."""

    def __init__(self, prices: Sequence[Json], mapping: MappingConfig, as_of: datetime) -> None:
        self._mapping = mapping
        self._prices = sorted(_holding(prices, mapping.price.channel, as_of), key=lambda price: price.precedence)

    def catalog_price(self) -> float | None:
        """Return the price of the variant's catalog entry, in major units; None if no price fits."""
        return price_amount(self._select(self._mapping.price.country, self._mapping.currency))

    def metadata(self) -> tuple[Json, Json]:
        """Return one price per currency and per country (`{price_EUR: 10.0, price_DE: 12.0}`), and the currencies.

        The price of a currency is the one without a country. The price of a country has the preferred currency if the
        country has such a price, otherwise the first currency by code: `{currency_DE: "EUR"}`.
        """
        amounts: Json = {}
        currencies: Json = {}
        for code in self._currencies(""):
            amounts[f"price_{code}"] = price_amount(self._select("", code))
        for country in sorted({price.country for price in self._prices} - {""}):
            codes = sorted(self._currencies(country), key=lambda code: code != self._mapping.currency)
            selected = (self._select(country, code) for code in codes)
            if (resource := next(filter(None, selected), None)) is not None:
                amounts[f"price_{country}"] = price_amount(resource)
                currencies[f"currency_{country}"] = currency(resource.get("value"))
        return {name: amount for name, amount in amounts.items() if amount is not None}, currencies

    def _select(self, country: str, code: str) -> Json | None:
        """Return the most specific price for a country ("": none) in a currency ("": any), or None."""
        fitting = (
            price.resource for price in self._prices if code in {"", price.code} and price.country in {"", country}
        )
        return next(fitting, None)

    def _currencies(self, country: str) -> list[str]:
        """Return the currencies of the prices of exactly this country, in order of their codes."""
        return sorted({price.code for price in self._prices if price.country == country and price.code})


def prices_of(product: Json, variant: Json, standalone_prices: Mapping[str, Sequence[Json]]) -> Sequence[Json]:
    """Return the prices of a variant: its standalone prices if the product uses them, otherwise its embedded prices.

    `standalone_prices` are by sku.
    """
    if has_standalone_prices(product):
        return standalone_prices.get(as_key(variant.get("sku")), ())
    return as_dicts(variant.get("prices"))


def has_standalone_prices(product: Json) -> bool:
    """Return whether the prices of a product are resources of their own."""
    return product.get("priceMode") == "Standalone"


def price_amount(price: Any) -> float | None:
    """Return the discounted value of a price if it has one, otherwise its value."""
    price = as_dict(price)
    discounted = money(as_dict(price.get("discounted")).get("value"))
    return money(price.get("value")) if discounted is None else discounted


def _holding(prices: Iterable[Json], served_channel: str, as_of: datetime) -> Iterator[_Price]:
    """Yield the prices for everybody at `as_of`: of no customer group, subscription or other channel, not inactive."""
    for price in prices:
        window, channel = _window(price), as_text(as_dict(price.get("channel")).get("id"))
        is_special = price.get("customerGroup") or price.get("recurrencePolicy") or channel not in {"", served_channel}
        if window[0] <= as_of < window[1] and not is_special and price.get("active") is not False:
            country, code = as_text(price.get("country")), currency(price.get("value"))
            yield _Price((not channel, not country, window == _UNLIMITED, code, window), country, code, price)


def _window(price: Json) -> _Window:
    if "validFrom" not in price and "validUntil" not in price:
        return _UNLIMITED
    return parse_time(price.get("validFrom")) or _ALWAYS, parse_time(price.get("validUntil")) or _NEVER
