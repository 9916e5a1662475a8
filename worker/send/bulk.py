"""What sending needs of Klaviyo's client, and of each other."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Protocol, TypeVar

from worker.errors import Rejected
from worker.model import Operation, OperationKind, SendResult

if TYPE_CHECKING:
    from collections.abc import Collection


MAX_REFUSALS = 20  # of one call's parts; two culprits among 1,000 are found without pointers


R = TypeVar("R")


def isolate_rejected(
    records: list[R], send: Callable[[list[R]], object], blamed: Callable[[list[R], str], list[R]]
) -> list[R]:
    """Send records in as few calls as their culprits allow; return those that are to go alone.

    `send` raises Rejected when what it was given is refused as a whole; `blamed` returns which of it a pointer
    names. With a pointer each, B culprits cost B more calls; never more than 2 * MAX_REFUSALS.
    """
    alone: list[R] = []
    waiting, refusals = [records], 0
    while waiting:
        part = waiting.pop()
        if refusals and (len(part) <= 1 or refusals == MAX_REFUSALS):
            alone += part
            continue
        try:
            send(part)
        except Rejected as refusal:
            refusals += 1
            culprits = blamed(part, refusal.pointer)
            alone += culprits
            waiting += [_except(culprits, part)] if culprits else _halves(part)
    return alone


def _except(culprits: list[R], records: list[R]) -> list[R]:
    left_out = set(map(id, culprits))
    return [record for record in records if id(record) not in left_out]


def _halves(records: list[R]) -> list[list[R]]:
    middle = len(records) // 2
    return [records[middle:], records[:middle]]


class Bulk(Protocol):
    """A way to carry out many operations in few calls."""

    def select(self, operations: Sequence[Operation]) -> Collection[tuple[OperationKind, str]]:
        """Return kind and key of those of a batch that are to go this way; all of a batch are asked for, once."""

    def send(self, operations: Sequence[Operation]) -> Sequence[SendResult]:
        """Carry out operations that were chosen; return what became of each, in their order."""


OneByOne = Callable[[Sequence[Operation]], Iterable[SendResult]]


def with_fallback(
    operations: Sequence[Operation], verdicts: Sequence[SendResult | None], one_by_one: OneByOne
) -> list[SendResult]:
    """Carry out one by one what a bulk call left without a verdict (None), and return all results."""
    alone = [operation for operation, verdict in zip(operations, verdicts, strict=True) if verdict is None]
    rest = iter(one_by_one(alone))
    return [next(rest) if verdict is None else verdict for verdict in verdicts]
