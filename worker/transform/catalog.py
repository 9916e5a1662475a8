"""Klaviyo's custom catalog: the ids of its entries, and the operation that writes a category."""

from __future__ import annotations

from typing import TYPE_CHECKING

from worker.json_access import as_text
from worker.model import Json, Operation, OperationKind
from worker.transform import fields

if TYPE_CHECKING:
    from collections.abc import Mapping

    from worker.mapping import MappingConfig

CATEGORY_IDS_HASH = "category_ids_hash"  # in the metadata of an item: of the categories that it was last written with
_PREFIX = "$custom:::$default:::"


def catalog_id(external_id: str) -> str:
    """Return Klaviyo's id of the catalog entry that has an external id."""
    return _PREFIX + external_id


def external_id(entry_id: str) -> str:
    """Return the external id of the catalog entry that has Klaviyo's id `entry_id`."""
    return entry_id.removeprefix(_PREFIX)


def category_operation(
    kind: OperationKind, category: Json, categories: Mapping[str, Json], mapping: MappingConfig
) -> Operation:
    """Return the operation that writes a category. Its name in Klaviyo is its breadcrumb."""
    category_id = as_text(category.get("id"))
    attributes = {
        "external_id": category_id,
        "name": fields.breadcrumb(category, categories, mapping.locale) or category_id,
        "integration_type": "$custom",
        "catalog_type": "$default",
    }
    return Operation(kind, category_id, {"type": "catalog-category", "attributes": attributes})
