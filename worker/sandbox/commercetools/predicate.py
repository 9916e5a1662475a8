"""Evaluate commercetools query predicates: https://docs.commercetools.com/api/predicates/query."""

from __future__ import annotations

import operator
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

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


Path = tuple[str, ...]  # the names of fields inside each other
Literal = tuple[bool, Any]


class PredicateError(ValueError):
    """The predicate is malformed."""


@dataclass(frozen=True, slots=True)
class Predicate:
    """A test of a value.

    `needs`: what can be looked up in an index. Of these fields and literals, a value that passes has one at least;
    None: nothing is known.
    """

    holds: Callable[[Any], bool]
    needs: frozenset[tuple[Path, Literal]] | None = None

    def __call__(self, value: Any) -> bool:
        """Tell whether a value passes."""
        return self.holds(value)


def literals(value: Any, path: Path) -> Iterator[Literal]:
    """Return what a value has at a path: all of it, where there are arrays on the way."""
    for member in _members(value, path[0]):
        if len(path) > 1:
            yield from literals(member, path[1:])
        else:
            yield _literal(member)


def matches(predicate: str) -> Predicate:
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

    def alternatives(self) -> Predicate:
        tests = [self.conjunction()]
        while self.next == "or":
            self.take()
            tests.append(self.conjunction())
        if len(tests) == 1:
            return tests[0]
        needs = [test.needs for test in tests if test.needs is not None]
        together = frozenset().union(*needs) if len(needs) == len(tests) else None
        return Predicate(lambda value: any(test(value) for test in tests), together)

    def conjunction(self) -> Predicate:
        tests = [self.term()]
        while self.next == "and":
            self.take()
            tests.append(self.term())
        if len(tests) == 1:
            return tests[0]
        needs = [test.needs for test in tests if test.needs is not None]
        return Predicate(lambda value: all(test(value) for test in tests), min(needs, key=len, default=None))

    def term(self) -> Predicate:
        if self.next == "not":
            self.take()
            test = self._deeper(self.term)
            return Predicate(lambda value: not test(value))
        if self.next == "(":
            return self._nested()
        return self._field(self.take())

    def _deeper(self, parse: Callable[[], Predicate]) -> Predicate:
        if self._depth == _MAX_DEPTH:
            raise PredicateError("nested too deep")
        self._depth += 1
        test = parse()
        self._depth -= 1
        return test

    def _nested(self) -> Predicate:
        self.take("(")
        test = self._deeper(self.alternatives)
        self.take(")")
        return test

    def _field(self, name: str) -> Predicate:
        if not (name[0].isalpha() or name[0] == "_") or name in _RESERVED:
            raise PredicateError(f"expected a field, found {name}")
        if self.next == "(":
            inner = self._nested()
            needs = inner.needs and frozenset(((name, *path), literal) for path, literal in inner.needs)
            return Predicate(lambda value: any(map(inner, _members(value, name))), needs)
        word = self.take(*_COMPARE, "not", "in", "contains", "is")
        if word in _COMPARE:
            return self._comparison(name, word)
        if word == "contains":
            enough = any if self.take("any", "all") == "any" else all
            members = self._choices()
            return Predicate(
                lambda value: enough(map({_literal(v) for v in _members(value, name)}.__contains__, members))
            )
        if word == "is":
            return Predicate(self._presence(name))
        if word == "not":
            self.take("in")
        choices, positive = self._choices(), word == "in"
        needs = frozenset(((name,), literal) for literal in choices) if positive else None
        return Predicate(lambda value: any((_literal(v) in choices) is positive for v in _members(value, name)), needs)

    def _comparison(self, name: str, word: str) -> Predicate:
        compare, wanted = _COMPARE[word], self._value()
        needs = frozenset({((name,), _literal(wanted))}) if word == "=" else None
        return Predicate(lambda value: any(_compares(compare, v, wanted) for v in _members(value, name)), needs)

    def _presence(self, name: str) -> Callable[[Any], bool]:
        positive = self.next != "not"
        if not positive:
            self.take()
        if self.take("defined", "empty") == "defined":
            return lambda value: (isinstance(value, dict) and value.get(name) is not None) is positive
        return lambda value: (not _members(value, name)) is positive

    def _choices(self) -> set[Literal]:
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


def _literal(value: Any) -> Literal:
    """Return what tells literals apart: for Python, True and 1 are the same, and objects cannot be in sets."""
    return isinstance(value, bool), None if isinstance(value, dict | list) else value


def _compares(compare: Callable[[Any, Any], Any], value: Any, wanted: Any) -> bool:
    if isinstance(value, bool) is not isinstance(wanted, bool):
        return compare is operator.ne
    try:
        return bool(compare(value, wanted))
    except TypeError:
        return False
