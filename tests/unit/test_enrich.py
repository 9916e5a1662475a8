"""The enrich stage: its data, and its number of queries."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime
from threading import Barrier
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import pytest

from worker.commercetools.cache import CachedReader
from worker.commercetools.client import MAX_WHERE_BYTES, _chunks, _where
from worker.commercetools.queries import (
    CATEGORIES,
    ORDERS,
    ORDERS_BY_PAYMENT,
    PRODUCTS,
    PRODUCTS_BY_SKU,
    STANDALONE_PRICES_BY_SKU,
    InMemoryReader,
    Query,
    QueryResult,
)
from worker.enrich import Enricher
from worker.errors import CommercetoolsMisconfigured, EndpointRefused, Rejected, Transient
from worker.mapping import MappingConfig
from worker.model import Enriched, Notification

if TYPE_CHECKING:
    from collections.abc import Collection

NOW = datetime(2026, 11, 24, 12, tzinfo=UTC)
MAPPING = MappingConfig()


class CountingReader(InMemoryReader):
    """A Reader that counts queries and can fail for a path or a value."""

    def __init__(self, resources: dict[str, list[dict[str, Any]]]) -> None:
        super().__init__(resources)
        self.queries: Counter[str] = Counter()
        self.lookups: list[tuple[str, frozenset[str]]] = []
        self.errors: dict[str, Exception] = {}

    def find(self, query: Query, values: Collection[str]) -> QueryResult:
        self.queries[query.path] += 1
        self.lookups.append((query.path, frozenset(values)))
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
            "discountCodes": [{"discountCode": {"id": "d1"}, "state": "MatchesCart"}],
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


def test_order_gets_the_data_of_its_events(enricher: Enricher) -> None:
    """Categories with ancestors, discount codes, and the customer of an order without an email address."""
    enriched = one(enricher, about("order", "o1", "OrderStateChanged"))
    assert enriched.order == SHOP["orders"][0]
    assert enriched.product_categories == {"p1": ["jeans"], "p2": ["women"]}
    assert set(enriched.categories) == {"women", "jeans"}
    assert enriched.discount_codes == {"d1": "SUMMER10"}
    assert enriched.customer == SHOP["customers"][0]


def test_batch_needs_as_many_queries_as_one_message(enricher: Enricher, reader: CountingReader) -> None:
    """There is one query per resource type for any number of messages."""
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


def test_order_in_the_payload_is_not_fetched(enricher: Enricher, reader: CountingReader) -> None:
    """OrderCreated contains its order."""
    order = {"id": "new", "customerEmail": "ada@example.com"}
    enriched = one(enricher, about("order", "new", "OrderCreated", order=order))
    assert enriched.order == order
    assert reader.queries == {}


def test_order_without_a_buyer_is_read_again(enricher: Enricher, reader: CountingReader) -> None:
    """An email address can have been set since the message was written."""
    enriched = one(enricher, about("order", "o1", "OrderCreated", order={"id": "o1", "anonymousId": "a"}))
    assert enriched.order == SHOP["orders"][0]
    unknown = {"id": "unknown"}
    enriched = one(enricher, about("order", "unknown", "OrderCreated", order=unknown))
    assert (enriched.order, enriched.missing) == (unknown, "order")
    assert reader.queries["orders"] == 2


def test_with_erasure_the_customer_of_an_order_is_awaited(reader: CountingReader) -> None:
    """A customer who is not shown yet must not be taken for an erased one."""
    order = {"id": "new", "customerId": "c9", "customerEmail": "new@example.com"}
    notification = about("order", "new", "OrderCreated", order=order)
    erasure = MappingConfig.model_validate({"customer": {"erasure": True}})
    assert one(Enricher(reader, erasure), notification).missing == "customer of the order"
    assert one(Enricher(reader, MappingConfig()), notification).missing == ""


def test_with_erasure_the_customer_of_an_order_is_read_each_time(reader: CountingReader) -> None:
    """A customer who was erased since the last order must not come back. A batch has one reading nevertheless."""
    erasure = MappingConfig.model_validate({"customer": {"erasure": True}})
    enricher = Enricher(CachedReader(reader, 60), erasure, now=lambda: NOW)
    orders = [about("order", name, "OrderStateChanged") for name in ("o1", "o2")]
    assert all(isinstance(result, Enriched) and result.customer for result in enricher.enrich(orders))
    assert reader.queries["customers"] == 1
    reader._resources = SHOP | {"customers": []}
    assert one(enricher, orders[0]).customer is None


def test_email_addresses_of_customers_are_cached_until_they_are_known_to_change(reader: CountingReader) -> None:
    """Orders of one customer share a reading. A message about the customer updates it."""
    enricher = Enricher(CachedReader(reader, 60), MappingConfig(), now=lambda: NOW)
    one(enricher, about("order", "o1", "OrderStateChanged"))
    one(enricher, about("order", "o2", "OrderStateChanged"))
    assert reader.queries["customers"] == 1
    reader._resources = SHOP | {"customers": [{"id": "c1", "email": "ada.new@example.com"}]}
    one(enricher, about("customer", "c1"))
    enriched = one(enricher, about("order", "o3", "OrderStateChanged"))
    assert enriched.customer == {"id": "c1", "email": "ada.new@example.com"}


def test_payment_gets_its_order(enricher: Enricher) -> None:
    """It gets its first order and the categories of the line items."""
    enriched = one(enricher, about("payment", "pay1", "PaymentTransactionAdded"))
    assert enriched.payment == {"id": "pay1"}
    assert enriched.order is not None
    assert enriched.order["id"] == "o1"
    assert "jeans" in enriched.categories


def paying(number: int, *payments: str) -> dict[str, Any]:
    order = {"id": f"o{number}", "createdAt": f"2026-01-0{number}", "customerEmail": "ada@example.com"}
    return order | {"paymentInfo": {"payments": reference(*payments)}}


def test_payments_of_the_order_are_in_its_order() -> None:
    """The first refund among them has the order's id. One that commercetools does not show yet is waited for."""
    payments = [{"id": "p2"}, {"id": "p1"}]
    message = about("payment", "p2", "PaymentTransactionAdded")
    enriched = one(
        Enricher(InMemoryReader({"orders": [paying(1, "p1", "p2")], "payments": payments}), MAPPING), message
    )
    assert ([each["id"] for each in enriched.payments], enriched.missing) == (["p1", "p2"], "")
    enriched = one(
        Enricher(InMemoryReader({"orders": [paying(1, "p3", "p2")], "payments": payments}), MAPPING), message
    )
    assert ([each["id"] for each in enriched.payments], enriched.missing) == (["p2"], "payment of the order")


@pytest.mark.parametrize(
    ("payload", "added"),
    [
        ({"paymentRef": {"id": "p1"}}, []),
        ({"paymentRef": {"id": "p2"}}, ["p2"]),
        ({"paymentRef": {"id": "p4"}}, ["p4"]),
        ({"payment": {"id": "p4"}}, ["p4"]),  # its former name
        ({}, ["p2", "p4"]),
        ({"paymentRef": {"id": "p3"}}, []),
    ],
)
def test_payment_that_an_order_gets_belongs_to_its_first_order(payload: dict[str, Any], added: list[str]) -> None:
    """So its refunds are events of one order."""
    payments = [{"id": "p1"}, {"id": "p2"}, {"id": "p4"}]
    shop = {"orders": [paying(1, "p1"), paying(2, "p1", "p2", "p4")], "payments": payments}
    enriched = one(Enricher(InMemoryReader(shop), MAPPING), about("order", "o2", "OrderPaymentAdded", **payload))
    assert [each["id"] for each in enriched.added_payments] == added


def test_payment_that_no_query_finds_yet_belongs_to_the_order_that_got_it() -> None:
    """A query for the orders of a payment can lag behind a query by id."""

    class Lagging(InMemoryReader):
        def find(self, query: Query, values: Collection[str]) -> QueryResult:
            return {} if query == ORDERS_BY_PAYMENT else super().find(query, values)

    message = about("order", "o1", "OrderPaymentAdded", paymentRef={"id": "p1"})
    enriched = one(Enricher(Lagging({"orders": [paying(1, "p1")], "payments": [{"id": "p1"}]}), MAPPING), message)
    assert enriched.added_payments == [{"id": "p1"}]


def test_payment_without_an_order_gets_its_customer(enricher: Enricher) -> None:
    """The event of a refund needs a profile."""
    enriched = one(enricher, about("payment", "pay2", "PaymentTransactionAdded"))
    assert enriched.order is None
    assert enriched.customer == SHOP["customers"][0]


def test_category_gets_ancestors_and_descendants(enricher: Enricher, reader: CountingReader) -> None:
    """Its name is part of its descendants' names. A new category has no descendants."""
    enriched = one(enricher, about("category", "women"))
    assert [entry["id"] for entry in enriched.descendants] == ["jeans"]
    reader.lookups.clear()
    assert one(enricher, about("category", "jeans", "CategoryCreated")).descendants == []
    assert ("categories", frozenset({"women"})) in reader.lookups


def test_product_gets_stock_and_categories(enricher: Enricher) -> None:
    """A catalog item and its variants need this data."""
    enriched = one(enricher, about("product", "p1", "ProductPublished"))
    assert enriched.product == SHOP["product-projections"][0]
    assert enriched.inventory == {"s1": SHOP["inventory"], "s2": []}
    assert set(enriched.categories) == {"women", "jeans"}


def test_second_reading_of_a_product_needs_one_query_for_its_categories() -> None:
    """The first one has found the ancestors."""
    reader = CountingReader(SHOP)
    enricher = Enricher(reader, MappingConfig(), now=lambda: NOW)
    first = one(enricher, about("product", "p1", "ProductPublished"))
    assert reader.queries == {"product-projections": 1, "categories": 2, "inventory": 1}
    reader.queries.clear()
    second = one(enricher, replace(about("product", "p1", "ProductPublished"), seen=[*first.versions]))
    assert reader.queries == {"product-projections": 1, "categories": 1, "inventory": 1}
    assert second.versions == first.versions


class MeetingReader(InMemoryReader):
    """A reader that answers for categories and inventory only if it is asked for both at the same time."""

    barrier = Barrier(2, timeout=60.0)

    def find(self, query: Query, values: Collection[str]) -> QueryResult:
        if query.path in {"categories", "inventory"} and "women" not in values:
            self.barrier.wait()
        return super().find(query, values)


def test_queries_of_a_step_are_concurrent() -> None:
    """A product waits for the slowest query of each step, and not for the sum of them."""
    with ThreadPoolExecutor(2) as executor:
        enricher = Enricher(MeetingReader(SHOP), MappingConfig(), executor, now=lambda: NOW)
        assert set(one(enricher, about("product", "p1", "ProductPublished")).categories) == {"women", "jeans"}


def test_inventory_entry_gets_all_entries_of_its_sku() -> None:
    """The stock is a sum. Its product is read only if Klaviyo does not have the variant."""
    reader = CountingReader(SHOP)
    enricher = Enricher(reader, MappingConfig(), now=lambda: NOW)
    enriched = one(enricher, about("inventory-entry", "i1"))
    assert (enriched.sku, enriched.inventory, enriched.related) == ("s1", {"s1": SHOP["inventory"]}, ())
    assert set(reader.queries) == {"inventory"}
    enriched = one(enricher, replace(about("inventory-entry", "i1"), seen=[("sku", "s1"), ("sku", "unknown")]))
    (related,) = enriched.related
    assert (related.product_id, related.product) == ("p1", SHOP["product-projections"][0])
    assert related.inventory == {"s1": SHOP["inventory"], "s2": []}
    assert enriched.versions.keys() >= {("product", "p1"), ("category", "jeans")}


def test_deleted_inventory_entry_names_its_sku(enricher: Enricher) -> None:
    """The other entries of the sku count, although the entry cannot be read."""
    for payload in ({"sku": "s1"}, {"resourceUserProvidedIdentifiers": {"sku": "s1"}}):
        enriched = one(enricher, about("inventory-entry", "gone", "InventoryEntryDeleted", **payload))
        assert (enriched.sku, enriched.missing) == ("s1", "inventory-entry")
        assert enriched.inventory["s1"] == SHOP["inventory"]


def standalone_shop(**more: Any) -> dict[str, list[dict[str, Any]]]:
    return {
        "product-projections": [{"id": "p", "version": 5, "priceMode": "Standalone", "masterVariant": {"sku": " s "}}],
        "standalone-prices": [{"id": "sp1", "version": 2, "sku": " s "}, {"id": "sp2", "version": 3, "sku": "s"}],
        **more,
    }


def test_standalone_prices_are_those_of_the_skus() -> None:
    """A sku is taken as it is. A product with embedded prices needs no query, nor the scope for standalone prices."""
    enricher = Enricher(InMemoryReader(standalone_shop()), MappingConfig(), now=lambda: NOW)
    enriched = one(enricher, about("product", "p", "ProductPublished"))
    assert [price["id"] for price in enriched.standalone_prices[" s "]] == ["sp1"]
    assert enriched.versions == {("product", "p"): 5, ("standalone-price", "sp1"): 2}
    reader = CountingReader(SHOP)
    one(Enricher(reader, MappingConfig(), now=lambda: NOW), about("product", "p1", "ProductPublished"))
    assert "standalone-prices" not in reader.queries


def test_version_of_a_price_is_that_of_the_written_one() -> None:
    """A query by sku can show an older price than one by id. That reading must count as stale."""

    class LaggingReader(InMemoryReader):
        def find(self, query: Query, values: Collection[str]) -> QueryResult:
            found = super().find(query, values)
            return {" s ": list(lagging)} if query is STANDALONE_PRICES_BY_SKU else found

    lagging = [{"id": "sp1", "version": 1, "sku": " s "}]
    enricher = Enricher(LaggingReader(standalone_shop()), MappingConfig(), now=lambda: NOW)
    notification = about("standalone-price", "sp1", "StandalonePriceValueChanged")
    assert one(enricher, notification).versions["standalone-price", "sp1"] == 1
    lagging.clear()
    enriched = one(enricher, notification)
    assert (enriched.versions["standalone-price", "sp1"], enriched.missing) == (None, "standalone-price")


def test_standalone_price_gets_its_product() -> None:
    """A deleted price names its sku. A price without a published product has none."""
    enricher = Enricher(InMemoryReader(standalone_shop()), MappingConfig(), now=lambda: NOW)
    enriched = one(enricher, about("standalone-price", "sp1", "StandalonePriceValueChanged"))
    assert (enriched.sku, enriched.product_id) == (" s ", "p")
    assert enriched.versions == {("standalone-price", "sp1"): 2, ("product", "p"): 5}
    enriched = one(enricher, about("standalone-price", "gone", "StandalonePriceDeleted", sku=" s "))
    assert (enriched.product_id, enriched.missing) == ("p", "standalone-price")
    enriched = one(enricher, about("standalone-price", "sp2", "StandalonePriceValueChanged"))
    assert (enriched.product, enriched.product_id, enriched.missing) == (None, "", "")


def test_product_that_an_earlier_reading_found_is_still_known() -> None:
    """The message has possibly written the product after it was deleted, so it must be deleted again."""
    shop = standalone_shop()
    (product,) = shop.pop("product-projections")
    notification = replace(about("standalone-price", "sp1"), seen=[("product", "p")])
    enricher = Enricher(InMemoryReader(shop), MappingConfig(), now=lambda: NOW)
    enriched = one(enricher, notification)
    assert (enriched.product, enriched.product_id, enriched.missing) == (None, "p", "product")
    assert enriched.versions["product", "p"] is None
    shop["product-projections"] = [product | {"masterVariant": {"sku": "other"}}]
    enriched = one(enricher, notification)
    assert (enriched.product_id, enriched.missing) == ("p", "")


@pytest.mark.parametrize("resource", ["inventory-entry", "category", "product"])
def test_related_resources_that_an_earlier_reading_found_are_read_again(resource: str) -> None:
    """They are written, too, or deleted if they are gone: another worker has possibly deleted them before."""
    shop: dict[str, list[dict[str, Any]]] = {resource: [{"id": "r", "sku": "s"}], "categories": [{"id": "c"}]}
    shop["product-projections"] = [{"id": "p", "version": 2, "masterVariant": {"sku": "s"}}]
    notification = replace(about(resource, "r"), seen=[("product", "p"), ("category", "c"), (resource, "r")])
    enricher = Enricher(InMemoryReader(shop), MappingConfig(), now=lambda: NOW)
    enriched = one(enricher, notification)
    assert [(each.product_id, each.product) for each in enriched.related] == [("p", shop["product-projections"][0])]
    assert enriched.versions["product", "p"] == 2
    assert ("category", "c") not in enriched.versions
    shop["product-projections"], shop["categories"] = [], []
    enriched = one(enricher, notification)
    assert [(each.product_id, each.product) for each in enriched.related] == [("p", None)]
    assert (enriched.versions["product", "p"], enriched.versions["category", "c"]) == (None, None)
    assert enriched.missing


def test_category_that_has_moved_gets_its_products() -> None:
    """They are those in it and below it, up to the maximum."""
    shop: dict[str, list[dict[str, Any]]] = {
        "categories": [{"id": "top"}, {"id": "below", "ancestors": reference("top")}, {"id": "other"}],
        "product-projections": [
            {"id": "p1", "masterVariant": {}, "categories": reference("top")},
            {"id": "p2", "masterVariant": {}, "categories": reference("below", "other")},
            {"id": "p3", "masterVariant": {}, "categories": reference("other")},
        ],
    }
    notification = replace(about("category", "top"), seen=[("category-products", "top")])
    for limit, expected in ((500, ["p1", "p2"]), (1, ["p1"])):
        mapping = MappingConfig.model_validate({"category": {"max_products": limit}})
        enriched = one(Enricher(InMemoryReader(shop), mapping, now=lambda: NOW), notification)
        assert [each.product_id for each in enriched.related] == expected


def test_category_of_a_product_that_is_not_shown_yet_is_named() -> None:
    """A new category and its first product can be created at the same time."""
    product: dict[str, Any] = {"id": "p", "masterVariant": {}, "categories": reference("new")}
    shop = {"product-projections": [product]}
    enricher = Enricher(InMemoryReader(shop), MappingConfig(), now=lambda: NOW)
    assert one(enricher, about("product", "p")).missing == "category of the product"


def test_unpublished_projection_is_not_in_the_catalog() -> None:
    """The message ProductCreated contains the staged projection."""
    shop = {"product-projections": [{"id": "p", "published": False, "masterVariant": {"sku": "s"}}]}
    enricher = Enricher(InMemoryReader(shop), MappingConfig(), now=lambda: NOW)
    enriched = one(enricher, about("product", "p", "ProductUnpublished"))
    assert (enriched.product, enriched.product_id, enriched.missing) == (None, "p", "product")


@pytest.mark.parametrize("kind", ["order", "payment", "customer", "category", "product", "inventory-entry"])
def test_missing_resource_is_none(kind: str, enricher: Enricher) -> None:
    """A resource can be deleted before its message is processed."""
    enriched = one(enricher, about(kind, "gone"))
    fetched = (enriched.order, enriched.payment, enriched.customer, enriched.category, enriched.product)
    assert fetched == (None,) * 5


def test_resource_type_without_a_plan_needs_no_query(enricher: Enricher, reader: CountingReader) -> None:
    """The notification is returned unchanged."""
    notification = about("review", "r1")
    assert one(enricher, notification).notification is notification
    assert reader.queries == {}


@pytest.mark.parametrize("kind", ["order", "payment", "customer", "category", "product", "inventory-entry"])
def test_missing_resource_is_named(kind: str, enricher: Enricher) -> None:
    """The pipeline decides whether it possibly appears later."""
    for change in ("ResourceCreated", "ResourceUpdated", "ResourceDeleted", "ProductUnpublished"):
        enriched = one(enricher, about(kind, "new", change))
        assert (enriched.missing, enriched.versions) == (kind, {(kind, "new"): None})


def test_missing_order_of_a_payment_is_named(enricher: Enricher) -> None:
    """A payment is possibly created before its order, even if it names the customer."""
    assert one(enricher, about("payment", "pay2")).missing == "order of the payment"
    assert one(enricher, about("payment", "pay1")).missing == ""


def test_missing_ancestor_of_a_category_is_named() -> None:
    """A category can be shown before its parent. Its breadcrumb would lack the parent permanently."""
    shop: dict[str, list[dict[str, Any]]] = {"categories": [{"id": "bottom", "ancestors": reference("top")}]}
    enricher = Enricher(InMemoryReader(shop), MappingConfig(), now=lambda: NOW)
    assert one(enricher, about("category", "bottom", "ResourceCreated")).missing == "ancestor of a category"
    shop["categories"].append({"id": "top", "ancestors": []})
    assert one(enricher, about("category", "bottom", "ResourceCreated")).missing == ""


def test_versions_are_those_of_all_resources_that_determine_the_written_state() -> None:
    """A breadcrumb contains the names of ancestors, and a variant contains its stock."""
    shop: dict[str, list[dict[str, Any]]] = {
        "customers": [{"id": "c", "version": 4}],
        "categories": [
            {"id": "top", "version": 2},
            {"id": "middle", "version": 3, "ancestors": reference("top")},
            {"id": "bottom", "version": 4, "ancestors": reference("top", "middle")},
        ],
        "product-projections": [
            {"id": "p", "version": 5, "masterVariant": {"sku": "s"}, "categories": reference("top")}
        ],
        "inventory": [{"id": "i", "version": 6, "sku": "s"}, {"id": "j", "sku": "s"}],
    }
    enricher = Enricher(InMemoryReader(shop), MappingConfig(), now=lambda: NOW)
    assert one(enricher, about("customer", "c")).versions == {("customer", "c"): 4}
    categories = {("category", "top"): 2, ("category", "middle"): 3, ("category", "bottom"): 4}
    assert one(enricher, about("category", "middle")).versions == categories
    entries = {("inventory-entry", "i"): 6, ("inventory-entry", "j"): 0}
    expected = {("product", "p"): 5, ("category", "top"): 2} | entries
    assert one(enricher, about("product", "p")).versions == expected
    assert one(enricher, about("inventory-entry", "i")).versions == entries


def test_failed_query_fails_only_messages_that_need_it(enricher: Enricher, reader: CountingReader) -> None:
    """Messages that need other data continue."""
    reader.errors["orders"] = Transient("500")
    failed, fine = enricher.enrich([about("order", "o1", "OrderStateChanged"), about("customer", "c1")])
    assert isinstance(failed, Transient)
    assert isinstance(fine, Enriched)


@pytest.mark.parametrize("path", ["orders", "product-projections", "categories", "customers"])
def test_order_with_unavailable_data_is_transient(path: str, enricher: Enricher, reader: CountingReader) -> None:
    """An outage of commercetools must not cause an event with incomplete data."""
    reader.errors[path] = Transient("500")
    (result,) = enricher.enrich([about("order", "o1", "OrderStateChanged")])
    assert isinstance(result, Transient)


def test_rejected_optional_data_is_omitted(enricher: Enricher, reader: CountingReader) -> None:
    """With an invalid product id the line item has no categories. With a missing scope there is no discount code."""
    reader.errors["p1"] = Rejected("malformed id", 400)
    reader.errors["discount-codes"] = EndpointRefused("403")
    enriched = one(enricher, about("order", "o1", "OrderStateChanged"))
    assert enriched.product_categories == {"p1": [], "p2": ["women"]}
    assert enriched.discount_codes == {"d1": ""}


def test_missing_scope_for_required_data_is_misconfigured(enricher: Enricher, reader: CountingReader) -> None:
    """The worker parks, because the message is not at fault."""
    reader.errors["orders"] = CommercetoolsMisconfigured("403")
    (result,) = enricher.enrich([about("order", "o1", "OrderStateChanged")])
    assert isinstance(result, CommercetoolsMisconfigured)


def test_catalog_data_is_cached_for_orders_only(reader: CountingReader) -> None:
    """Orders use cached categories. A product message always reads the current product."""
    enricher = Enricher(CachedReader(reader, 60), MappingConfig(), now=lambda: NOW)
    one(enricher, about("order", "o1", "OrderStateChanged"))
    one(enricher, about("order", "o2", "OrderStateChanged"))
    assert reader.queries["product-projections"] == 1
    assert reader.queries["categories"] == 1
    one(enricher, about("product", "p1", "ProductPublished"))
    one(enricher, about("product", "p1", "ProductPublished"))
    assert reader.queries["product-projections"] == 3


def test_reading_a_category_updates_the_cache(reader: CountingReader) -> None:
    """The next order shows a renamed category before the cache expires."""
    enricher = Enricher(CachedReader(reader, 60), MappingConfig(), now=lambda: NOW)
    one(enricher, about("order", "o1", "OrderStateChanged"))
    renamed = [dict(entry) for entry in SHOP["categories"]]
    renamed[1]["name"] = {"en": "Denim"}
    reader._resources = SHOP | {"categories": renamed}
    one(enricher, about("category", "jeans"))
    enriched = one(enricher, about("order", "o2", "OrderStateChanged"))
    assert enriched.categories["jeans"]["name"] == {"en": "Denim"}


def test_queries_stay_below_the_longest_uri() -> None:
    """For any ids, each query fits, and no value is lost."""
    values = [f'{n:036}"{{}}\\ü' for n in range(2_000)]
    for query in (ORDERS, PRODUCTS_BY_SKU):
        chunks = list(_chunks(values, query))
        assert [value for chunk in chunks for value in chunk] == values
        assert max(len(chunk) for chunk in chunks) > 10
        assert max(len(quote(_where(query, chunk))) for chunk in chunks) < MAX_WHERE_BYTES + 200


def test_values_are_quoted() -> None:
    """Ids are untrusted, so they must not end their literal."""
    assert _where(CATEGORIES, ['a"b', "c\\d", "{0}"]) == 'id in ("a\\"b","c\\\\d","{0}")'
    assert PRODUCTS.predicate == CATEGORIES.predicate
