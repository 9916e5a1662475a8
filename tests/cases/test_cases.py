"""Each case ends with the expected content of Klaviyo, and each message with the expected outcome."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cases.case import Case
from tests.cases.compare import differences
from tests.cases.run import run_case

HERE = Path(__file__).parent
CASES = sorted(path.parent.name for path in HERE.glob("*/expected.json"))


@pytest.mark.parametrize("name", CASES)
def test_case(name: str, tmp_path: Path) -> None:
    """The result is what a person has reviewed."""
    case = Case(HERE / name)
    assert case.expected is not None
    assert differences(case.expected, run_case(case, tmp_path)) == []


def test_every_case_has_an_expected_result() -> None:
    """A folder without one would test nothing."""
    assert sorted(path.parent.name for path in HERE.glob("*/commercetools.json")) == CASES


def test_differences_are_named() -> None:
    """Fields that are not named can have any value; lists, null and numbers of calls are exact."""
    expected = {"a": {"b": 1, "c": None}, "list": [{"x": 1}], "max_calls": {"GET /api/": 1}}
    same = {"a": {"b": 1, "d": 2}, "list": [{"x": 1, "y": 2}], "calls": {"GET /api/x": 1, "POST /api/x": 5}}
    other = {"a": {"b": True, "c": 0}, "list": [], "calls": {"GET /api/x": 1, "GET /api/y": 1}}
    assert differences(expected, same) == []
    assert differences(expected, other) == [
        "a.b: expected 1, but it is True",
        "a.c: expected None, but it is 0",
        "list: expected 1 entries, but there are 0: []",
        "calls: expected at most 1 x GET /api/, but there were 2",
    ]
