"""Carts -> Started Checkout, and Added to Cart per line item.

A cart changes with every click. Its events therefore give way to those of orders: see Operation.background.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import orjson

from worker.errors import Ignored
from worker.json_access import as_dict, as_dicts, as_id, as_int, as_key, as_text, unique
from worker.transform import fields
from worker.transform.identity import identifiers, names_buyer
from worker.transform.line_items import items_of, lines_of, text_locale
from worker.transform.order_events import discount_codes, event_operation, event_time
from worker.transform.order_totals import order_total
from worker.transform.region import country_of, store_of
from worker.transform.registry import handles
from worker.transform.size_limits import EVENT_BYTES, truncate

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from worker.mapping import MappingConfig
    from worker.model import Enriched, Json, Operation

_ADDED = {  # property of the added item -> that of its entry in Items
    "AddedItemProductName": "ProductName",
    "AddedItemProductID": "ProductID",
    "AddedItemSKU": "SKU",
    "AddedItemCategories": "Categories",
    "AddedItemImageURL": "ImageURL",
    "AddedItemURL": "ProductURL",
    "AddedItemPrice": "ItemPrice",
    "AddedItemQuantity": "Quantity",
}


def silence_reason(cart: Json) -> str:
    """Return why a cart has no events, whatever the mapping, or ""."""
    if cart.get("cartState") != "Active":
        return "the cart is not active: it was ordered, merged or frozen"
    if not lines_of(cart):
        return "the cart has no lines"
    if not names_buyer(cart):
        return "the cart names no buyer: expected customerId, customerEmail, or an email in its addresses"
    return ""


def has_reached_checkout(cart: Json, mapping: MappingConfig) -> bool:
    """Return whether a cart has one of the fields that `cart.checkout_when` lists."""
    return any(_has(cart, name) for name in mapping.cart.checkout_when)


def _has(cart: Json, name: str) -> bool:
    if name == "paymentInfo":
        return bool(as_dicts(as_dict(cart.get("paymentInfo")).get("payments")))
    if name == "shippingAddress":  # `shipping` has several with `shippingMode: Multiple`
        return any(entry.get("shippingAddress") for entry in (cart, *as_dicts(cart.get("shipping"))))
    return bool(cart.get(name))


def _omissions(enriched: Enriched, mapping: MappingConfig) -> Iterator[str]:
    cart = as_dict(enriched.order)
    if not cart or silence_reason(cart):
        return
    if mapping.metrics.started_checkout and not has_reached_checkout(cart, mapping):
        yield f"Started Checkout: the cart has none of {', '.join(mapping.cart.checkout_when)} (cart.checkout_when)"
    yield from fields.report_empty(_properties(enriched, mapping))


@handles(
    "ResourceCreated",
    "ResourceUpdated",
    resource="cart",
    effect="Started Checkout; Added to Cart per line item",
    omissions=_omissions,
    switches=("metrics.started_checkout", "metrics.added_to_cart"),
)
def cart_changed(enriched: Enriched, mapping: MappingConfig) -> Iterable[Operation]:
    """Create a Started Checkout event if the cart has reached checkout, and an Added to Cart event per line item.

    Klaviyo ignores the events that it has. A cart whose lines change starts its checkout again.
    """
    if enriched.order is None:
        raise Ignored("commercetools no longer has the cart")
    if reason := silence_reason(enriched.order):
        raise Ignored(reason)
    cart, metrics = enriched.order, mapping.metrics
    if not identifiers(cart, enriched, mapping).get("email"):
        raise Ignored("commercetools shows no email address of the cart's customer")
    starts = bool(metrics.started_checkout) and has_reached_checkout(cart, mapping)
    added = as_dicts(cart.get("lineItems")) if metrics.added_to_cart else []
    if not starts and not added:
        raise Ignored("the cart has not reached checkout: see cart.checkout_when")
    properties, truncated = truncate(
        fields.compact(_properties(enriched, mapping)), EVENT_BYTES // (len(added) + starts)
    )
    events = _events(enriched, mapping, properties, starts=starts, added=added)
    return (replace(event, background=True, truncated=truncated or event.truncated) for event in events)


def _events(
    enriched: Enriched, mapping: MappingConfig, properties: Json, *, starts: bool, added: Sequence[Json]
) -> Iterator[Operation]:
    cart, metrics = as_dict(enriched.order), mapping.metrics
    changed_at = cart.get("lastModifiedAt"), enriched.notification.time
    event = partial(event_operation, value=order_total(cart, mapping), profile=identifiers(cart, enriched, mapping))
    if starts:
        time = event_time(enriched, *changed_at)
        yield event(metric=metrics.started_checkout, unique_id=_checkout_id(cart), time=time, properties=properties)
    for line, item in zip(added, items_of(cart, enriched, mapping), strict=False):  # custom line items come last
        if not as_id(line.get("id")):
            continue
        more = fields.compact({name: item.get(source) for name, source in _ADDED.items()})
        yield event(
            metric=metrics.added_to_cart,
            unique_id=as_id(line.get("id")),
            time=event_time(enriched, line.get("addedAt"), *changed_at),
            properties=more | properties,
        )


def _properties(enriched: Enriched, mapping: MappingConfig) -> Json:
    """Return the properties that all events of a cart share."""
    cart = as_dict(enriched.order)
    items = items_of(cart, enriched, mapping)
    return {
        "CheckoutURL": checkout_url(cart, mapping),
        "ItemNames": unique(item.get("ProductName", "") for item in items),
        "Categories": unique(name for item in items for name in item.get("Categories", ())),
        "DiscountCode": ", ".join(discount_codes(cart, enriched)),
        "Items": [item | _product_categories(item) for item in items],
        "Store": store_of(cart),
        "Country": country_of(cart),
    }


def _product_categories(item: Json) -> Json:
    return {"ProductCategories": item["Categories"]} if "Categories" in item else {}


def checkout_url(cart: Json, mapping: MappingConfig) -> str:
    """Return the URL of the cart's checkout page, or "" if the mapping has no template for it."""
    values = {"cartId": as_id(cart.get("id")), "locale": text_locale(cart, mapping)}
    return fields.fill_template(mapping.cart.checkout_url, values)


def _checkout_id(cart: Json) -> str:
    """Return the unique_id of Started Checkout: the cart and its content, without prices and the order of lines."""
    quantities: Counter[str] = Counter()
    for line in lines_of(cart):
        quantities[_goods(line)] += as_int(line.get("quantity")) or 0
    content: Sequence[Any] = (fields.currency(cart.get("totalPrice")), sorted(quantities.items()))
    return f"{as_id(cart.get('id'))}:{hashlib.sha256(orjson.dumps(content)).hexdigest()[:16]}"


def _goods(line: Json) -> str:
    """Return the sku of a line, else the variant of its product, or the slug of a custom line item."""
    variant = as_dict(line.get("variant"))
    by_product = f"{as_text(line.get('productId'))}:{as_int(variant.get('id'))}" if variant else ""
    return fields.first_nonempty(as_key(variant.get("sku")), by_product, as_text(line.get("slug")))
