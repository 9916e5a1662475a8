"""The queries to commercetools, and the interface that reads them."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from worker.json_access import as_dict, as_dicts, as_key, as_text, pick_ids
from worker.transform.product_state import all_variants

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from worker.errors import WorkerError
    from worker.model import Json

QueryResult = dict[str, "list[Json] | WorkerError"]


@dataclass(frozen=True, slots=True, eq=False)
class Query:
    """A query that finds the resources for many values together.

    `predicate` is a template for the comma-separated, quoted values. `keys_of` returns the values that a resource
    matches. `cached_fields` are the fields that a CachedReader caches, and the only ones that the client keeps. If
    there are none, it caches nothing. `resource_bytes` is the size of a resource until one has been read. No more pages
    are read after `max_resources`; 0: all are read.
    """

    path: str
    predicate: str
    keys_of: Callable[[Json], list[str]]
    expand: tuple[str, ...] = ()
    cached_fields: tuple[str, ...] = ()
    resource_bytes: int = 4_000
    max_resources: int = 0


def _id(resource: Json) -> list[str]:
    return [as_text(resource.get("id"))]


def _sku(resource: Json) -> list[str]:
    return [as_key(resource.get("sku"))]


def _payments(order: Json) -> list[str]:
    return pick_ids(as_dict(order.get("paymentInfo")).get("payments"))


def _cart(order: Json) -> list[str]:
    return [as_text(as_dict(order.get("cart")).get("id"))]


def _ancestors(category: Json) -> list[str]:
    return pick_ids(category.get("ancestors"))


def _categories(product: Json) -> list[str]:
    return pick_ids(product.get("categories"))


def _skus(product: Json) -> list[str]:
    return [sku for variant in all_variants(product) for sku in _sku(variant)]


def is_unique(query: Query) -> bool:
    """Return whether each value matches at most one resource."""
    return query.keys_of in (_id, _skus)


def trim(query: Query, resource: Json) -> Json:
    """Return the resource without fields that the worker does not use. Most of a product are its attributes."""
    if query.cached_fields:
        return _keep(resource, query.cached_fields)
    if query.path != PRODUCTS.path:
        return resource
    trimmed = _keep(resource, _PRODUCT_FIELDS)
    if "masterVariant" in trimmed:
        trimmed["masterVariant"] = _keep(as_dict(trimmed["masterVariant"]), _VARIANT_FIELDS)
    return trimmed | {"variants": [_keep(variant, _VARIANT_FIELDS) for variant in as_dicts(resource.get("variants"))]}


def _keep(resource: Json, fields: Collection[str]) -> Json:
    return {name: resource[name] for name in fields if name in resource}


_PRODUCT_BYTES = 200_000  # a large product has 300 KB
_TEXTS = ("name", "description", "slug")
_PRODUCT_FIELDS = ("id", "version", *_TEXTS, "categories", "attributes", "published", "priceMode", "masterVariant")
_VARIANT_FIELDS = ("id", "sku", "prices", "images")

ORDERS = Query("orders", "id in ({})", _id)
ORDERS_BY_PAYMENT = Query("orders", "paymentInfo(payments(id in ({})))", _payments)
ORDERS_BY_CART = Query("orders", "cart(id in ({}))", _cart)
CARTS = Query("carts", "id in ({})", _id)
PAYMENTS = Query("payments", "id in ({})", _id)
CUSTOMERS = Query("customers", "id in ({})", _id, expand=("customerGroup", "customerGroupAssignments[*].customerGroup"))
CUSTOMER_EMAILS = replace(CUSTOMERS, expand=(), cached_fields=("id", "email"))
PRESENT_CUSTOMER_EMAILS = replace(CUSTOMER_EMAILS, cached_fields=())
CATEGORIES = Query("categories", "id in ({})", _id)
CATEGORY_NAMES = replace(CATEGORIES, cached_fields=("id", "name", "ancestors"))
DESCENDANTS = Query("categories", "ancestors(id in ({}))", _ancestors)
PRODUCTS = Query("product-projections", "id in ({})", _id, resource_bytes=_PRODUCT_BYTES)
LINE_PRODUCTS = replace(PRODUCTS, cached_fields=("id", "categories", "attributes"))  # of line items
PRODUCTS_BY_SKU = replace(PRODUCTS, predicate="masterVariant(sku in ({0})) or variants(sku in ({0}))", keys_of=_skus)
PRODUCTS_BY_CATEGORY = replace(PRODUCTS, predicate="categories(id in ({}))", keys_of=_categories, max_resources=500)
INVENTORY = Query("inventory", "id in ({})", _id)
INVENTORY_BY_SKU = Query("inventory", "sku in ({})", _sku)
WORKFLOW_STATES = Query("states", "id in ({})", _id, cached_fields=("id", "key"))
STANDALONE_PRICES = Query("standalone-prices", "id in ({})", _id)
STANDALONE_PRICES_BY_SKU = Query("standalone-prices", "sku in ({})", _sku)
DISCOUNT_CODES = Query("discount-codes", "id in ({})", _id, cached_fields=("id", "code"))


class Reader(Protocol):
    """A reader of commercetools resources."""

    def find(self, query: Query, values: Collection[str]) -> QueryResult:
        """Return for each value its resources ([] if there are none), or the error that prevented reading them."""


class InMemoryReader:
    """A Reader over given resources, for `transform --commercetools` and the golden tests."""

    def __init__(self, resources: dict[str, list[Json]]) -> None:
        self._resources = resources

    def find(self, query: Query, values: Collection[str]) -> QueryResult:
        """Return the given resources that match the query."""
        return group_by_value(query, values, as_dicts(self._resources.get(query.path)))


def group_by_value(query: Query, values: Collection[str], resources: list[Json]) -> QueryResult:
    """Return for each value the resources that match it."""
    by_value: dict[str, list[Json]] = defaultdict(list)
    for resource in resources:
        for value in query.keys_of(resource):
            by_value[value].append(resource)
    return {value: by_value.get(value, []) for value in values}
