"""The prices of a variant: the price for the catalog, and all prices for the metadata."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from worker.json_access import as_dict, as_dicts, as_text, parse_time
from worker.transform.fields import currency, money

if TYPE_CHECKING:
    from worker.mapping import MappingConfig
    from worker.model import Json

_NEVER = datetime.max.replace(tzinfo=UTC)
_ALWAYS = datetime.min.replace(tzinfo=UTC)


def catalog_price(variant: Json, mapping: MappingConfig, as_of: datetime) -> float:
    """Return the price that is valid at `as_of`, in major units; 0 if there is none.

    Prices with a validity window take precedence. Among them, the price with the earliest validFrom is chosen, and
    among equals the price with the earliest validUntil. If no such price is valid, the first price without a window and
    without a customer group is chosen.
    """
    prices = _eligible_prices(as_dicts(variant.get("prices")), mapping)
    with_window = [price for price in prices if _has_window(price) and _is_valid(price, as_of)]
    without_window = [price for price in prices if not _has_window(price) and not price.get("customerGroup")]
    selected = min(with_window, key=_window) if with_window else next(iter(without_window), {})
    return price_amount(selected) or 0.0


def price_metadata(variant: Json) -> tuple[Json, Json]:
    """Return all prices (`{price_EUR: 10.0, price_DE: 12.0}`) and the currency per country (`{currency_DE: "EUR"}`)."""
    amounts: Json = {}
    currencies: Json = {}
    for price in as_dicts(variant.get("prices")):
        country, code = as_text(price.get("country")), currency(price.get("value"))
        amounts.setdefault(f"price_{country or code}", price_amount(price))
        if country:
            currencies.setdefault(f"currency_{country}", code)
    return amounts, currencies


def price_amount(price: Any) -> float | None:
    """Return the discounted value of a price if it has one, otherwise its value."""
    price = as_dict(price)
    discounted = money(as_dict(price.get("discounted")).get("value"))
    return money(price.get("value")) if discounted is None else discounted


def _eligible_prices(prices: list[Json], mapping: MappingConfig) -> list[Json]:
    """Return the prices in the preferred currency that have the preferred channel or no channel.

    If some of these prices have the preferred channel, keep only them. Then do the same for the preferred country.
    """
    prices = [
        price
        for price in prices
        if (not mapping.currency or currency(price.get("value")) == mapping.currency)
        and as_text(as_dict(price.get("channel")).get("id")) in {"", mapping.price.channel}
    ]
    for name, preferred in (("channel", mapping.price.channel), ("country", mapping.price.country)):
        if preferred:
            prices = [price for price in prices if _reference_id(price, name) == preferred] or prices
    return prices


def _reference_id(price: Json, name: str) -> str:
    value = price.get(name)
    return as_text(value.get("id")) if isinstance(value, dict) else as_text(value)


def _has_window(price: Json) -> bool:
    return bool(price.get("validFrom") or price.get("validUntil"))


def _window(price: Json) -> tuple[datetime, datetime]:
    return parse_time(price.get("validFrom")) or _ALWAYS, parse_time(price.get("validUntil")) or _NEVER


def _is_valid(price: Json, as_of: datetime) -> bool:
    start, end = _window(price)
    return start <= as_of < end and not price.get("customerGroup")
