"""Inventory messages -> the stock of a variant, which triggers Klaviyo's back-in-stock flows."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from worker.errors import Ignored
from worker.model import Operation, OperationKind
from worker.transform.catalog import catalog_id
from worker.transform.products import product_deletion, product_operations
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

    If Klaviyo has no such variant, write the whole product instead. If an earlier reading showed a product that is no
    longer published, delete it: possibly this message has written it.
    """
    sku = enriched.sku
    if not sku:
        raise Ignored("commercetools no longer has the inventory entry, and the message does not name its sku")
    if enriched.product_id and enriched.product is None:
        return product_deletion(enriched.product_id)
    known = {
        name: value for name, value in stock(enriched.inventory.get(sku, ()), mapping).items() if value is not None
    }
    variant = {"type": "catalog-variant", "id": catalog_id(sku), "attributes": known}
    write_product = partial(product_operations, enriched, mapping) if enriched.product else None
    return [Operation(OperationKind.UPDATE_INVENTORY, sku, variant, fallback=write_product)]
