"""The amounts of an order or a cart: value, line totals, shipping costs, tax and discounts.

`order.value` selects between gross amounts, which refunds have too, and the totals that commercetools shows. The total
of a shop with net prices does not include the tax.
"""

from __future__ import annotations

from decimal import Decimal
from typing import TYPE_CHECKING, Any

from worker.json_access import as_dict, as_dicts, as_int, pick_ids
from worker.transform import fields

if TYPE_CHECKING:
    from collections.abc import Iterator

    from worker.mapping import MappingConfig
    from worker.model import Json


def order_total(order: Json, mapping: MappingConfig) -> Any:
    """Return the money that an order or a cart costs."""
    return _gross(order, order.get("totalPrice"), mapping)


def line_total(line: Json, mapping: MappingConfig) -> Any:
    """Return the money that a line costs: all its pieces, after discounts."""
    return _gross(line, line.get("totalPrice"), mapping)


def line_share(line: Json, quantity: int | None, mapping: MappingConfig) -> Json:
    """Return the money that `quantity` pieces of a line cost, rounded to minor units; {} if it is unknown."""
    money = as_dict(line_total(line, mapping))
    cents, pieces = as_int(money.get("centAmount")), as_int(line.get("quantity"))
    if cents is None or not pieces or quantity is None:
        return {}
    share = round(Decimal(cents) * quantity / pieces)
    kept = ("currencyCode",) if "preciseAmount" in money else ("currencyCode", "fractionDigits")
    return {name: money[name] for name in kept if name in money} | {"centAmount": share}


def shipping_costs(order: Json, mapping: MappingConfig) -> Decimal | None:
    """Return the sum of the costs of all shipping methods, after discounts."""
    prices = []
    for info in shipping_infos(order):
        discounted = as_dict(info.get("discountedPrice")).get("value")
        price = discounted if fields.money(discounted) is not None else info.get("price")
        prices.append(_gross(info, price, mapping))
    return fields.total(prices)


def shipping_infos(order: Json) -> Iterator[Json]:
    """Yield the shipping methods of an order: one, or several with `shippingMode: Multiple`."""
    infos = (order.get("shippingInfo"), *(entry.get("shippingInfo") for entry in as_dicts(order.get("shipping"))))
    return filter(None, map(as_dict, infos))


def tax_total(order: Json) -> Decimal | None:
    """Return the tax of an order, or None if it has no taxed price. commercetools does not always give the total."""
    taxed = as_dict(order.get("taxedPrice"))
    tax, gross, net = (fields.amount(taxed.get(name)) for name in ("totalTax", "totalGross", "totalNet"))
    if tax is None and gross is not None and net is not None:
        return gross - net
    return tax


def discount_value(order: Json, lines: list[Json]) -> Decimal | None:
    """Return the sum of the cart discounts on the lines (multiplied by their quantities) and on the total."""
    parts = [
        discount * (as_int(part.get("quantity")) or 0)
        for line in lines
        for part in as_dicts(line.get("discountedPricePerQuantity"))
        for included in as_dicts(as_dict(part.get("discountedPrice")).get("includedDiscounts"))
        if (discount := fields.amount(included.get("discountedAmount"))) is not None
    ]
    on_total = fields.amount(as_dict(order.get("discountOnTotalPrice")).get("discountedAmount"))
    parts += [] if on_total is None else [on_total]
    return sum(parts, Decimal(0)) if parts else None


def applied_codes(order: Json) -> list[str]:
    """Return the ids of the discount codes that apply to an order or a cart.

    commercetools keeps the other codes, too, with the state that says why they do not apply.
    """
    infos = as_dicts(order.get("discountCodes"))
    return pick_ids([info.get("discountCode") for info in infos if info.get("state") == "MatchesCart"])


def _gross(taxable: Json, total: Any, mapping: MappingConfig) -> Any:
    """Return the gross amount of an order, a line or a shipping method if it is wanted and known, else `total`."""
    if mapping.order.value == "total":
        return total
    gross = as_dict(taxable.get("taxedPrice")).get("totalGross")
    return total if fields.money(gross) is None else gross
