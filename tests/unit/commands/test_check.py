"""`klaviyo-worker check` reports the advice of errors and warnings, independently of their wording."""

from __future__ import annotations

import pytest

from adapters import QueueError, QueueWarning
from tests.unit.test_enrich import CountingReader
from worker.commands.check import checks
from worker.commands.check.check_result import make_failure
from worker.errors import ExitCode, KlaviyoMisconfigured, SettingsError, WorkerError


@pytest.mark.parametrize("kind", [KlaviyoMisconfigured, QueueError, QueueWarning, SettingsError, WorkerError])
def test_advice_is_structured(kind: type[WorkerError]) -> None:
    """`check` does not depend on the wording of the advice."""
    problem = kind("the key is refused", todo="replace the key")
    assert str(problem) == "the key is refused: replace the key"
    result = make_failure("klaviyo", ExitCode.KLAVIYO, problem, default_todo="try again later")
    assert (result.text, result.todo) == ("the key is refused", "replace the key")


def test_reason_with_colons_is_not_advice() -> None:
    """A reason with a verb after a colon is not truncated."""
    problem = QueueError("cannot reach the queue: set by peer")
    result = make_failure("queue", ExitCode.QUEUE, problem, default_todo="check the network")
    assert (result.text, result.todo) == ("cannot reach the queue: set by peer", "check the network")


def test_advice_of_several_problems_is_listed_once() -> None:
    """Two policies that one command sets have one advice."""
    problems = [QueueWarning("no dead-letter policy", "set both"), QueueWarning("no retry policy", "set both")]
    result = make_failure("queue", ExitCode.QUEUE, *problems, default_todo="")
    assert (result.text, result.todo) == ("no dead-letter policy; no retry policy", "set both")


def test_settings_error_keeps_its_problems_apart() -> None:
    """Several malformed settings are one error with a line for each."""
    problems = [SettingsError("A is missing", todo="set it"), SettingsError("B is malformed")]
    error = SettingsError.joined(problems)
    assert str(error) == "A is missing: set it\nB is malformed"
    assert error.problems == tuple(problems)
    assert problems[0].problems == (problems[0],)


@pytest.mark.parametrize(
    ("resources", "expected"),
    [
        ({"cart"}, "orders, carts, customers, categories, product-projections"),
        ({"order", "OrderPaymentAdded"}, "orders, payments, customers, categories, product-projections"),
        ({"order"}, "orders, customers, categories, product-projections"),
    ],
)
def test_what_the_handlers_read_is_read(resources: set[str], expected: str) -> None:
    """The check makes the queries of the worker, so a missing scope is found before the first message."""
    reader = CountingReader({})
    assert checks._check_commercetools(reader, resources) == f"can read {expected}"
    assert reader.queries.keys() >= set(expected.split(", "))
