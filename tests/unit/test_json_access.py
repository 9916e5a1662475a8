"""JSON of any shape."""

from __future__ import annotations

import orjson
import pytest

from worker.json_access import loads


@pytest.mark.parametrize("half", [rb"\ud83d", rb"\uDE00", b"\xed\xa0\xbd"])
def test_half_a_surrogate_pair_is_replaced(half: bytes) -> None:
    """As an escape and as bytes. Whole pairs, also of two escapes, and all other texts stay."""
    text = (
        b'{"odd": "bye ' + half + rb'!", "whole": "\ud83d\ude00 ' + "\N{GRINNING FACE}".encode() + rb'", "\ud83d": 1.5}'
    )
    assert loads(text) == {"odd": "bye \N{REPLACEMENT CHARACTER}!", "whole": "😀 😀", "\N{REPLACEMENT CHARACTER}": 1.5}


@pytest.mark.parametrize(
    "text", [b"", b"{", b"\xff", b"[NaN]", rb'["\ud83d"', rb'["\ud83d", NaN]', rb'["\ux"]', b"[" * 9_999 + rb'"\ud83d"']
)
def test_all_else_that_is_not_json_is_rejected(text: bytes) -> None:
    """Python's decoder accepts more than JSON."""
    with pytest.raises(orjson.JSONDecodeError):
        loads(text)
