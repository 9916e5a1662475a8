"""Klaviyo's custom catalog: ids and the category operations that products need too."""

from __future__ import annotations

from typing import TYPE_CHECKING

from worker.json_access import as_text
from worker.model import Json, Operation, OperationKind
from worker.transform import fields

if TYPE_CHECKING:
    from collections.abc import Mapping

    from worker.mapping import MappingConfig

_PREFIX = "$custom:::$default:::"


def catalog_id(own_id: str) -> str:
    """Return Klaviyo's id of a custom catalog entry; the only form Klaviyo knows."""
    return _PREFIX + own_id


def external_id(entry_id: str) -> str:
    """Return our own id of a custom catalog entry."""
    return entry_id.removeprefix(_PREFIX)


def category_operation(
    kind: OperationKind, category: Json, categories: Mapping[str, Json], mapping: MappingConfig
) -> Operation:
    """Return an operation that writes a category under its breadcrumb."""
    category_id = as_text(category.get("id"))
    attributes = {
        "external_id": category_id,
        "name": fields.breadcrumb(category, categories, mapping.locale) or category_id,
        "integration_type": "$custom",
        "catalog_type": "$default",
    }
    return Operation(kind, category_id, {"type": "catalog-category", "attributes": attributes})
