"""Products, stock and standalone prices: cases that the golden folders do not cover."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest

from worker.errors import Ignored
from worker.mapping import MappingConfig
from worker.model import Enriched, Notification, OperationKind
from worker.transform import handler_for, transform

NOW = datetime(2026, 11, 24, tzinfo=UTC)
MUG = {"id": "p", "name": {"en": "Mug"}, "masterVariant": {"id": 1, "sku": " MUG "}, "variants": [{"id": 2}]}
DELETION = [OperationKind.DELETE_STALE_VARIANTS, OperationKind.DELETE_ITEM]


def about(resource_type: str, kind: str, **payload: Any) -> Notification:
    return Notification(kind, resource_type, "id-1", "2026-11-23T10:00:00Z", payload)


@pytest.mark.parametrize(
    "payload",
    [
        {"staged": True},
        {"updatedPrices": [{"staged": True}, {"staged": True}]},
        {"productProjection": {"published": False}},
    ],
)
def test_change_that_is_not_live_is_ignored_before_anything_is_read(payload: Any) -> None:
    """Price imports change staged prices in bulk. The publish writes them."""
    for kind in ("ProductPriceChanged", "ProductPriceDiscountsSet", "ProductCreated"):
        with pytest.raises(Ignored, match=r"staged|not published"):
            handler_for(about("product", kind, **payload), MappingConfig())
    if "staged" in payload:
        with pytest.raises(Ignored, match="staged"):
            handler_for(about("standalone-price", "StandalonePriceValueChanged", **payload), MappingConfig())


@pytest.mark.parametrize(
    "payload",
    [{}, {"staged": False}, {"updatedPrices": [{"staged": True}, {"staged": False}]}, {"updatedPrices": []}],
)
def test_change_that_can_be_live_is_handled(payload: Any) -> None:
    """A message without its payload does not say whether the change is staged."""
    assert handler_for(about("product", "ProductPriceChanged", **payload), MappingConfig())


def test_variant_without_sku_is_left_out_of_others() -> None:
    """The skus are taken as they are."""
    enriched = Enriched(about("product", "ProductPublished"), NOW, product=MUG, product_id="p")
    operations = transform(enriched, MappingConfig())
    assert [operation.key for operation in operations] == ["p", " MUG ", "p"]
    assert operations[-1].keep_skus == {" MUG "}
    assert operations[0].gaps == ["price", "sku"]


@pytest.mark.parametrize(
    ("resource", "kind"),
    [
        ("product", "ProductUnpublished"),
        ("standalone-price", "StandalonePriceDeleted"),
    ],
)
def test_product_that_is_no_longer_published_is_deleted(resource: str, kind: str) -> None:
    """A message that has found the product before possibly wrote it after its deletion."""
    operations = transform(Enriched(about(resource, kind), NOW, product_id="p", sku="MUG"), MappingConfig())
    assert [operation.kind for operation in operations] == DELETION
    assert {operation.key for operation in operations} == {"p"}


def test_related_product_is_ensured() -> None:
    """A late message about something else creates what is missing, and leaves what exists to its own messages."""
    related = Enriched(about("product", "ResourceUpdated"), NOW, product=MUG, product_id="p")
    enriched = Enriched(about("inventory-entry", "ResourceUpdated"), NOW, sku=" MUG ", related=[related])
    assert [(operation.kind, operation.key) for operation in transform(enriched, MappingConfig())] == [
        (OperationKind.UPDATE_INVENTORY, " MUG "),
        (OperationKind.ENSURE_ITEM, "p"),
        (OperationKind.ENSURE_VARIANT, " MUG "),
        (OperationKind.DELETE_STALE_VARIANTS, "p"),
    ]
    gone = replace(enriched, related=[replace(related, product=None)])
    assert [operation.kind for operation in transform(gone, MappingConfig())][1:] == DELETION
    unreadable = replace(enriched, related=[replace(related, product={"id": "p"})])
    assert [operation.kind for operation in transform(unreadable, MappingConfig())] == [OperationKind.UPDATE_INVENTORY]


def test_products_of_a_category_that_has_moved_are_updated() -> None:
    """Its breadcrumb is written when they are."""
    related = Enriched(about("product", "ResourceUpdated"), NOW, product=MUG, product_id="p")
    notification = replace(about("category", "ResourceUpdated"), seen=[("category-products", "r")])
    notification = replace(notification, resource_id="r")
    versions = {("category", "r"): 2, ("category", "gone"): None}
    enriched = Enriched(notification, NOW, category={"id": "r"}, related=[related], versions=versions)
    assert [(operation.kind, operation.key) for operation in transform(enriched, MappingConfig())] == [
        (OperationKind.MOVE_CATEGORY, "r"),
        (OperationKind.UPSERT_ITEM, "p"),
        (OperationKind.UPSERT_VARIANT, " MUG "),
        (OperationKind.DELETE_STALE_VARIANTS, "p"),
        (OperationKind.DELETE_CATEGORY, "gone"),
    ]


def test_price_of_no_published_product_is_ignored() -> None:
    """Its product's own message writes the price."""
    enriched = Enriched(about("standalone-price", "StandalonePriceCreated"), NOW, sku="MUG")
    with pytest.raises(Ignored, match="no published product"):
        transform(enriched, MappingConfig())


def test_stock_of_an_unknown_sku_is_ignored() -> None:
    """The entry was deleted. The message of its deletion names the sku."""
    with pytest.raises(Ignored, match="sku"):
        transform(Enriched(about("inventory-entry", "ResourceUpdated"), NOW), MappingConfig())


@pytest.mark.parametrize("kind", ["ProductPublished", "StandalonePriceCreated"])
def test_projection_without_its_variants_writes_and_deletes_nothing(kind: str) -> None:
    """In a project with the catalog model Modular, the projection does not show the variants."""
    resource = "product" if kind.startswith("Product") else "standalone-price"
    product = {"id": "p", "variants": []}
    with pytest.raises(Ignored, match="Modular"):
        transform(Enriched(about(resource, kind), NOW, product=product, product_id="p"), MappingConfig())


def test_item_has_all_images_of_the_master_variant() -> None:
    """Templates can show more than the first one. Without images, those that Klaviyo has are removed."""
    images = [{"url": "https://img.example/1"}, {"label": "without a URL"}, {"url": "https://img.example/2"}]
    for found, urls in ((images, ["https://img.example/1", "https://img.example/2"]), ([], [])):
        product = MUG | {"masterVariant": {"id": 1, "sku": "M", "images": found}}
        enriched = Enriched(about("product", "ProductPublished"), NOW, product=product, product_id="p")
        operations = transform(enriched, MappingConfig())
        (item,) = (each.resource for each in operations if each.kind is OperationKind.UPSERT_ITEM)
        assert item is not None
        assert item["attributes"]["images"] == urls
        assert item["attributes"]["image_full_url"] == next(iter(urls), None)


def test_metadata_of_an_item_differs_for_other_categories() -> None:
    """Otherwise an item whose categories alone have changed would not be written. Their order does not matter."""

    def metadata(*ids: str) -> str:
        categories = {name: {"id": name, "ancestors": [{"id": "root"}]} for name in ids} | {"root": {"id": "root"}}
        of_product = {"p": ids}
        enriched = Enriched(about("product", "ProductPublished"), NOW, product=MUG, product_id="p")
        operations = transform(replace(enriched, categories=categories, product_categories=of_product), MappingConfig())
        (item,) = (each.resource for each in operations if each.kind is OperationKind.UPSERT_ITEM)
        assert item is not None
        return str(item["attributes"]["custom_metadata"]["category_ids_hash"])

    assert metadata("a", "b") == metadata("b", "a")
    assert len({metadata(), metadata("a"), metadata("b"), metadata("a", "b")}) == 4
