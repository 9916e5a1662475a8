"""Klaviyo's custom catalog: ids and the category operations that products need too."""

from __future__ import annotations

from typing import TYPE_CHECKING

from worker.loose import as_text
from worker.model import Json, Kind, Operation
from worker.transform import fields

if TYPE_CHECKING:
    from collections.abc import Mapping as ReadOnly

    from worker.mapping import Mapping

_PREFIX = "$custom:::$default:::"


def catalog_id(external_id: str) -> str:
    """Return Klaviyo's id of a custom catalog entry; the only form Klaviyo knows."""
    return _PREFIX + external_id


def category_operation(kind: Kind, category: Json, categories: ReadOnly[str, Json], mapping: Mapping) -> Operation:
    """Return an operation that writes a category under its breadcrumb."""
    external_id = as_text(category.get("id"))
    attributes = {
        "external_id": external_id,
        "name": fields.breadcrumb(category, categories, mapping.locale) or external_id,
        "integration_type": "$custom",
        "catalog_type": "$default",
    }
    return Operation(kind, external_id, {"type": "catalog-category", "attributes": attributes})
