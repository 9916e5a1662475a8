"""Which of a variant's prices the catalog shows."""

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
    """Return the price that holds at `as_of`, in major units; 0 when there is none.

    A price whose validity window holds wins (earliest validFrom, then earliest validUntil); else the
    first with neither window nor customer group.
    """
    prices = _eligible(as_dicts(variant.get("prices")), mapping)
    windowed = [price for price in prices if _windowed(price) and _holds(price, as_of)]
    plain = [price for price in prices if not _windowed(price) and not price.get("customerGroup")]
    chosen = min(windowed, key=_window) if windowed else next(iter(plain), {})
    return price_amount(chosen) or 0.0


def price_metadata(variant: Json) -> tuple[Json, Json]:
    """Return `{price_EUR: 10.0, price_DE: 12.0}` and `{currency_DE: "EUR"}` of all prices; the first of a kind wins."""
    amounts: Json = {}
    currencies: Json = {}
    for price in as_dicts(variant.get("prices")):
        country, code = as_text(price.get("country")), currency(price.get("value"))
        amounts.setdefault(f"price_{country or code}", price_amount(price))
        if country:
            currencies.setdefault(f"currency_{country}", code)
    return amounts, currencies


def price_amount(price: Any) -> float | None:
    """Return the discounted value of a price when it has one, else its value."""
    price = as_dict(price)
    discounted = money(as_dict(price.get("discounted")).get("value"))
    return money(price.get("value")) if discounted is None else discounted


def _eligible(prices: list[Json], mapping: MappingConfig) -> list[Json]:
    """Keep the preferred currency and channel; of those the preferred country's, when there are any."""
    prices = [
        price
        for price in prices
        if (not mapping.currency or currency(price.get("value")) == mapping.currency)
        and as_text(as_dict(price.get("channel")).get("id")) in {"", mapping.price.channel}
    ]
    for name, wanted in (("channel", mapping.price.channel), ("country", mapping.price.country)):
        if wanted:
            prices = [price for price in prices if _key(price, name) == wanted] or prices
    return prices


def _key(price: Json, name: str) -> str:
    value = price.get(name)
    return as_text(value.get("id")) if isinstance(value, dict) else as_text(value)


def _windowed(price: Json) -> bool:
    return bool(price.get("validFrom") or price.get("validUntil"))


def _window(price: Json) -> tuple[datetime, datetime]:
    return parse_time(price.get("validFrom")) or _ALWAYS, parse_time(price.get("validUntil")) or _NEVER


def _holds(price: Json, as_of: datetime) -> bool:
    start, end = _window(price)
    return start <= as_of < end and not price.get("customerGroup")
