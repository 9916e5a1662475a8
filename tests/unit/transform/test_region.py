"""The settings `stores` and `countries`."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from worker.commercetools.queries import InMemoryReader
from worker.enrich import Enricher
from worker.errors import Excluded, Ignored, SettingsError
from worker.mapping import MappingConfig, load_mapping
from worker.model import Enriched, Notification
from worker.transform import handler_for, transform
from worker.transform.region import check_order, country_of

NOW = datetime(2026, 11, 24, tzinfo=UTC)
GERMAN = MappingConfig(stores=["de"])
BRITISH = MappingConfig(countries=["GB", "IE"])
ORDER = {"id": "o", "customerEmail": "ada@example.com", "totalPrice": {"currencyCode": "EUR", "centAmount": 100}}


def about(resource_type: str, kind: str, **payload: Any) -> Notification:
    return Notification(kind, resource_type, "id-1", "2026-11-23T10:00:00Z", payload)


def store(key: str) -> dict[str, str]:
    return {"typeId": "store", "key": key}


@pytest.mark.parametrize("of", [{"store": store("fr")}, {}, {"store": None}, {"store": store("DE")}])
def test_orders_of_other_stores_and_of_none_are_excluded(of: dict[str, Any]) -> None:
    """With `stores`, an order must be of one of them."""
    with pytest.raises(Excluded) as reason:
        check_order(ORDER | of, GERMAN)
    assert reason.value.by == "stores"
    check_order(ORDER | {"store": store("de")}, GERMAN)


@pytest.mark.parametrize(
    ("of", "country"),
    [
        ({"shippingAddress": {"country": "US"}, "billingAddress": {"country": "GB"}, "country": "GB"}, "US"),
        ({"billingAddress": {"country": "US"}, "country": "GB"}, "US"),
        ({"country": "US"}, "US"),
        ({"shipping": [{}, {"shippingAddress": {"country": "US"}}], "country": "GB"}, "US"),
        ({"shippingAddress": {"country": "IE"}, "country": "US"}, "IE"),
        ({"shippingAddress": "GB", "billingAddress": {"country": 1}}, ""),
    ],
)
def test_country_of_an_order(of: dict[str, Any], country: str) -> None:
    """It is that of the shipping address, else of the billing address, else the order's own."""
    assert country_of(ORDER | of) == country
    if country == "US":
        with pytest.raises(Excluded, match="countries"):
            check_order(ORDER | of, BRITISH)
    else:  # an order without a country is of no other country
        check_order(ORDER | of, BRITISH)


@pytest.mark.parametrize(
    ("mapping", "customer", "is_excluded"),
    [
        (GERMAN, {"stores": [store("at"), store("de")]}, False),
        (GERMAN, {"stores": [store("at")]}, True),
        (GERMAN, {"stores": []}, True),
        (BRITISH, {"addresses": [{"id": "a", "country": "GB"}]}, False),
        (BRITISH, {"addresses": [{"id": "a", "country": "US"}]}, True),
        (
            BRITISH,
            {
                "addresses": [{"id": "a", "country": "GB"}, {"id": "b", "country": "US"}],
                "defaultShippingAddressId": "b",
                "defaultBillingAddressId": "a",
            },
            True,
        ),
        (
            BRITISH,
            {"addresses": [{"id": "a", "country": "US"}, {"id": "b", "country": "IE"}], "billingAddressIds": ["b"]},
            False,
        ),
        (BRITISH, {"addresses": []}, False),
    ],
)
def test_customers(mapping: MappingConfig, customer: dict[str, Any], *, is_excluded: bool) -> None:
    """One of the customer's stores must be served. The default shipping address decides the country."""
    customer = {"id": "id-1", "email": "ada@example.com"} | customer
    current = Enriched(about("customer", "ResourceUpdated"), NOW, customer=customer)
    included = Enriched(about("customer", "CustomerCreated", customer=customer), NOW)
    for enriched in (current, included):
        if is_excluded:
            with pytest.raises(Excluded):
                transform(enriched, mapping)
        else:
            assert transform(enriched, mapping)


def test_payments_follow_their_order_or_customer() -> None:
    """A refund is sent to the account of its order's store."""
    refund = {"id": "t", "type": "Refund", "state": "Success", "amount": {"currencyCode": "EUR", "centAmount": 1}}
    notification = about("payment", "PaymentTransactionAdded", transaction=refund)
    payment = {"id": "id-1", "transactions": [refund]}
    for code, is_served in (("de", True), ("fr", False)):
        of_order = Enriched(notification, NOW, payment=payment, order=ORDER | {"store": store(code)})
        customer = {"id": "c", "email": "ada@example.com", "stores": [store(code)]}
        of_customer = Enriched(notification, NOW, payment=payment, customer=customer)
        for enriched in (of_order, of_customer):
            if is_served:
                assert transform(enriched, GERMAN)
            else:
                with pytest.raises(Excluded):
                    transform(enriched, GERMAN)


def test_excluded_order_in_a_message_costs_no_lookup() -> None:
    """It is ignored before anything is fetched. An order that must be fetched costs one query."""
    with pytest.raises(Excluded):
        handler_for(about("order", "OrderCreated", order=ORDER | {"store": store("fr")}), GERMAN)
    order = ORDER | {"id": "id-1", "store": store("fr"), "lineItems": [{"productId": "p"}], "customerId": "c"}
    read: list[str] = []

    class Reader(InMemoryReader):
        def find(self, query: Any, values: Any) -> Any:
            read.append(query.path)
            return super().find(query, values)

    notification = about("order", "OrderStateChanged", orderState="Complete")
    (enriched,) = Enricher(Reader({"orders": [order]}), GERMAN).enrich([notification])
    assert read == ["orders"]
    assert isinstance(enriched, Enriched)
    with pytest.raises(Excluded):
        transform(enriched, GERMAN)


def test_erasures_are_not_excluded() -> None:
    """A customer who is gone has no store. The deletion concerns only a profile that this account has."""
    mapping = MappingConfig.model_validate({"stores": ["de"], "customer": {"erasure": True}})
    assert transform(Enriched(about("customer", "ResourceDeleted", dataErasure=True), NOW), mapping)


def test_events_name_store_and_country() -> None:
    """Segments and flows can use them."""
    order = ORDER | {"store": store("de"), "country": "AT"}
    (event,) = transform(Enriched(about("order", "OrderCreated"), NOW, order=order), GERMAN)
    assert event.resource is not None
    properties = event.resource["attributes"]["properties"]
    assert (properties["Store"], properties["Country"]) == ("de", "AT")


def test_excluded_is_a_reason_to_ignore() -> None:
    """An excluded message is acknowledged."""
    assert issubclass(Excluded, Ignored)


def test_countries_are_codes(tmp_path: Any) -> None:
    """A name instead of a code would exclude everybody."""
    (tmp_path / "mapping.toml").write_text('countries = ["Germany"]')
    with pytest.raises(SettingsError, match=r"countries\.0"):
        load_mapping(tmp_path / "mapping.toml")
