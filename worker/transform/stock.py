"""The stock of a variant, from the inventory entries of its sku."""

from __future__ import annotations

from typing import TYPE_CHECKING

from worker.json_access import as_dict, as_int, as_text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from worker.mapping import MappingConfig
    from worker.model import Json

ALL_CHANNELS = "*"
# Klaviyo's inventory_policy: whether feeds and recommendations omit a variant that is out of stock
_OMIT_IF_SOLD_OUT, _ALWAYS_SHOW = 1, 2


def stock(entries: Sequence[Json], mapping: MappingConfig) -> Json:
    """Return `inventory_quantity` and `inventory_policy` of a variant. `entries` are all inventory entries of its sku.

    The quantity is None if the sku has no entry: then its stock is not tracked, so it is never sold out. A sku that has
    entries, but none in the channels of the mapping, is sold out.
    """
    if not entries:
        return {"inventory_quantity": None, "inventory_policy": _ALWAYS_SHOW}
    counted = _counted(entries, mapping.inventory.channel)
    is_restocked = any(as_int(entry.get("restockableInDays")) is not None for entry in counted)
    return {
        "inventory_quantity": sum(as_int(entry.get("availableQuantity")) or 0 for entry in counted),
        "inventory_policy": _ALWAYS_SHOW if is_restocked else _OMIT_IF_SOLD_OUT,
    }


def _counted(entries: Sequence[Json], channel: str | list[str]) -> Sequence[Json]:
    """Return the entries whose quantities count. "" or []: the one without a channel; if there is none, all entries."""
    if channel == ALL_CHANNELS:
        return entries
    channels = [channel] if isinstance(channel, str) else channel or [""]
    counted = [entry for entry in entries if _channel(entry) in channels]
    return entries if not counted and channels == [""] else counted


def _channel(entry: Json) -> str:
    return as_text(as_dict(entry.get("supplyChannel")).get("id"))
