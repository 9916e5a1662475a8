"""Properties within Klaviyo's size limits."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.test_parse import json_values
from worker.transform.size_limits import MAX_ARRAY, MAX_PROPERTIES, MAX_TEXT_BYTES, truncate


@given(st.dictionaries(st.text(), json_values, max_size=8))
def test_properties_within_the_limits_are_unchanged(properties: dict[str, object]) -> None:
    """Truncation starts only at Klaviyo's limits."""
    fitted, truncated = truncate(properties)
    assert (fitted, truncated) == (properties, [])


def _nested(depth: int) -> object:
    return {"inner": _nested(depth - 1)} if depth else "leaf"


@pytest.mark.parametrize("depth", [9, 10, 254, 900])
def test_properties_are_cut_below_the_maximum_depth(depth: int) -> None:
    """Ten levels of objects are the maximum. More than 254 levels cannot be encoded."""
    fitted, truncated = truncate({"outer": _nested(depth)})
    assert (fitted["outer"], truncated) == ((_nested(9), []) if depth == 9 else (_cut(9), ["outer" + ".inner" * 9]))


def _cut(depth: int) -> object:
    return {"inner": _cut(depth - 1)} if depth else None


def test_properties_beyond_the_limits_are_truncated_and_named() -> None:
    """The last entries are removed first, and the paths name the truncated properties."""
    fitted, truncated = truncate(
        {
            "long": "é" * MAX_TEXT_BYTES,
            "many": list(range(MAX_ARRAY + 5)),
            "deep": _nested(12),
            **{f"p{number}": number for number in range(MAX_PROPERTIES)},
        }
    )
    assert len(fitted["long"].encode()) <= MAX_TEXT_BYTES
    assert fitted["many"] == list(range(MAX_ARRAY))
    assert len(fitted) == MAX_PROPERTIES
    assert {"long", "many", "*"} <= set(truncated)
    assert any(path.startswith("deep.inner") for path in truncated)


@pytest.mark.parametrize("text", ["]]]]", "}}}}", '\\"]]]]', "[]]]]", "é]]]]"])
def test_brackets_in_a_text_do_not_affect_the_depth(text: str) -> None:
    """Klaviyo limits the depth of objects and arrays, not of brackets in texts."""
    fitted, truncated = truncate({"text": text, "deep": _nested(12)})
    assert fitted["text"] == text
    assert truncated == ["deep" + ".inner" * 9]


def test_largest_array_is_halved_until_the_properties_fit() -> None:
    """An order with thousands of lines keeps its first lines and its small properties."""
    items = [{"name": "x" * 2_000, "number": number} for number in range(3_000)]
    fitted, truncated = truncate({"Items": items, "OrderId": "1", "note": "y" * 50_000})
    assert fitted["OrderId"] == "1"
    assert fitted["Items"] == items[:1_500]
    assert truncated == ["Items"]
    assert truncate({"OrderId": "1", "note": "y" * 50_000}, max_bytes=1_000) == ({"OrderId": "1"}, ["note"])
