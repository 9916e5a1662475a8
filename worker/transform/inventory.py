"""Inventory messages -> the stock of a variant, which triggers Klaviyo's back-in-stock flows."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from worker.errors import Ignored
from worker.json_access import as_text
from worker.model import Operation, OperationKind
from worker.transform.catalog import catalog_id
from worker.transform.products import available_quantity, product_operations
from worker.transform.registry import handles

if TYPE_CHECKING:
    from collections.abc import Iterable

    from worker.mapping import MappingConfig
    from worker.model import Enriched


@handles("ResourceCreated", "ResourceUpdated", resource="inventory-entry", effect="variant inventory_quantity")
def inventory_changed(enriched: Enriched, mapping: MappingConfig) -> Iterable[Operation]:
    """Update the stock of the variant. If Klaviyo has no such variant, write the whole product instead."""
    entry = enriched.inventory_entry
    if entry is None:
        raise Ignored("commercetools no longer has the inventory entry")
    sku = as_text(entry.get("sku"))
    stock = available_quantity([entry], mapping.inventory.channel)
    if stock is None or not sku:
        raise Ignored("the entry belongs to another supply channel (inventory.channel), or has no sku or quantity")
    attributes = {"inventory_quantity": stock, "inventory_policy": 1}
    variant = {"type": "catalog-variant", "id": catalog_id(sku), "attributes": attributes}
    write_product = partial(product_operations, enriched, mapping) if enriched.product else None
    yield Operation(OperationKind.UPDATE_INVENTORY, sku, variant, fallback=write_product)
