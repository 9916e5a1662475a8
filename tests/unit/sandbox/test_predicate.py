"""commercetools predicates, as far as the sandbox needs them and a little further."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.sandbox.predicate import PredicateError, matches

ORDER = {
    "id": "o-1",
    "version": 3,
    "paid": True,
    "total": 1.5,
    "paymentInfo": {"payments": [{"id": "p-1"}, {"id": "p-2"}]},
    "ancestors": [],
}


@pytest.mark.parametrize(
    ("predicate", "expected"),
    [
        ('id = "o-1"', True),
        ('id in ("x","o-1")', True),
        ('id in ("x")', False),
        ('id > "o-0" and version >= 3', True),
        ('id != "o-1" or version < 3', False),
        ("version <> 3", False),
        ("total <= 1.5", True),
        ("version > -1", True),
        ("paid = true", True),
        ("paid = false", False),
        ('paymentInfo(payments(id in ("p-2")))', True),
        ('paymentInfo(payments(id = "p-3"))', False),
        ('not(id = "o-1")', False),
        ('not id = "x" and (version = 3 or version = 4)', True),
        ("paymentInfo is defined", True),
        ("missing is defined", False),
        ("missing is not defined", True),
        ('missing = "x"', False),
        ('version = "3"', False),
        ('version < "3"', False),
    ],
)
def test_predicates_mean_what_they_say(predicate: str, expected: bool) -> None:
    """Comparisons, lists, nesting over arrays, and, or, not."""
    assert matches(predicate)(ORDER) is expected


@pytest.mark.parametrize(
    "predicate",
    [
        "",
        "id",
        "id =",
        'id = "x',
        "id in ()",
        'id in ("x"',
        "(id = 1",
        "id ? 1",
        '"x" = id',
        "id = name",
        'id = "x" id',
    ],
)
def test_a_malformed_predicate_is_refused(predicate: str) -> None:
    """The service answers 400, so the stand-in must know."""
    with pytest.raises(PredicateError):
        matches(predicate)


@given(st.text(), st.text())
def test_any_text_can_be_a_value(wanted: str, other: str) -> None:
    """Quotes and backslashes are escaped, and nothing ends a literal early."""
    escaped = wanted.replace("\\", "\\\\").replace('"', '\\"')
    test = matches(f'id in ("{escaped}")')
    assert test({"id": wanted})
    assert test({"id": other}) is (wanted == other)
