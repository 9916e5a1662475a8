"""Parts that the bulk senders share: their interface, the search for rejected records, the fallback."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Protocol, TypeVar

from worker.errors import Rejected
from worker.model import Operation, OperationKind, SendResult

if TYPE_CHECKING:
    from collections.abc import Collection

MAX_REJECTIONS = 20  # refused calls per batch; enough to find two rejected records among 1,000 without pointers

R = TypeVar("R")
OperationId = tuple[OperationKind, str]  # kind and key
BulkResult = SendResult | None  # None: the bulk call did not decide; the operation must be sent on its own
SendIndividually = Callable[[Sequence[Operation]], Iterable[SendResult]]


class BulkSender(Protocol):
    """A way to send many operations in a few calls."""

    def select(self, operations: Sequence[Operation]) -> Collection[OperationId]:
        """Return the ids of the operations to send in bulk. Called once per batch, with the whole batch."""

    def send(self, operations: Sequence[Operation]) -> Sequence[SendResult]:
        """Send selected operations and return their results in the same order."""


def isolate_rejected(
    records: list[R], send: Callable[[list[R]], object], culprits: Callable[[list[R], str], list[R]]
) -> list[R]:
    """Send records in as few calls as possible; return the records that must be sent on their own.

    `send` raises Rejected if Klaviyo refuses the whole call. `culprits` returns the records that the pointer of the
    refusal names. Without culprits, the records of the call are halved. If every refusal has a pointer, each rejected
    record costs one call more. There are at most 2 * MAX_REJECTIONS calls.
    """
    alone: list[R] = []
    waiting = [records]
    refusals = 0
    while waiting:
        part = waiting.pop()
        if refusals and (len(part) <= 1 or refusals == MAX_REJECTIONS):
            alone += part
            continue
        try:
            send(part)
        except Rejected as refusal:
            refusals += 1
            found = culprits(part, refusal.pointer)
            alone += found
            waiting += [_without(found, part)] if found else _halves(part)
    return alone


def _without(excluded: list[R], records: list[R]) -> list[R]:
    ids = set(map(id, excluded))
    return [record for record in records if id(record) not in ids]


def _halves(records: list[R]) -> list[list[R]]:
    middle = len(records) // 2
    return [records[middle:], records[:middle]]


def with_fallback(
    operations: Sequence[Operation], results: Sequence[BulkResult], send_individually: SendIndividually
) -> list[SendResult]:
    """Send the undecided operations one by one, and return the results of all."""
    undecided = [operation for operation, result in zip(operations, results, strict=True) if result is None]
    others = iter(send_individually(undecided))
    return [next(others) if result is None else result for result in results]
