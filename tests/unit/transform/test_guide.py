"""The properties of events, compared name by name with Klaviyo's guide for e-commerce platforms.

Klaviyo's templates, segments and recommendations use exactly these names:
https://developers.klaviyo.com/en/docs/guide_to_integrating_a_platform_without_a_pre_built_klaviyo_integration
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from worker.mapping import MappingConfig
from worker.model import Enriched, Notification
from worker.transform import transform

Shape = dict[str, Any]  # name -> type, or the shape of an object, or a list with the shape of its entries

ITEM: Shape = {
    "ProductID": str,
    "SKU": str,
    "ProductName": str,
    "Quantity": int,
    "ItemPrice": float,
    "RowTotal": float,
    "ProductURL": str,
    "ImageURL": str,
    "Categories": [str],
    "Brand": str,
}
ADDRESS: Shape = dict.fromkeys(
    ("FirstName", "LastName", "Address1", "City", "RegionCode", "CountryCode", "Zip", "Phone"), str
)
ORDER: Shape = {
    "OrderId": str,
    "Categories": [str],
    "ItemNames": [str],
    "Brands": [str],
    "DiscountCode": str,
    "DiscountValue": float,
    "Items": [ITEM],
    "BillingAddress": ADDRESS,
    "ShippingAddress": ADDRESS,
}
ORDERED_PRODUCT: Shape = {
    "OrderId": str,
    "ProductID": str,
    "SKU": str,
    "ProductName": str,
    "Quantity": int,
    "ProductURL": str,
    "ImageURL": str,
    "Categories": [str],
    "ProductBrand": str,
}
CART_ITEM: Shape = {name: kind for name, kind in ITEM.items() if name not in {"Brand", "Categories"}}
CART: Shape = {"ItemNames": [str], "CheckoutURL": str, "Items": [CART_ITEM | {"ProductCategories": [str]}]}
ADDED_ITEM: Shape = {
    "AddedItemProductName": str,
    "AddedItemProductID": str,
    "AddedItemSKU": str,
    "AddedItemCategories": [str],
    "AddedItemImageURL": str,
    "AddedItemURL": str,
    "AddedItemPrice": float,
    "AddedItemQuantity": int,
}
GUIDE = {
    "Started Checkout": CART | {"Categories": [str]},
    "Added to Cart": CART | ADDED_ITEM,
    "Placed Order": ORDER,
    "Ordered Product": ORDERED_PRODUCT,
    "Fulfilled Order": ORDER,
    "Cancelled Order": ORDER | {"Reason": str},
    "Refunded Order": ORDER | {"Reason": str},
}


def eur(cents: int) -> dict[str, Any]:
    return {"type": "centPrecision", "currencyCode": "EUR", "centAmount": cents, "fractionDigits": 2}


HOME = {
    "firstName": "Ada",
    "lastName": "Lovelace",
    "streetName": "Elm Row",
    "streetNumber": "4",
    "city": "York",
    "state": "NY",
    "country": "GB",
    "postalCode": "AB1 2CD",
    "phone": "030 901820",
}
LINE = {
    "id": "line-1",
    "productId": "prod-1",
    "productSlug": {"en": "mug"},
    "name": {"en": "Mug"},
    "variant": {
        "sku": "MUG-1",
        "images": [{"url": "https://i/1"}],
        "attributes": [{"name": "brand", "value": "B"}],
    },
    "price": {"value": eur(1000)},
    "quantity": 1,
    "totalPrice": eur(900),
    "discountedPricePerQuantity": [
        {"quantity": 1, "discountedPrice": {"includedDiscounts": [{"discountedAmount": eur(100)}]}}
    ],
}
ORDER_RESOURCE = {
    "id": "order-1",
    "cartState": "Active",
    "createdAt": "2026-11-23T10:00:00.000Z",
    "customerEmail": "ada@example.com",
    "totalPrice": eur(900),
    "lineItems": [LINE],
    "discountCodes": [{"discountCode": {"id": "code-1"}, "state": "MatchesCart"}],
    "billingAddress": HOME,
    "shippingAddress": HOME,
    "custom": {"fields": {"cancelReason": "Too late"}},
}
REFUND = {
    "id": "tx",
    "type": "Refund",
    "state": "Success",
    "amount": eur(900),
    "custom": {"fields": {"reason": "Too small"}},
}
MESSAGES: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("order", "OrderCreated", {}),
    ("order", "OrderStateChanged", {"orderState": "Complete"}),
    ("order", "OrderStateChanged", {"orderState": "Cancelled"}),
    ("payment", "PaymentTransactionAdded", {"transaction": REFUND}),
    ("cart", "ResourceUpdated", {}),
)


def events() -> dict[str, dict[str, Any]]:
    """Return the attributes of the events about an order, which also stands for its cart, by metric."""
    mapping = MappingConfig.model_validate(
        {
            "product_url_template": "https://shop.example/{{productSlug}}",
            "metrics": {"started_checkout": "Started Checkout", "added_to_cart": "Added to Cart"},
            "cart": {"checkout_url": "https://shop.example/carts/{{cartId}}"},
            "order": {"custom_fields": {"rename": {"cancelReason": "Reason"}}},
        }
    )
    found = {}
    for resource, kind, payload in MESSAGES:
        enriched = Enriched(
            Notification(kind, resource, f"{resource}-1", "2026-11-23T11:00:00Z", payload),
            datetime(2026, 11, 24, tzinfo=UTC),
            order=ORDER_RESOURCE,
            payment={"id": "payment-1", "transactions": [REFUND]},
            product_categories={"prod-1": ["cups"]},
            categories={"cups": {"id": "cups", "name": {"en": "Cups"}}},
            discount_codes={"code-1": "SUMMER10"},
        )
        for operation in transform(enriched, mapping):
            attributes = (operation.resource or {}).get("attributes", {})
            if "metric" in attributes:
                found[attributes["metric"]["data"]["attributes"]["name"]] = attributes
    return found


def missing(shape: Any, value: Any, path: str) -> list[str]:
    """Return the paths in `shape` that `value` lacks, or has with another type."""
    if isinstance(shape, dict):
        entries = value if isinstance(value, dict) else {}
        return [each for name, part in shape.items() for each in missing(part, entries.get(name), f"{path}.{name}")]
    if isinstance(shape, list):
        return missing(shape[0], value[0], f"{path}[]") if isinstance(value, list) and value else [path]
    return [] if type(value) is shape else [path]


@pytest.mark.parametrize("metric", GUIDE)
def test_events_have_the_names_of_the_guide(metric: str) -> None:
    """Each property has the name and the type of the guide."""
    event = events()[metric]
    assert missing(GUIDE[metric], event["properties"], metric) == []
    assert missing({"value": float, "value_currency": str, "unique_id": str, "time": str}, event, metric) == []
