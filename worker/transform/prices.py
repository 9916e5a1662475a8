"""The prices of a variant: one rule selects the price of the catalog and every price of the metadata.

The rule is commercetools' own price selection, without a customer group:
https://docs.commercetools.com/api/pricing-and-discounts-overview#price-selection.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from worker.json_access import as_dict, as_dicts, as_key, as_text, parse_time, unique
from worker.transform.fields import currency, money

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from worker.mapping import MappingConfig
    from worker.model import Json

_NEVER = datetime.max.replace(tzinfo=UTC)
_ALWAYS = datetime.min.replace(tzinfo=UTC)


def catalog_price(prices: Sequence[Json], mapping: MappingConfig, as_of: datetime) -> float | None:
    """Return the price of a catalog entry at `as_of`, in major units; None if no price fits.

    `prices` are embedded or standalone prices of one variant.
    """
    current = [price for price in prices if _holds(price, as_of)]
    return price_amount(_select(current, mapping, mapping.price.country, mapping.currency))


def price_metadata(prices: Sequence[Json], mapping: MappingConfig, as_of: datetime) -> tuple[Json, Json]:
    """Return one price per currency and per country (`{price_EUR: 10.0, price_DE: 12.0}`), and the currencies.

    The price of a currency is the one without a country. The price of a country has the preferred currency if the
    country has such a price, otherwise the first currency by code: `{currency_DE: "EUR"}`.
    """
    current = [price for price in prices if _holds(price, as_of)]
    amounts: Json = {}
    currencies: Json = {}
    for code in _currencies(current, ""):
        amounts[f"price_{code}"] = price_amount(_select(current, mapping, "", code))
    for country in sorted({as_text(price.get("country")) for price in current} - {""}):
        codes = sorted(_currencies(current, country), key=lambda code: code != mapping.currency)
        selected = (_select(current, mapping, country, code) for code in codes)
        if (price := next(filter(None, selected), None)) is not None:
            amounts[f"price_{country}"] = price_amount(price)
            currencies[f"currency_{country}"] = currency(price.get("value"))
    return {name: amount for name, amount in amounts.items() if amount is not None}, currencies


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


def _holds(price: Json, as_of: datetime) -> bool:
    """Return whether a price is a price for everybody at `as_of`: no customer group, no subscription, not inactive."""
    start, end = _window(price)
    is_special = price.get("customerGroup") or price.get("recurrencePolicy")
    return start <= as_of < end and not is_special and price.get("active") is not False


def _select(prices: Iterable[Json], mapping: MappingConfig, country: str, code: str) -> Json | None:
    """Return the most specific price for a country ("": none) in a currency ("": any), or None.

    A price for the channel precedes a price for the country. Among equally specific prices, one with a validity period
    precedes those without one; then the first currency by code and the earliest period precede the others.
    """
    fitting = [
        price
        for price in prices
        if code in {"", currency(price.get("value"))}
        and _channel(price) in {"", mapping.price.channel}
        and as_text(price.get("country")) in {"", country}
    ]
    return min(fitting, key=_precedence, default=None)


def _precedence(price: Json) -> tuple[bool, bool, bool, str, tuple[datetime, datetime]]:
    window = _window(price)
    code = currency(price.get("value"))
    return not _channel(price), not as_text(price.get("country")), window == (_ALWAYS, _NEVER), code, window


def _window(price: Json) -> tuple[datetime, datetime]:
    return parse_time(price.get("validFrom")) or _ALWAYS, parse_time(price.get("validUntil")) or _NEVER


def _currencies(prices: Iterable[Json], country: str) -> list[str]:
    """Return the currencies of the prices of exactly this country, in order of their codes."""
    codes = (currency(price.get("value")) for price in prices if as_text(price.get("country")) == country)
    return unique(sorted(code for code in codes if code))


def _channel(price: Json) -> str:
    return as_text(as_dict(price.get("channel")).get("id"))
