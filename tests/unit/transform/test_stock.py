"""The rule for the stock of a variant."""

from __future__ import annotations

from typing import Any

import pytest

from worker.mapping import MappingConfig
from worker.transform.stock import stock


def entry(quantity: int, channel: str = "", **more: Any) -> dict[str, Any]:
    return {"availableQuantity": quantity, **({"supplyChannel": {"id": channel}} if channel else {}), **more}


NORTH, SOUTH, EAST, WEB = entry(12, "north"), entry(3, "south"), entry(40, "east"), entry(100)


@pytest.mark.parametrize(
    ("entries", "channel", "expected"),
    [
        ([], "", (None, 2)),
        ([], "*", (None, 2)),
        ([entry(0)], "", (0, 1)),
        ([NORTH, WEB], "", (100, 1)),
        ([NORTH, SOUTH], "", (15, 1)),
        ([NORTH, SOUTH, WEB], "south", (3, 1)),
        ([NORTH, SOUTH, EAST, WEB], ["north", "east"], (52, 1)),
        ([NORTH, WEB], ["north", ""], (112, 1)),
        ([NORTH, SOUTH, WEB], "*", (115, 1)),
        ([NORTH, WEB], "south", (0, 1)),
        ([NORTH, WEB], [], (100, 1)),
        ([NORTH], [], (12, 1)),
        ([entry(0, restockableInDays=14)], "", (0, 2)),
        ([entry(0, restockableInDays=0)], "", (0, 2)),
        ([entry(0), entry(5, "north", restockableInDays=14)], "", (0, 1)),
        ([{"availableQuantity": "odd", "supplyChannel": 5}], "", (0, 1)),
    ],
)
def test_stock(entries: Any, channel: str | list[str], expected: tuple[int | None, int]) -> None:
    """The quantity is the sum of the entries that count. A sku that is not tracked, or restocked, is always shown."""
    mapping = MappingConfig.model_validate({"inventory": {"channel": channel}})
    found = stock(entries, mapping)
    assert (found["inventory_quantity"], found["inventory_policy"]) == expected
