"""Inventory messages -> the stock of a variant, which triggers Klaviyo's back-in-stock flows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from worker.errors import Ignored
from worker.model import Operation, OperationKind
from worker.transform.catalog import catalog_id
from worker.transform.registry import handles
from worker.transform.stock import stock

if TYPE_CHECKING:
    from collections.abc import Iterable

    from worker.mapping import MappingConfig
    from worker.model import Enriched


@handles(
    "ResourceCreated",
    "ResourceUpdated",
    "InventoryEntryDeleted",
    resource="inventory-entry",
    effect="variant inventory_quantity and inventory_policy",
)
def inventory_changed(enriched: Enriched, mapping: MappingConfig) -> Iterable[Operation]:
    """Update the stock of the variant from all inventory entries of its sku.

    If Klaviyo has no such variant, its product is written as a related product.
    """
    sku = enriched.sku
    if not sku:
        raise Ignored("commercetools no longer has the inventory entry, and the message does not name its sku")
    known = {
        name: value for name, value in stock(enriched.inventory.get(sku, ()), mapping).items() if value is not None
    }
    variant = {"type": "catalog-variant", "id": catalog_id(sku), "attributes": known}
    return [Operation(OperationKind.UPDATE_INVENTORY, sku, variant)]
