"""Evaluate commercetools query predicates: https://docs.commercetools.com/api/predicates/query."""

from __future__ import annotations

import operator
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

_TOKEN = re.compile(r'\s*(?:("(?:[^"\\]|\\.)*")|(-?\d+(?:\.\d+)?)|([A-Za-z_][\w-]*)|(<>|!=|<=|>=|[()=<>,]))')
_COMPARE = {
    "=": operator.eq,
    "!=": operator.ne,
    "<>": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}


class PredicateError(ValueError):
    """The predicate is malformed."""


def matches(predicate: str) -> Callable[[Any], bool]:
    """Return the test a predicate describes. Raises PredicateError."""
    parser = _Parser(_tokens(predicate))
    test = parser.alternatives()
    if parser.next is not None:
        raise PredicateError(f"unexpected {parser.next}")
    return test


def _tokens(text: str) -> list[str]:
    tokens: list[str] = []
    position = 0
    text = text.strip()
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None:
            raise PredicateError(f"cannot read at {position}")
        tokens.append(match.group(match.lastindex or 0))
        position = match.end()
    return tokens


class _Parser:
    """Recursive descent: alternatives > conjunctions > terms."""

    def __init__(self, tokens: list[str]) -> None:
        self._tokens = [*tokens, None]
        self._at = 0

    @property
    def next(self) -> str | None:
        return self._tokens[self._at]

    def take(self, *expected: str) -> str:
        token = self.next
        if token is None or (expected and token not in expected):
            raise PredicateError(f"expected {' or '.join(expected) or 'more'}, found {token}")
        self._at += 1
        return token

    def alternatives(self) -> Callable[[Any], bool]:
        tests = [self.conjunction()]
        while self.next == "or":
            self.take()
            tests.append(self.conjunction())
        return tests[0] if len(tests) == 1 else lambda value: any(test(value) for test in tests)

    def conjunction(self) -> Callable[[Any], bool]:
        tests = [self.term()]
        while self.next == "and":
            self.take()
            tests.append(self.term())
        return tests[0] if len(tests) == 1 else lambda value: all(test(value) for test in tests)

    def term(self) -> Callable[[Any], bool]:
        if self.next == "not":
            self.take()
            test = self.term()
            return lambda value: not test(value)
        if self.next == "(":
            return self._nested()
        return self._field(self.take())

    def _nested(self) -> Callable[[Any], bool]:
        self.take("(")
        test = self.alternatives()
        self.take(")")
        return test

    def _field(self, name: str) -> Callable[[Any], bool]:
        if not name[0].isalpha() and name[0] != "_":
            raise PredicateError(f"expected a field, found {name}")
        if self.next == "(":
            inner = self._nested()
            return lambda value: any(map(inner, _members(value, name)))
        word = self.take()
        if word in _COMPARE:
            compare, wanted = _COMPARE[word], self._value()
            return lambda value: any(_compares(compare, member, wanted) for member in _members(value, name))
        if word == "in":
            wanted_any = self._values()
            return lambda value: any(member in wanted_any for member in _members(value, name))
        if word == "is":
            present = self.next != "not"
            if not present:
                self.take()
            self.take("defined")
            return lambda value: bool(_members(value, name)) is present
        raise PredicateError(f"unknown operator {word}")

    def _values(self) -> list[Any]:
        self.take("(")
        values = [self._value()]
        while self.take(",", ")") == ",":
            values.append(self._value())
        return values

    def _value(self) -> Any:
        token = self.take()
        if token.startswith('"'):
            return re.sub(r"\\(.)", r"\1", token[1:-1])
        if token in {"true", "false"}:
            return token == "true"
        try:
            return float(token) if "." in token else int(token)
        except ValueError:
            raise PredicateError(f"expected a value, found {token}") from None


def _members(value: Any, name: str) -> list[Any]:
    """Return what a field holds: the members of an array, or the value itself."""
    found = value.get(name) if isinstance(value, dict) else None
    if found is None:
        return []
    return found if isinstance(found, list) else [found]


def _compares(compare: Callable[[Any, Any], Any], value: Any, wanted: Any) -> bool:
    try:
        return bool(compare(value, wanted))
    except TypeError:
        return False
