"""The plans of the resource types: which commercetools data a message needs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Generator, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from worker.budget import check_categories, check_lines
from worker.commercetools import queries
from worker.errors import EndpointRefused, Rejected, WorkerError
from worker.json_access import as_dict, as_dicts, as_id, as_text, pick_ids, unique
from worker.model import Enriched, Json
from worker.transform import fields, region
from worker.transform.identity import names_buyer
from worker.transform.order_totals import applied_codes
from worker.versions import version_of

if TYPE_CHECKING:
    from worker.mapping import MappingConfig
    from worker.model import Notification, ResourceKey

Lookup = tuple[queries.Query, Iterable[str]]
Plan = Generator[Sequence[Lookup], None, Enriched]


class PlanContext:
    """Data that the plans of a batch share: the results fetched so far, and the mapping."""

    def __init__(self, mapping: MappingConfig) -> None:
        self.mapping = mapping
        self._results: dict[queries.Query, queries.QueryResult] = defaultdict(dict)

    def missing(self, query: queries.Query, values: set[str]) -> set[str]:
        """Return the values that have not been fetched."""
        return values - self._results[query].keys()

    def add(self, query: queries.Query, result: queries.QueryResult) -> None:
        """Add fetched results."""
        self._results[query] |= result

    def get_all(self, query: queries.Query, value: str) -> list[Json]:
        """Return the resources for a value. Raises the WorkerError that prevented fetching them."""
        result = self._results[query].get(value, [])
        if isinstance(result, WorkerError):
            raise result.with_traceback(None)  # messages share the error, so it would collect all their tracebacks
        return result

    def get(self, query: queries.Query, value: str) -> Json | None:
        """Return the first resource for a value, or None if there is none. Raises as get_all does."""
        found = self.get_all(query, value)
        return found[0] if found else None

    def get_optional(self, query: queries.Query, value: str) -> Json | None:
        """Return optional data. An id that commercetools rejects counts as missing, so the message does not fail."""
        try:
            return self.get(query, value)
        except Rejected:
            return None


def order_plan(enriched: Enriched, context: PlanContext) -> Plan:
    """Add the order, and the data of its events.

    It is the order in the message, unless this names no buyer: an email address can have been set since then.
    """
    notification = enriched.notification
    included = notification.payload.get("order")
    order = included if isinstance(included, dict) else None
    if order is None or not names_buyer(order):
        yield [(queries.ORDERS, [notification.resource_id])]
        current = context.get(queries.ORDERS, notification.resource_id)
        enriched = replace(enriched, **version_fields(notification, current))
        order = current or order
    if notification.type == "OrderStateTransition":
        enriched = yield from _workflow_state_plan(replace(enriched, order=order), context)
        if as_text(as_dict(enriched.workflow_state).get("key")) not in _named_workflow_states(context.mapping):
            return enriched
    return (yield from order_data_plan(enriched, order, context))


def _workflow_state_plan(enriched: Enriched, context: PlanContext) -> Plan:
    """Add the workflow state that the message names, or that of the order if the message does not contain it."""
    reference = enriched.notification.payload.get("state") or as_dict(enriched.order).get("state")
    state_id = as_text(as_dict(reference).get("id"))
    yield [(queries.WORKFLOW_STATES, [state_id])]
    return replace(enriched, workflow_state=context.get_optional(queries.WORKFLOW_STATES, state_id))


def _named_workflow_states(mapping: MappingConfig) -> Sequence[str]:
    return (*mapping.order.fulfilled_workflow_states, *mapping.order.cancelled_workflow_states)


def order_data_plan(enriched: Enriched, resource: Json | None, context: PlanContext) -> Plan:
    """Add an order or cart and the data of its events: categories of the line items, discount codes, and the customer.

    An order that `stores` or `countries` excludes needs none. Raises Rejected if the order has too many lines, or one
    of its products too many categories.
    """
    order = as_dict(resource)
    if region.excludes(order, context.mapping):
        return replace(enriched, order=resource)
    check_lines(order)
    products = unique(as_text(line.get("productId")) for line in as_dicts(order.get("lineItems")))
    codes = applied_codes(order)
    customer_id = as_id(order.get("customerId"))
    lookups = [(queries.LINE_PRODUCTS, products), (queries.DISCOUNT_CODES, codes)]
    # With erasure, an order whose customer is gone is ignored. So a customer who was there a while ago does not count,
    # and one who is not shown yet must be waited for.
    has_erasure = context.mapping.customer.erasure
    customer_query = queries.PRESENT_CUSTOMER_EMAILS if has_erasure else queries.CUSTOMER_EMAILS
    yield [*lookups, (customer_query, [customer_id])]
    found = {product: context.get_optional(queries.LINE_PRODUCTS, product) for product in products}
    product_categories = {product: category_ids(projection) for product, projection in found.items()}
    brand = context.mapping.order.brand_attribute
    categories = yield from find_categories(queries.CATEGORY_NAMES, product_categories.values(), context)
    customer = enriched.customer or context.get_optional(customer_query, customer_id)
    is_awaited = has_erasure and customer_id and customer is None
    return replace(
        enriched,
        order=resource,
        product_categories=product_categories,
        product_brands={product: fields.attribute(as_dict(projection), brand) for product, projection in found.items()},
        categories=categories,
        discount_codes={code: _code_text(code, context) for code in codes},
        customer=customer,
        missing=enriched.missing or ("customer of the order" if is_awaited else ""),
    )


def customer_plan(enriched: Enriched, context: PlanContext) -> Plan:
    """Add the customer."""
    notification = enriched.notification
    yield [(queries.CUSTOMERS, [notification.resource_id])]
    customer = context.get(queries.CUSTOMERS, notification.resource_id)
    return replace(enriched, customer=customer, **version_fields(notification, customer))


def category_plan(enriched: Enriched, context: PlanContext) -> Plan:
    """Add the category and its ancestors. After an update, add its descendants: their breadcrumbs contain its name."""
    notification = enriched.notification
    max_descendants = context.mapping.category.max_descendants
    lookups: list[Lookup] = [(queries.CATEGORIES, [notification.resource_id])]
    if notification.type == "ResourceUpdated" and max_descendants:
        lookups.append((queries.DESCENDANTS, [notification.resource_id]))
    yield lookups
    category = context.get(queries.CATEGORIES, notification.resource_id)
    descendants = context.get_all(queries.DESCENDANTS, notification.resource_id)[:max_descendants]
    ancestors = [pick_ids(entry.get("ancestors")) for entry in (as_dict(category), *descendants)]
    categories = yield from find_categories(queries.CATEGORIES, ancestors, context)
    shown = version_fields(notification, category, category=[*descendants, *categories.values()])
    if any(ancestor not in categories for ids in ancestors for ancestor in ids):
        shown["missing"] = shown["missing"] or "ancestor of a category"
    return replace(enriched, category=category, descendants=descendants, categories=categories, **shown)


def empty_plan(enriched: Enriched, _fetched: PlanContext) -> Plan:
    """Return the notification unchanged, because its resource type needs no data."""
    yield []
    return enriched


def version_fields(notification: Notification, resource: Json | None, **others: Iterable[Json]) -> Json:
    """Return two fields of Enriched: `versions` of the notification's resource and of `others` by type, and `missing`.

    They are for `replace`, which is slow, so a plan should call it only once.
    """
    versions: dict[ResourceKey, int | None] = {
        (kind, as_text(other.get("id"))): version_of(other) for kind, found in others.items() for other in found
    }
    key = notification.resource_type, notification.resource_id
    versions[key] = None if resource is None else version_of(resource)
    return {"versions": versions, "missing": notification.resource_type if resource is None else ""}


def category_ids(product: Json | None) -> list[str]:
    """Return the ids of a product's categories. Raises Rejected if there are too many."""
    ids = pick_ids(as_dict(product).get("categories"))
    check_categories(len(ids))
    return ids


def find_categories(
    query: queries.Query, groups: Iterable[Sequence[str]], context: PlanContext, others: Sequence[Lookup] = ()
) -> Generator[Sequence[Lookup], None, dict[str, Json]]:
    """Look up categories, together with `others`, and then their ancestors. Return by id the categories that exist."""
    ids = unique(category for group in groups for category in group)
    yield [(query, ids), *others]
    found = {category: context.get_optional(query, category) for category in ids}
    ancestors = unique(ancestor for entry in found.values() for ancestor in pick_ids(as_dict(entry).get("ancestors")))
    yield [(query, ancestors)]
    found |= {category: context.get_optional(query, category) for category in ancestors}
    return {category: entry for category, entry in found.items() if entry is not None}


def _code_text(code_id: str, context: PlanContext) -> str:
    """Return the text of a discount code, or "" if the API client has no scope for discount codes."""
    try:
        return as_text(as_dict(context.get_optional(queries.DISCOUNT_CODES, code_id)).get("code"))
    except EndpointRefused:
        return ""
