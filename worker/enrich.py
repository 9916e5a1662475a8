"""The enrich stage: adds commercetools data to notifications. No other stage reads commercetools.

Each resource type has a plan: a generator that is written for a single notification. It yields the lookups that it
needs next, and continues when their results have been fetched. All plans of a batch run in step, and the lookups of
each step are merged. A batch therefore needs about as many queries as a single message.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from worker.budget import check_lines, check_lookups
from worker.commercetools import queries
from worker.errors import Misconfigured, Rejected, Transient, WorkerError
from worker.json_access import MAX_ID_LENGTH, as_dict, as_dicts, as_int, as_text, parse_time, pick_ids, unique
from worker.model import Enriched, Json, Notification

if TYPE_CHECKING:
    from worker.mapping import MappingConfig

READ_LAG = 5.0  # seconds after a change in which commercetools can still return the previous state

Lookup = tuple[queries.Query, Iterable[str]]
Plan = Generator[Sequence[Lookup], None, Enriched]
Result = Enriched | WorkerError


def _utc_now() -> datetime:
    return datetime.now(UTC)


class Enricher:
    """Adds commercetools data to the notifications of a batch."""

    def __init__(
        self,
        reader: queries.Reader,
        mapping: MappingConfig,
        *,
        read_lag: float = READ_LAG,
        now: Callable[[], datetime] = _utc_now,
    ) -> None:
        self._reader = reader
        self._mapping = mapping
        self._read_lag = read_lag
        self._now = now

    def enrich(self, notifications: Sequence[Notification]) -> list[Result]:
        """Return, for each notification in order, the notification with its data or the error that prevented it."""
        context = _PlanContext(self._mapping, self._read_lag)
        now = self._now()
        plans = [PLANS[n.resource_type](Enriched(n, now), context) for n in notifications]
        results: list[Result | None] = [None] * len(plans)
        while pending := [index for index, result in enumerate(results) if result is None]:
            lookups: dict[queries.Query, set[str]] = defaultdict(set)
            for index in pending:
                results[index] = _advance(plans[index], lookups)
            self._fetch(lookups, context)
        return [result for result in results if result is not None]

    def _fetch(self, lookups: dict[queries.Query, set[str]], context: _PlanContext) -> None:
        for query, values in lookups.items():
            missing = context.missing(query, values)
            if missing:
                context.add(query, self._reader.find(query, missing))


def _advance(plan: Plan, lookups: dict[queries.Query, set[str]]) -> Result | None:
    """Advance a plan by one step. Return its result if it has ended; otherwise add its lookups and return None."""
    try:
        for query, values in next(plan):
            # A longer value is the id of nothing in commercetools.
            ids = {value for value in values if 0 < len(value) <= MAX_ID_LENGTH}
            check_lookups(len(ids))
            lookups[query] |= ids
    except StopIteration as end:
        enriched: Enriched = end.value
        return enriched
    except WorkerError as error:
        return error
    return None


class _PlanContext:
    """Data that the plans of a batch share: the results fetched so far, the mapping and the read lag."""

    def __init__(self, mapping: MappingConfig, read_lag: float) -> None:
        self.mapping = mapping
        self.read_lag = read_lag
        self._results: dict[queries.Query, queries.QueryResult] = defaultdict(dict)

    def missing(self, query: queries.Query, values: set[str]) -> set[str]:
        """Return the values that have not been fetched."""
        return values - self._results[query].keys()

    def add(self, query: queries.Query, result: queries.QueryResult) -> None:
        self._results[query] |= result

    def get_all(self, query: queries.Query, value: str) -> list[Json]:
        """Return the resources for a value. Raises the WorkerError that prevented fetching them."""
        result = self._results[query].get(value, [])
        if isinstance(result, WorkerError):
            raise result.with_traceback(None)  # messages share the error, so it would collect all their tracebacks
        return result

    def get(self, query: queries.Query, value: str) -> Json | None:
        """Return the first resource for a value, or None if there is none. Raises as get_all does."""
        return next(iter(self.get_all(query, value)), None)

    def get_optional(self, query: queries.Query, value: str) -> Json | None:
        """Return optional data. An id that commercetools rejects counts as missing, so the message does not fail."""
        try:
            return self.get(query, value)
        except Rejected:
            return None


def _order_plan(enriched: Enriched, context: _PlanContext) -> Plan:
    notification = enriched.notification
    order = notification.payload.get("order")
    if not isinstance(order, dict):
        yield [(queries.ORDERS, [notification.resource_id])]
        order = _main_resource(queries.ORDERS, enriched, context)
    return (yield from _order_data_plan(replace(enriched, order=order), context))


def _payment_plan(enriched: Enriched, context: _PlanContext) -> Plan:
    """Add the payment and its first order, or the payment's customer if it has no order."""
    notification = enriched.notification
    payment_id = notification.resource_id
    yield [(queries.PAYMENTS, [payment_id]), (queries.ORDERS_BY_PAYMENT, [payment_id])]
    payment = _main_resource(queries.PAYMENTS, enriched, context)
    orders = context.get_all(queries.ORDERS_BY_PAYMENT, payment_id)
    order = min(orders, key=lambda order: as_text(order.get("createdAt")), default=None)
    customer_id = "" if order else as_text(as_dict(as_dict(payment).get("customer")).get("id"))
    yield [(queries.CUSTOMERS, [customer_id])]
    customer = context.get_optional(queries.CUSTOMERS, customer_id)
    enriched = replace(enriched, payment=payment, order=order, customer=customer)
    return (yield from _order_data_plan(enriched, context))


def _order_data_plan(enriched: Enriched, context: _PlanContext) -> Plan:
    """Add the data of every order event: categories of the line items, discount codes, and the customer.

    Raises Rejected if the order has too many lines.
    """
    order = as_dict(enriched.order)
    check_lines(order)
    products = unique(as_text(line.get("productId")) for line in as_dicts(order.get("lineItems")))
    references = [as_dict(info.get("discountCode")) for info in as_dicts(order.get("discountCodes"))]
    codes = pick_ids(references)
    customer_id = "" if as_text(order.get("customerEmail")) else as_text(order.get("customerId"))
    yield [(queries.PRODUCT_CATEGORIES, products), (queries.DISCOUNT_CODES, codes), (queries.CUSTOMERS, [customer_id])]
    product_categories = {
        product: pick_ids(as_dict(context.get_optional(queries.PRODUCT_CATEGORIES, product)).get("categories"))
        for product in products
    }
    categories = yield from _categories(queries.CATEGORY_NAMES, product_categories.values(), context)
    return replace(
        enriched,
        product_categories=product_categories,
        categories=categories,
        discount_codes={code: _code_text(code, context) for code in codes},
        customer=enriched.customer or context.get_optional(queries.CUSTOMERS, customer_id),
    )


def _customer_plan(enriched: Enriched, context: _PlanContext) -> Plan:
    notification = enriched.notification
    yield [(queries.CUSTOMERS, [notification.resource_id])]
    return replace(enriched, customer=_main_resource(queries.CUSTOMERS, enriched, context))


def _category_plan(enriched: Enriched, context: _PlanContext) -> Plan:
    """Add the category and its ancestors. After an update, add its descendants: their breadcrumbs contain its name."""
    notification = enriched.notification
    max_descendants = context.mapping.category.max_descendants
    lookups: list[Lookup] = [(queries.CATEGORIES, [notification.resource_id])]
    if notification.type == "ResourceUpdated" and max_descendants:
        lookups.append((queries.DESCENDANTS, [notification.resource_id]))
    yield lookups
    category = _main_resource(queries.CATEGORIES, enriched, context)
    descendants = context.get_all(queries.DESCENDANTS, notification.resource_id)[:max_descendants]
    ancestors = [pick_ids(entry.get("ancestors")) for entry in (as_dict(category), *descendants)]
    categories = yield from _categories(queries.CATEGORIES, ancestors, context)
    return replace(enriched, category=category, descendants=descendants, categories=categories)


def _product_plan(enriched: Enriched, context: _PlanContext) -> Plan:
    notification = enriched.notification
    yield [(queries.PRODUCTS, [notification.resource_id])]
    product = _main_resource(queries.PRODUCTS, enriched, context)
    return (yield from _product_data_plan(replace(enriched, product=product), context))


def _inventory_entry_plan(enriched: Enriched, context: _PlanContext) -> Plan:
    notification = enriched.notification
    yield [(queries.INVENTORY, [notification.resource_id])]
    entry = _main_resource(queries.INVENTORY, enriched, context)
    sku = as_text(as_dict(entry).get("sku"))
    yield [(queries.PRODUCTS_BY_SKU, [sku])]
    product = context.get_optional(queries.PRODUCTS_BY_SKU, sku)
    enriched = replace(enriched, inventory_entry=entry, product=product)
    return (yield from _product_data_plan(enriched, context))


def _product_data_plan(enriched: Enriched, context: _PlanContext) -> Plan:
    """Add the data of a catalog item: its categories, and the stock of its variants."""
    if enriched.product is None:
        return enriched
    product = enriched.product
    variants = [as_dict(product.get("masterVariant")), *as_dicts(product.get("variants"))]
    skus = unique(as_text(variant.get("sku")) for variant in variants)
    yield [(queries.INVENTORY_BY_SKU, skus)]
    own = pick_ids(product.get("categories"))
    categories = yield from _categories(queries.CATEGORY_NAMES, [own], context)
    return replace(
        enriched,
        product_categories={as_text(product.get("id")): own},
        categories=categories,
        inventory={sku: context.get_all(queries.INVENTORY_BY_SKU, sku) for sku in skus},
    )


def _empty_plan(enriched: Enriched, _fetched: _PlanContext) -> Plan:
    """Return the notification unchanged, because its resource type needs no data."""
    yield []
    return enriched


PLANS: dict[str, Callable[[Enriched, _PlanContext], Plan]] = defaultdict(
    lambda: _empty_plan,
    {
        "order": _order_plan,
        "payment": _payment_plan,
        "customer": _customer_plan,
        "category": _category_plan,
        "product": _product_plan,
        "inventory-entry": _inventory_entry_plan,
    },
)


def _main_resource(query: queries.Query, enriched: Enriched, context: _PlanContext) -> Json | None:
    """Return the notification's resource, or None if commercetools does not have it.

    commercetools can send a notification before its API returns the change. Raises Transient if the change is younger
    than the read lag and the resource does not show it yet.
    """
    notification = enriched.notification
    resource = context.get(query, notification.resource_id)
    changed_at = parse_time(notification.time)
    age = (enriched.as_of - changed_at).total_seconds() if changed_at else context.read_lag
    if age < context.read_lag and _is_stale(resource, notification):
        wait = min(context.read_lag - age, context.read_lag)
        raise Transient(f"commercetools does not show the {notification.resource_type}'s change yet", wait)
    return resource


def _is_stale(resource: Json | None, notification: Notification) -> bool:
    """Return whether the resource does not show the notification's change."""
    if resource is None:
        return not notification.type.endswith(("Deleted", "Unpublished"))
    # A Message's own version is always 1; https://docs.commercetools.com/api/projects/messages
    version = "resourceVersion" if notification.payload.get("notificationType") == "Message" else "version"
    notified = as_int(notification.payload.get(version))
    current = as_int(resource.get("version"))
    return notified is not None and current is not None and current < notified


def _categories(
    query: queries.Query, groups: Iterable[Sequence[str]], context: _PlanContext
) -> Generator[Sequence[Lookup], None, dict[str, Json]]:
    """Look up categories and their ancestors. Return by id those that exist."""
    ids = unique(category for group in groups for category in group)
    yield [(query, ids)]
    found = {category: context.get_optional(query, category) for category in ids}
    ancestors = unique(ancestor for entry in found.values() for ancestor in pick_ids(as_dict(entry).get("ancestors")))
    yield [(query, ancestors)]
    found |= {category: context.get_optional(query, category) for category in ancestors}
    return {category: entry for category, entry in found.items() if entry is not None}


def _code_text(code_id: str, context: _PlanContext) -> str:
    """Return the text of a discount code, or "" if the API client has no scope for discount codes."""
    try:
        return as_text(as_dict(context.get_optional(queries.DISCOUNT_CODES, code_id)).get("code"))
    except Misconfigured:
        return ""
