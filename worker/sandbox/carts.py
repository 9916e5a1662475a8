"""Sample carts: one that is abandoned, one that is ordered, and one without an email address."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from worker.sandbox.commercetools.shop import uid
from worker.sandbox.envelopes import bare, cloudevent
from worker.sandbox.notifications import change
from worker.sandbox.samples import Sample

if TYPE_CHECKING:
    from worker.sandbox.commercetools.shop import Shop
    from worker.sandbox.http import Json

METRICS = {"started_checkout": "Started Checkout", "added_to_cart": "Added to Cart"}  # the mapping that they need


def add_carts(shop: Shop) -> list[Sample]:
    """Add the carts to a shop. Return the notifications of their changes."""
    abandoned = _cart(shop, "guest", id=uid("cart:abandoned"))
    ordered = _cart(shop, "three", cartState="Ordered")
    anonymous = _cart(shop, "recurring", id=uid("cart:anonymous"))
    for name in ("customerEmail", "customerId", "billingAddress", "shippingAddress"):
        anonymous.pop(name, None)
    shop.carts.update({cart["id"]: cart for cart in (abandoned, ordered, anonymous)})
    return [
        Sample("a cart that reaches checkout · bare", bare(_updated(abandoned)), "sent"),
        Sample("the same cart, recalculated · cloudevent", cloudevent(_updated(abandoned)), "sent"),
        Sample("a cart that was ordered · bare", bare(_updated(ordered)), "ignored"),
        Sample("a cart of no known person · cloudevent", cloudevent(_updated(anonymous)), "ignored"),
    ]


def _cart(shop: Shop, order: str, /, **fields: Any) -> Json:
    """Return the cart from which an order was made."""
    made = shop.orders[uid(f"order:{order}")]
    names = ("lineItems", "totalPrice", "taxedPrice", "customerId", "customerEmail", "billingAddress", "version")
    cart = {name: made[name] for name in (*names, "lastModifiedAt") if name in made}
    own = {"id": uid(f"cart:{order}"), "type": "Cart", "cartState": "Active", "customLineItems": []}
    return own | cart | {"shippingAddress": made.get("billingAddress")} | fields


def _updated(cart: Json) -> Json:
    return change("ResourceUpdated", "cart", cart["id"], version=cart["version"])
