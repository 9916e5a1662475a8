"""[Notification] -> [Enriched]. The only stage that reads commercetools; one query per resource type per batch.

Each resource type has a plan: a generator that reads as if for one message and yields what it must know
next. All plans of a batch run in step, and what they ask for in a step is fetched together, so a hundred
messages cost as many queries as one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from worker.commercetools import queries
from worker.errors import Misconfigured, Rejected, Transient, WorkerError
from worker.json_access import as_dict, as_dicts, as_int, as_text, parse_time, pick_ids, unique
from worker.model import Enriched, Json, Notification

if TYPE_CHECKING:
    from worker.mapping import MappingConfig

READ_LAG = 5.0  # seconds in which a change may not be readable yet

Ask = tuple[queries.Query, Iterable[str]]
Plan = Generator[Sequence[Ask], None, Enriched]
Result = Enriched | WorkerError


def _utc_now() -> datetime:
    return datetime.now(UTC)


class Enricher:
    """Adds commercetools data to notifications, a batch at a time."""

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
        """Return every notification with its data, or with why it cannot be had, in their order."""
        known = _Known(self._mapping, self._read_lag)
        now = self._now()
        plans = [PLANS[n.resource_type](Enriched(n, now), known) for n in notifications]
        results: list[Result | None] = [None] * len(plans)
        while pending := [index for index, result in enumerate(results) if result is None]:
            asks: dict[queries.Query, set[str]] = defaultdict(set)
            for index in pending:
                results[index] = _advance(plans[index], asks)
            self._answer(asks, known)
        return [result for result in results if result is not None]

    def _answer(self, asks: dict[queries.Query, set[str]], known: _Known) -> None:
        for query, values in asks.items():
            missing = known.missing(query, values)
            if missing:
                known.learn(query, self._reader.find(query, missing))


def _advance(plan: Plan, asks: dict[queries.Query, set[str]]) -> Result | None:
    """Run a plan to its next question, or to its end."""
    try:
        for query, values in next(plan):
            asks[query].update(value for value in values if value)
    except StopIteration as end:
        enriched: Enriched = end.value
        return enriched
    except WorkerError as error:
        return error
    return None


class _Known:
    """What a batch has read so far."""

    def __init__(self, mapping: MappingConfig, read_lag: float) -> None:
        self.mapping = mapping
        self.read_lag = read_lag
        self._found: dict[queries.Query, queries.QueryResult] = defaultdict(dict)

    def missing(self, query: queries.Query, values: set[str]) -> set[str]:
        return values - self._found[query].keys()

    def learn(self, query: queries.Query, found: queries.QueryResult) -> None:
        self._found[query] |= found

    def all(self, query: queries.Query, value: str) -> list[Json]:
        """Return the resources for a value. Raises why they cannot be had."""
        found = self._found[query].get(value, [])
        if isinstance(found, WorkerError):
            raise found
        return found

    def one(self, query: queries.Query, value: str) -> Json | None:
        """Return the resource for a value, or None. Raises why it cannot be had."""
        return next(iter(self.all(query, value)), None)

    def maybe(self, query: queries.Query, value: str) -> Json | None:
        """Return an adornment that no message shall fail for: a refused id is as good as a missing one."""
        try:
            return self.one(query, value)
        except Rejected:
            return None


def _order(enriched: Enriched, known: _Known) -> Plan:
    notification = enriched.notification
    order = notification.payload.get("order")
    if not isinstance(order, dict):
        yield [(queries.ORDERS, [notification.resource_id])]
        order = _existing(queries.ORDERS, enriched, known)
    return (yield from _with_order_data(replace(enriched, order=order), known))


def _payment(enriched: Enriched, known: _Known) -> Plan:
    notification = enriched.notification
    payment_id = notification.resource_id
    yield [(queries.PAYMENTS, [payment_id]), (queries.ORDERS_BY_PAYMENT, [payment_id])]
    payment = _existing(queries.PAYMENTS, enriched, known)
    orders = sorted(known.all(queries.ORDERS_BY_PAYMENT, payment_id), key=lambda order: as_text(order.get("createdAt")))
    order = orders[0] if orders else None
    customer_id = "" if order else as_text(as_dict(as_dict(payment).get("customer")).get("id"))
    yield [(queries.CUSTOMERS, [customer_id])]
    customer = known.maybe(queries.CUSTOMERS, customer_id)
    enriched = replace(enriched, payment=payment, order=order, customer=customer)
    return (yield from _with_order_data(enriched, known))


def _with_order_data(enriched: Enriched, known: _Known) -> Plan:
    """Add what every order event tells: categories of the lines, discount codes, the customer behind it."""
    order = as_dict(enriched.order)
    products = unique(as_text(line.get("productId")) for line in as_dicts(order.get("lineItems")))
    references = [as_dict(info.get("discountCode")) for info in as_dicts(order.get("discountCodes"))]
    codes = pick_ids(references)
    nameless = "" if as_text(order.get("customerEmail")) else as_text(order.get("customerId"))
    yield [(queries.PRODUCT_CATEGORIES, products), (queries.DISCOUNT_CODES, codes), (queries.CUSTOMERS, [nameless])]
    product_categories = {
        product: pick_ids(as_dict(known.maybe(queries.PRODUCT_CATEGORIES, product)).get("categories"))
        for product in products
    }
    categories = yield from _categories(queries.CATEGORY_NAMES, product_categories.values(), known)
    return replace(
        enriched,
        product_categories=product_categories,
        categories=categories,
        discount_codes={code: _code(code, known) for code in codes},
        customer=enriched.customer or known.maybe(queries.CUSTOMERS, nameless),
    )


def _customer(enriched: Enriched, known: _Known) -> Plan:
    notification = enriched.notification
    yield [(queries.CUSTOMERS, [notification.resource_id])]
    return replace(enriched, customer=_existing(queries.CUSTOMERS, enriched, known))


def _category(enriched: Enriched, known: _Known) -> Plan:
    notification = enriched.notification
    asks: list[Ask] = [(queries.CATEGORIES, [notification.resource_id])]
    if notification.type == "ResourceUpdated" and known.mapping.category.max_descendants:
        asks.append((queries.DESCENDANTS, [notification.resource_id]))
    yield asks
    category = _existing(queries.CATEGORIES, enriched, known)
    descendants = known.all(queries.DESCENDANTS, notification.resource_id)[: known.mapping.category.max_descendants]
    ancestors = [pick_ids(entry.get("ancestors")) for entry in (as_dict(category), *descendants)]
    categories = yield from _categories(queries.CATEGORIES, ancestors, known)
    return replace(enriched, category=category, descendants=descendants, categories=categories)


def _product(enriched: Enriched, known: _Known) -> Plan:
    notification = enriched.notification
    yield [(queries.PRODUCTS, [notification.resource_id])]
    product = _existing(queries.PRODUCTS, enriched, known)
    return (yield from _with_product_data(replace(enriched, product=product), known))


def _inventory_entry(enriched: Enriched, known: _Known) -> Plan:
    notification = enriched.notification
    yield [(queries.INVENTORY, [notification.resource_id])]
    entry = _existing(queries.INVENTORY, enriched, known)
    sku = as_text(as_dict(entry).get("sku"))
    yield [(queries.PRODUCTS_BY_SKU, [sku])]
    product = known.maybe(queries.PRODUCTS_BY_SKU, sku)
    enriched = replace(enriched, inventory_entry=entry, product=product)
    return (yield from _with_product_data(enriched, known))


def _with_product_data(enriched: Enriched, known: _Known) -> Plan:
    """Add what a catalog item tells: its categories, and the stock of its variants."""
    if enriched.product is None:
        return enriched
    product = enriched.product
    variants = [as_dict(product.get("masterVariant")), *as_dicts(product.get("variants"))]
    skus = unique(as_text(variant.get("sku")) for variant in variants)
    yield [(queries.INVENTORY_BY_SKU, skus)]
    own = pick_ids(product.get("categories"))
    categories = yield from _categories(queries.CATEGORY_NAMES, [own], known)
    return replace(
        enriched,
        product_categories={as_text(product.get("id")): own},
        categories=categories,
        inventory={sku: known.all(queries.INVENTORY_BY_SKU, sku) for sku in skus},
    )


def _nothing(enriched: Enriched, known: _Known) -> Plan:
    """Return a notification that says all by itself."""
    yield []
    del known
    return enriched


PLANS: dict[str, Callable[[Enriched, _Known], Plan]] = defaultdict(
    lambda: _nothing,
    {
        "order": _order,
        "payment": _payment,
        "customer": _customer,
        "category": _category,
        "product": _product,
        "inventory-entry": _inventory_entry,
    },
)


def _existing(query: queries.Query, enriched: Enriched, known: _Known) -> Json | None:
    """Return the notification's resource, or None when commercetools has none.

    A read may lag behind the message: what is missing or older than the message says is not believed at once.
    """
    notification = enriched.notification
    resource = known.one(query, notification.resource_id)
    moment = parse_time(notification.time)
    age = (enriched.as_of - moment).total_seconds() if moment else known.read_lag
    if age < known.read_lag and _lags(resource, notification):
        wait = min(known.read_lag - age, known.read_lag)
        raise Transient(f"commercetools does not show the {notification.resource_type}'s change yet", wait)
    return resource


def _lags(resource: Json | None, notification: Notification) -> bool:
    if resource is None:
        return not notification.type.endswith(("Deleted", "Unpublished"))
    # A Message's own version is always 1; https://docs.commercetools.com/api/projects/messages
    version = "resourceVersion" if notification.payload.get("notificationType") == "Message" else "version"
    wanted, shown = as_int(notification.payload.get(version)), as_int(resource.get("version"))
    return wanted is not None and shown is not None and shown < wanted


def _categories(
    query: queries.Query, groups: Iterable[Sequence[str]], known: _Known
) -> Generator[Sequence[Ask], None, dict[str, Json]]:
    """Return the categories by id, with all their ancestors."""
    ids = unique(category for group in groups for category in group)
    yield [(query, ids)]
    found = {category: known.maybe(query, category) for category in ids}
    ancestors = unique(ancestor for entry in found.values() for ancestor in pick_ids(as_dict(entry).get("ancestors")))
    yield [(query, ancestors)]
    found |= {category: known.maybe(query, category) for category in ancestors}
    return {category: entry for category, entry in found.items() if entry is not None}


def _code(code_id: str, known: _Known) -> str:
    """Return a discount code's text. A client without the scope for codes still sends the order."""
    try:
        return as_text(as_dict(known.maybe(queries.DISCOUNT_CODES, code_id)).get("code"))
    except Misconfigured:
        return ""
