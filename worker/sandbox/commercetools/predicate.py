"""commercetools' query predicates: https://docs.commercetools.com/api/predicates/query."""

from __future__ import annotations

import operator
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_TOKEN = re.compile(r'\s*(?:("(?:[^"\\]|\\.)*")|(-?\d+(?:\.\d+)?)|([A-Za-z_][\w-]*)|(<>|!=|<=|>=|[()=<>,]))')
_RESERVED = {"and", "or", "not", "in", "is", "contains", "defined", "empty", "true", "false"}
_MAX_DEPTH = 50  # nested parentheses and negations
_COMPARE = {
    "=": operator.eq,
    "!=": operator.ne,
    "<>": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}


Path = tuple[str, ...]  # names of nested fields
Literal = tuple[bool, Any]


class PredicateError(ValueError):
    """The predicate is malformed."""


@dataclass(frozen=True, slots=True)
class Predicate:
    """A parsed predicate.

    `index_keys`: fields and literals to look up in an index. A value that matches has at least one of them.
    None: an index does not help.
    """

    test: Callable[[Any], bool]
    index_keys: frozenset[tuple[Path, Literal]] | None = None

    def __call__(self, value: Any) -> bool:
        """Return True if a value matches."""
        return self.test(value)


def literals_at(value: Any, path: Path) -> Iterator[Literal]:
    """Yield the literals of a value at a path. If a field is an array, yield those of all its members."""
    for member in _members(value, path[0]):
        if len(path) > 1:
            yield from literals_at(member, path[1:])
        else:
            yield _literal(member)


def parse_predicate(predicate: str) -> Predicate:
    """Parse a predicate. Raises PredicateError."""
    parser = _Parser(_tokens(predicate))
    test = parser.parse_alternatives()
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
    """A recursive descent parser: alternatives of conjunctions of terms."""

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

    def parse_alternatives(self) -> Predicate:
        tests = [self.parse_conjunction()]
        while self.next == "or":
            self.take()
            tests.append(self.parse_conjunction())
        if len(tests) == 1:
            return tests[0]
        keys = [test.index_keys for test in tests if test.index_keys is not None]
        union = frozenset().union(*keys) if len(keys) == len(tests) else None
        return Predicate(lambda value: any(test(value) for test in tests), union)

    def parse_conjunction(self) -> Predicate:
        tests = [self.parse_term()]
        while self.next == "and":
            self.take()
            tests.append(self.parse_term())
        if len(tests) == 1:
            return tests[0]
        keys = [test.index_keys for test in tests if test.index_keys is not None]
        return Predicate(lambda value: all(test(value) for test in tests), min(keys, key=len, default=None))

    def parse_term(self) -> Predicate:
        if self.next == "not":
            self.take()
            test = self._parse_nested(self.parse_term)
            return Predicate(lambda value: not test(value))
        if self.next == "(":
            return self._parse_parentheses()
        return self._parse_field(self.take())

    def _parse_nested(self, parse: Callable[[], Predicate]) -> Predicate:
        if self._depth == _MAX_DEPTH:
            raise PredicateError("nested too deep")
        self._depth += 1
        test = parse()
        self._depth -= 1
        return test

    def _parse_parentheses(self) -> Predicate:
        self.take("(")
        test = self._parse_nested(self.parse_alternatives)
        self.take(")")
        return test

    def _parse_field(self, name: str) -> Predicate:
        if not (name[0].isalpha() or name[0] == "_") or name in _RESERVED:
            raise PredicateError(f"expected a field, found {name}")
        if self.next == "(":
            inner = self._parse_parentheses()
            keys = inner.index_keys and frozenset(((name, *path), literal) for path, literal in inner.index_keys)
            return Predicate(lambda value: any(map(inner, _members(value, name))), keys)
        word = self.take(*_COMPARE, "not", "in", "contains", "is")
        if word in _COMPARE:
            return self._parse_comparison(name, word)
        if word == "contains":
            quantifier = any if self.take("any", "all") == "any" else all
            members = self._parse_choices()
            return Predicate(
                lambda value: quantifier(map({_literal(v) for v in _members(value, name)}.__contains__, members))
            )
        if word == "is":
            return Predicate(self._parse_presence(name))
        if word == "not":
            self.take("in")
        choices, positive = self._parse_choices(), word == "in"
        keys = frozenset(((name,), literal) for literal in choices) if positive else None
        return Predicate(lambda value: any((_literal(v) in choices) is positive for v in _members(value, name)), keys)

    def _parse_comparison(self, name: str, word: str) -> Predicate:
        compare, wanted = _COMPARE[word], self._parse_value()
        keys = frozenset({((name,), _literal(wanted))}) if word == "=" else None
        return Predicate(lambda value: any(_matches(compare, v, wanted) for v in _members(value, name)), keys)

    def _parse_presence(self, name: str) -> Callable[[Any], bool]:
        positive = self.next != "not"
        if not positive:
            self.take()
        if self.take("defined", "empty") == "defined":
            return lambda value: (isinstance(value, dict) and value.get(name) is not None) is positive
        return lambda value: (not _members(value, name)) is positive

    def _parse_choices(self) -> set[Literal]:
        self.take("(")
        choices = {_literal(self._parse_value())}
        while self.take(",", ")") == ",":
            choices.add(_literal(self._parse_value()))
        return choices

    def _parse_value(self) -> Any:
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
    """Return the values of a field: the members of an array, or the value itself."""
    found = value.get(name) if isinstance(value, dict) else None
    if found is None:
        return []
    return found if isinstance(found, list) else [found]


def _literal(value: Any) -> Literal:
    """Return a hashable key for a value. It distinguishes True from 1, which Python considers equal."""
    return isinstance(value, bool), None if isinstance(value, dict | list) else value


def _matches(compare: Callable[[Any, Any], Any], value: Any, wanted: Any) -> bool:
    if isinstance(value, bool) is not isinstance(wanted, bool):
        return compare is operator.ne
    try:
        return bool(compare(value, wanted))
    except TypeError:
        return False
