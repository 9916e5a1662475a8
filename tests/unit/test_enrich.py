"""[Notification] -> [Enriched], and how little it asks for."""

from __future__ import annotations

from collections import Counter
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest

from worker.commercetools.cache import CachedReader
from worker.commercetools.client import MAX_WHERE_BYTES, _chunks, _where
from worker.commercetools.queries import (
    CATEGORIES,
    ORDERS,
    PRODUCTS,
    PRODUCTS_BY_SKU,
    InMemoryReader,
    Query,
    QueryResult,
)
from worker.enrich import Enricher
from worker.errors import CommercetoolsMisconfigured, Rejected, Transient
from worker.mapping import MappingConfig
from worker.model import Enriched, Notification

if TYPE_CHECKING:
    from collections.abc import Collection

NOW = datetime(2026, 11, 24, 12, tzinfo=UTC)


class CountingReader(InMemoryReader):
    """A snapshot that counts queries and can fail for a path or a value."""

    def __init__(self, resources: dict[str, list[dict[str, Any]]]) -> None:
        super().__init__(resources)
        self.queries: Counter[str] = Counter()
        self.asked: list[tuple[str, frozenset[str]]] = []
        self.errors: dict[str, Exception] = {}

    def find(self, query: Query, values: Collection[str]) -> QueryResult:
        self.queries[query.path] += 1
        self.asked.append((query.path, frozenset(values)))
        found = super().find(query, values)
        for value in values:
            error = self.errors.get(query.path) or self.errors.get(value)
            if error is not None:
                found[value] = error  # type: ignore[assignment]
        return found


def reference(*ids: str) -> list[dict[str, str]]:
    return [{"id": entry} for entry in ids]


SHOP: dict[str, list[dict[str, Any]]] = {
    "orders": [
        {
            "id": f"o{n}",
            "createdAt": f"2026-01-0{n}",
            "customerId": "c1",
            "lineItems": [{"productId": "p1"}, {"productId": "p2"}],
            "discountCodes": [{"discountCode": {"id": "d1"}}],
            "paymentInfo": {"payments": reference("pay1")},
        }
        for n in range(1, 6)
    ],
    "customers": [{"id": "c1", "email": "ada@example.com"}],
    "payments": [{"id": "pay1"}, {"id": "pay2", "customer": {"id": "c1"}}],
    "product-projections": [
        {"id": "p1", "categories": reference("jeans"), "masterVariant": {"sku": "s1"}, "variants": [{"sku": "s2"}]},
        {"id": "p2", "categories": reference("women")},
    ],
    "categories": [
        {"id": "women", "name": {"en": "Women"}},
        {"id": "jeans", "name": {"en": "Jeans"}, "ancestors": reference("women")},
    ],
    "inventory": [{"id": "i1", "sku": "s1", "availableQuantity": 3}],
    "discount-codes": [{"id": "d1", "code": "SUMMER10"}],
}


@pytest.fixture
def reader() -> CountingReader:
    return CountingReader(SHOP)


@pytest.fixture
def enricher(reader: CountingReader) -> Enricher:
    return Enricher(reader, MappingConfig(), now=lambda: NOW)


def about(resource_type: str, resource_id: str, kind: str = "ResourceUpdated", **payload: Any) -> Notification:
    return Notification(kind, resource_type, resource_id, None, payload)


def one(enricher: Enricher, notification: Notification) -> Enriched:
    (result,) = enricher.enrich([notification])
    assert isinstance(result, Enriched)
    return result


def test_an_order_comes_with_all_its_events_tell(enricher: Enricher) -> None:
    """Categories and their ancestors, discount codes, the customer behind an order without an email address."""
    enriched = one(enricher, about("order", "o1", "OrderStateChanged"))
    assert enriched.order == SHOP["orders"][0]
    assert enriched.product_categories == {"p1": ["jeans"], "p2": ["women"]}
    assert set(enriched.categories) == {"women", "jeans"}
    assert enriched.discount_codes == {"d1": "SUMMER10"}
    assert enriched.customer == SHOP["customers"][0]


def test_a_batch_costs_as_many_queries_as_one_message(enricher: Enricher, reader: CountingReader) -> None:
    """One query per resource type, however many messages wait."""
    results = enricher.enrich([about("order", f"o{n}", "OrderStateChanged") for n in range(1, 6)])
    assert [result.order["id"] for result in results if isinstance(result, Enriched) and result.order] == [
        f"o{n}" for n in range(1, 6)
    ]
    assert reader.queries == {
        "orders": 1,
        "customers": 1,
        "product-projections": 1,
        "discount-codes": 1,
        "categories": 1,
    }


def test_a_payload_that_is_there_is_not_fetched(enricher: Enricher, reader: CountingReader) -> None:
    """OrderCreated carries its order."""
    order = {"id": "new", "customerEmail": "ada@example.com"}
    enriched = one(enricher, about("order", "new", "OrderCreated", order=order))
    assert enriched.order == order
    assert reader.queries == {}


def test_a_payment_brings_the_order_it_paid(enricher: Enricher) -> None:
    """The first order of the payment, and its lines' categories."""
    enriched = one(enricher, about("payment", "pay1", "PaymentTransactionAdded"))
    assert enriched.payment == {"id": "pay1"}
    assert enriched.order is not None
    assert enriched.order["id"] == "o1"
    assert "jeans" in enriched.categories


def test_a_payment_without_an_order_brings_its_customer(enricher: Enricher) -> None:
    """A refund needs somebody to be recorded for."""
    enriched = one(enricher, about("payment", "pay2", "PaymentTransactionAdded"))
    assert enriched.order is None
    assert enriched.customer == SHOP["customers"][0]


def test_a_category_brings_ancestors_and_descendants(enricher: Enricher, reader: CountingReader) -> None:
    """Its name is part of theirs; a new category has none below it."""
    enriched = one(enricher, about("category", "women"))
    assert [entry["id"] for entry in enriched.descendants] == ["jeans"]
    reader.asked.clear()
    assert one(enricher, about("category", "jeans", "CategoryCreated")).descendants == []
    assert ("categories", frozenset({"women"})) in reader.asked


def test_a_product_brings_stock_and_categories(enricher: Enricher) -> None:
    """Everything an item and its variants need."""
    enriched = one(enricher, about("product", "p1", "ProductPublished"))
    assert enriched.product == SHOP["product-projections"][0]
    assert enriched.inventory == {"s1": SHOP["inventory"], "s2": []}
    assert set(enriched.categories) == {"women", "jeans"}


def test_an_inventory_entry_brings_its_product(enricher: Enricher) -> None:
    """Klaviyo may lack the variant, and then the product is written."""
    enriched = one(enricher, about("inventory-entry", "i1"))
    assert enriched.inventory_entry == SHOP["inventory"][0]
    assert enriched.product is not None
    assert enriched.product["id"] == "p1"


@pytest.mark.parametrize("kind", ["order", "payment", "customer", "category", "product", "inventory-entry"])
def test_what_commercetools_no_longer_has_is_none(kind: str, enricher: Enricher) -> None:
    """Deleted meanwhile is a normal thing."""
    enriched = one(enricher, about(kind, "gone"))
    fetched = (enriched.order, enriched.payment, enriched.customer, enriched.category, enriched.product)
    assert fetched == (None,) * 5


def test_a_resource_without_a_plan_needs_nothing(enricher: Enricher, reader: CountingReader) -> None:
    """A handler for a notification that says all by itself costs no query."""
    notification = about("review", "r1")
    assert one(enricher, notification).notification is notification
    assert reader.queries == {}


@pytest.mark.parametrize(
    ("kind", "resource"),
    [("CustomerCreated", "customer"), ("ProductPublished", "product"), ("OrderStateChanged", "order")],
)
def test_a_read_may_lag_behind_its_message(kind: str, resource: str, enricher: Enricher) -> None:
    """What is missing right after the message is not believed to be gone; later it is."""
    for age, expected in ((-3, Transient), (2, Transient), (60, Enriched)):
        created = (NOW - timedelta(seconds=age)).isoformat()
        (result,) = enricher.enrich([Notification(kind, resource, "new", created, {})])
        assert isinstance(result, expected)
        if isinstance(result, Transient):
            assert 0 < (result.retry_after or 0) <= 5


def test_what_is_deleted_is_believed_at_once(enricher: Enricher) -> None:
    """A deletion needs no waiting to be true."""
    just_now = NOW.isoformat()
    for kind in ("ProductDeleted", "ProductUnpublished", "ResourceDeleted"):
        (result,) = enricher.enrich([Notification(kind, "product", "gone", just_now, {})])
        assert isinstance(result, Enriched)


@pytest.mark.parametrize(
    "payload",
    [{"notificationType": "ResourceUpdated", "version": 5}, {"notificationType": "Message", "resourceVersion": 5}],
)
def test_a_read_older_than_its_message_is_not_believed_at_once(payload: dict[str, Any]) -> None:
    """The last change of a customer must not be lost to a replica that lags."""
    shop = {"customers": [{"id": "c", "version": 4, "email": "ada@example.com"}]}
    enricher = Enricher(InMemoryReader(shop), MappingConfig(), now=lambda: NOW)
    for age, expected in ((1, Transient), (60, Enriched)):
        moment = (NOW - timedelta(seconds=age)).isoformat()
        (result,) = enricher.enrich([Notification("ResourceUpdated", "customer", "c", moment, payload)])
        assert isinstance(result, expected)


def test_a_failing_query_fails_only_who_needs_it(enricher: Enricher, reader: CountingReader) -> None:
    """Neighbours that need other data go on."""
    reader.errors["orders"] = Transient("500")
    failed, fine = enricher.enrich([about("order", "o1", "OrderStateChanged"), about("customer", "c1")])
    assert isinstance(failed, Transient)
    assert isinstance(fine, Enriched)


@pytest.mark.parametrize("path", ["orders", "product-projections", "categories", "customers"])
def test_an_order_whose_data_cannot_be_had_now_waits(path: str, enricher: Enricher, reader: CountingReader) -> None:
    """No event is sent with half of its data because commercetools was down."""
    reader.errors[path] = Transient("500")
    (result,) = enricher.enrich([about("order", "o1", "OrderStateChanged")])
    assert isinstance(result, Transient)


def test_an_adornment_that_is_refused_does_not_hold_up_an_order(enricher: Enricher, reader: CountingReader) -> None:
    """An odd product id in a line costs that line its categories, and a missing scope the discount code."""
    reader.errors["p1"] = Rejected("malformed id", 400)
    reader.errors["discount-codes"] = CommercetoolsMisconfigured("403")
    enriched = one(enricher, about("order", "o1", "OrderStateChanged"))
    assert enriched.product_categories == {"p1": [], "p2": ["women"]}
    assert enriched.discount_codes == {"d1": ""}


def test_missing_scopes_for_what_is_needed_park(enricher: Enricher, reader: CountingReader) -> None:
    """An order that may not be read is a matter of configuration, not of the message."""
    reader.errors["orders"] = CommercetoolsMisconfigured("403")
    (result,) = enricher.enrich([about("order", "o1", "OrderStateChanged")])
    assert isinstance(result, CommercetoolsMisconfigured)


def test_catalog_data_is_remembered_for_orders_but_read_anew_for_its_own_messages(reader: CountingReader) -> None:
    """Orders reuse categories for a while; a product message always mirrors what is there now."""
    enricher = Enricher(CachedReader(reader, 60), MappingConfig(), now=lambda: NOW)
    one(enricher, about("order", "o1", "OrderStateChanged"))
    one(enricher, about("order", "o2", "OrderStateChanged"))
    assert reader.queries["product-projections"] == 1
    assert reader.queries["categories"] == 1
    one(enricher, about("product", "p1", "ProductPublished"))
    one(enricher, about("product", "p1", "ProductPublished"))
    assert reader.queries["product-projections"] == 3


def test_reading_a_category_anew_renews_what_orders_remember(reader: CountingReader) -> None:
    """A renamed category shows in the next order, not a cache's lifetime later."""
    enricher = Enricher(CachedReader(reader, 60), MappingConfig(), now=lambda: NOW)
    one(enricher, about("order", "o1", "OrderStateChanged"))
    renamed = [dict(entry) for entry in SHOP["categories"]]
    renamed[1]["name"] = {"en": "Denim"}
    reader._resources = SHOP | {"categories": renamed}
    one(enricher, about("category", "jeans"))
    enriched = one(enricher, about("order", "o2", "OrderStateChanged"))
    assert enriched.categories["jeans"]["name"] == {"en": "Denim"}


def test_queries_stay_below_the_longest_uri() -> None:
    """However many ids and however odd, each query fits, and none is left out."""
    values = [f'{n:036}"{{}}\\ü' for n in range(2_000)]
    for query in (ORDERS, PRODUCTS_BY_SKU):
        chunks = list(_chunks(values, query))
        assert [value for chunk in chunks for value in chunk] == values
        assert max(len(chunk) for chunk in chunks) > 10
        from urllib.parse import quote

        assert max(len(quote(_where(query, chunk))) for chunk in chunks) < MAX_WHERE_BYTES + 200


def test_values_are_quoted() -> None:
    """Ids come from outside: none may end its literal."""
    assert _where(CATEGORIES, ['a"b', "c\\d", "{0}"]) == 'id in ("a\\"b","c\\\\d","{0}")'
    assert PRODUCTS.predicate == CATEGORIES.predicate
