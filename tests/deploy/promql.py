"""A check of PromQL expressions against the metrics of a worker."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import promql_parser as promql
from prometheus_client.parser import text_string_to_metric_families

if TYPE_CHECKING:
    from collections.abc import Mapping

TARGET = frozenset(
    {"namespace", "pod", "container", "job", "instance"}
)  # labels that Prometheus adds to a pod's series
_SUFFIXES = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count"), "gauge": ("",)}
_COUNTER_FUNCTIONS = {"rate", "increase"}


@dataclass
class Series:
    """The series with one name."""

    is_counter: bool
    values: dict[str, set[str]] = field(default_factory=dict)  # by label


def exposed(text: str) -> dict[str, Series]:
    """Return the series of a scrape by name. A metric without samples has no labels."""
    series: dict[str, Series] = {}
    for family in text_string_to_metric_families(text):
        for suffix in _SUFFIXES[family.type]:
            series[family.name + suffix] = Series(family.type != "gauge")
        for sample in family.samples:
            for label, value in sample.labels.items():
                series[sample.name].values.setdefault(label, set()).add(value)
    return series


def labels_of(expression: str, series: Mapping[str, Series]) -> set[str]:
    """Return the labels of the result. Raises ValueError for unknown names, and for operands that can never match."""
    return _Check(series).labels(promql.parse(expression)) or set()


class _Check:
    """A walk through an expression. The labels of a scalar are None."""

    def __init__(self, series: Mapping[str, Series]) -> None:
        self._series = series

    def labels(self, expr: Any) -> set[str] | None:
        match expr:
            case promql.VectorSelector():
                return self._selector(expr, as_counter=False)
            case promql.AggregateExpr():
                return self._aggregate(expr)
            case promql.BinaryExpr():
                return self._binary(expr)
            case promql.Call():
                return self._call(expr)
            case promql.ParenExpr() | promql.UnaryExpr():
                return self.labels(expr.expr)
            case promql.NumberLiteral():
                return None
        raise ValueError(f"an expression of an unexpected kind: {expr.prettify()}")

    def _selector(self, selector: Any, *, as_counter: bool) -> set[str]:
        found = self._series.get(selector.name)
        if found is None:
            raise ValueError(f"no metric is named {selector.name}")
        if found.is_counter != as_counter:
            raise ValueError(
                f"{selector.name} is {'a' if found.is_counter else 'not a'} counter: rate and increase require one"
            )
        for matcher in selector.matchers.matchers:
            if matcher.name not in TARGET:
                _match(selector.name, matcher, found.values.get(matcher.name, set()))
        return {*found.values, *TARGET}

    def _call(self, call: Any) -> set[str] | None:
        if call.func.name == "time":
            return None
        if call.func.name == "vector":
            return set()
        *_, argument = call.args
        if isinstance(argument, promql.MatrixSelector):
            return self._selector(argument.vector_selector, as_counter=call.func.name in _COUNTER_FUNCTIONS)
        labels = self.labels(argument)
        if call.func.name != "histogram_quantile":
            return labels
        _require_labels({"le"}, labels)
        return (labels or set()) - {"le"}

    def _aggregate(self, aggregate: Any) -> set[str]:
        inner = self.labels(aggregate.expr)
        if aggregate.modifier is None:
            return set()
        by = set(aggregate.modifier.labels)
        _require_labels(by, inner)
        return by

    def _binary(self, expr: Any) -> set[str] | None:
        left, right = self.labels(expr.lhs), self.labels(expr.rhs)
        if left is None or right is None:
            return right if left is None else left
        if expr.modifier is not None and expr.modifier.matching is not None:
            _require_labels(set(expr.modifier.matching.labels), left, right)
        elif left != right:
            raise ValueError(f"can never match: {sorted(left)} and {sorted(right)} in {expr.prettify()}")
        return left


def _match(name: str, matcher: Any, values: set[str]) -> None:
    is_pattern = matcher.op in (promql.MatchOp.Re, promql.MatchOp.NotRe)  # not hashable
    for wanted in matcher.value.split("|") if is_pattern else [matcher.value]:
        if not any(re.fullmatch(wanted, value) if is_pattern else wanted == value for value in values):
            raise ValueError(f'{name} has no {matcher.name}="{wanted}"; it has {sorted(values)}')


def _require_labels(wanted: set[str], *sides: set[str] | None) -> None:
    for labels in sides:
        if missing := wanted - (labels or set()):
            raise ValueError(f"no label {sorted(missing)} among {sorted(labels or ())}")
