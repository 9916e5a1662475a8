"""Evaluate commercetools query predicates: https://docs.commercetools.com/api/predicates/query."""

from __future__ import annotations

import operator
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

_TOKEN = re.compile(r'\s*(?:("(?:[^"\\]|\\.)*")|(-?\d+(?:\.\d+)?)|([A-Za-z_][\w-]*)|(<>|!=|<=|>=|[()=<>,]))')
_RESERVED = {"and", "or", "not", "in", "is", "contains", "defined", "empty", "true", "false"}
_MAX_DEPTH = 50  # parentheses and negations inside each other
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
        self._depth = 0

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
            test = self._deeper(self.term)
            return lambda value: not test(value)
        if self.next == "(":
            return self._nested()
        return self._field(self.take())

    def _deeper(self, parse: Callable[[], Callable[[Any], bool]]) -> Callable[[Any], bool]:
        if self._depth == _MAX_DEPTH:
            raise PredicateError("nested too deep")
        self._depth += 1
        test = parse()
        self._depth -= 1
        return test

    def _nested(self) -> Callable[[Any], bool]:
        self.take("(")
        test = self._deeper(self.alternatives)
        self.take(")")
        return test

    def _field(self, name: str) -> Callable[[Any], bool]:
        if not (name[0].isalpha() or name[0] == "_") or name in _RESERVED:
            raise PredicateError(f"expected a field, found {name}")
        if self.next == "(":
            inner = self._nested()
            return lambda value: any(map(inner, _members(value, name)))
        word = self.take(*_COMPARE, "not", "in", "contains", "is")
        if word in _COMPARE:
            compare, wanted = _COMPARE[word], self._value()
            return lambda value: any(_compares(compare, member, wanted) for member in _members(value, name))
        if word == "contains":
            enough = any if self.take("any", "all") == "any" else all
            members = self._choices()
            return lambda value: enough(map({_literal(v) for v in _members(value, name)}.__contains__, members))
        if word == "is":
            return self._presence(name)
        if word == "not":
            self.take("in")
        choices, positive = self._choices(), word == "in"
        return lambda value: any((_literal(member) in choices) is positive for member in _members(value, name))

    def _presence(self, name: str) -> Callable[[Any], bool]:
        positive = self.next != "not"
        if not positive:
            self.take()
        if self.take("defined", "empty") == "defined":
            return lambda value: (isinstance(value, dict) and value.get(name) is not None) is positive
        return lambda value: (not _members(value, name)) is positive

    def _choices(self) -> set[Any]:
        self.take("(")
        choices = {_literal(self._value())}
        while self.take(",", ")") == ",":
            choices.add(_literal(self._value()))
        return choices

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


def _literal(value: Any) -> tuple[bool, Any]:
    """Return what tells literals apart: for Python, True and 1 are the same, and objects cannot be in sets."""
    return isinstance(value, bool), None if isinstance(value, dict | list) else value


def _compares(compare: Callable[[Any, Any], Any], value: Any, wanted: Any) -> bool:
    if isinstance(value, bool) is not isinstance(wanted, bool):
        return compare is operator.ne
    try:
        return bool(compare(value, wanted))
    except TypeError:
        return False
