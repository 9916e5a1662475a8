"""commercetools' query predicates."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.sandbox.commercetools.predicate import PredicateError, parse_predicate

ORDER = {
    "id": "o-1",
    "version": 3,
    "paid": True,
    "total": 1.5,
    "paymentInfo": {"payments": [{"id": "p-1"}, {"id": "p-2"}]},
    "ancestors": [],
    "tags": ["new", "sale"],
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
        ("ancestors is empty", True),
        ("tags is not empty", True),
        ("ancestors is defined", True),
        ('id not in ("x", "y")', True),
        ('id not in ("x", "o-1")', False),
        ('tags contains any ("sale", "old")', True),
        ('tags contains any ("old")', False),
        ('tags contains all ("sale", "new")', True),
        ('tags contains all ("sale", "old")', False),
        ('paymentInfo(payments(id in ("p-1")) and payments(id in ("p-2")))', True),
        ('paymentInfo(payments(id = "p-1" and id = "p-2"))', False),
        ('id = "x" or id = "o-1" and version = 3', True),
        ('(id = "o-1" or id = "x") and version = 4', False),
        ("paid = 1", False),
        ("paid in (1)", False),
        ("version in (3, 4)", True),
        ("paymentInfo in (3)", False),
        ('version = "3"', False),
        ('version < "3"', False),
    ],
)
def test_predicates(predicate: str, expected: bool) -> None:
    """The cases cover comparisons, lists, nesting over arrays, and, or, not."""
    assert parse_predicate(predicate)(ORDER) is expected


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
        'and = "x"',
        "id contains (3)",
        "id is",
        'id in "x"',
        "not " * 100 + "id = 1",
    ],
)
def test_malformed_predicate_is_rejected(predicate: str) -> None:
    """Commercetools responds with 400."""
    with pytest.raises(PredicateError):
        parse_predicate(predicate)


def literal(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


IDS = st.sampled_from(["a", "b", "c"])
TERMS = st.builds(lambda name, value: (f'{name} = "{value}"', lambda x: x[name] == value), st.sampled_from("xy"), IDS)


def combined(inner):
    def pair(first, word, second):
        join = all if word == "and" else any
        return f"({first[0]}) {word} ({second[0]})", lambda x: join((first[1](x), second[1](x)))

    return st.builds(pair, inner, st.sampled_from(["and", "or"]), inner) | inner.map(
        lambda term: (f"not ({term[0]})", lambda x: not term[1](x))
    )


@given(st.recursive(TERMS, combined, max_leaves=8), IDS, IDS)
def test_combinations_follow_boolean_algebra(predicate, x: str, y: str) -> None:
    """`and` and `or` can be nested."""
    text, expected = predicate
    assert parse_predicate(text)({"x": x, "y": y}) is expected({"x": x, "y": y})


@given(st.lists(IDS), st.lists(IDS, min_size=1))
def test_array_matches_if_any_element_matches(held: list[str], wanted: list[str]) -> None:
    """The elements are objects with a nested predicate, or texts with `contains any`."""
    expected = bool(set(held) & set(wanted))
    listed = ", ".join(map(literal, wanted))
    assert parse_predicate(f"parts(id in ({listed}))")({"parts": [{"id": each} for each in held]}) is expected
    assert parse_predicate(f"parts contains any ({listed})")({"parts": held}) is expected


@given(st.text(alphabet='abc ()=<>!,"\\ andornotiscontains0.-'))
def test_any_text_is_a_predicate_or_an_error(text: str) -> None:
    """A parsed predicate never fails on a value."""
    try:
        test = parse_predicate(text)
    except PredicateError:
        return
    assert test(ORDER) in {True, False}


@given(st.text(), st.text())
def test_any_text_can_be_a_value(wanted: str, other: str) -> None:
    """Quotes and backslashes are escaped."""
    test = parse_predicate(f"id in ({literal(wanted)})")
    assert test({"id": wanted})
    assert test({"id": other}) is (wanted == other)
