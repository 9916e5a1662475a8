"""Parts that the bulk senders share: the interface, the isolation of rejected records, and the fallback."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Protocol, TypeVar

from worker.errors import Rejected, RequestBlocked
from worker.model import Operation, OperationKind, SendResult

if TYPE_CHECKING:
    from collections.abc import Collection

MAX_REJECTIONS = 20  # rejected requests per batch; enough to find two bad records among 1,000 without pointers

R = TypeVar("R")
OperationId = tuple[OperationKind, str]  # kind and key
BulkResult = SendResult | None  # None: unknown, so the operation must be sent individually
SendIndividually = Callable[[Sequence[Operation]], Iterable[SendResult]]


class BulkSender(Protocol):
    """A sender that needs few requests for many operations."""

    def select(self, operations: Sequence[Operation]) -> Collection[OperationId]:
        """Return the ids of the operations to send in bulk. Called once per batch, with the whole batch."""

    def send(self, operations: Sequence[Operation]) -> Sequence[SendResult]:
        """Send selected operations and return their results in the same order."""


def isolate_rejected(
    records: list[R], send: Callable[[list[R]], object], culprits: Callable[[list[R], str], list[R]]
) -> list[R]:
    """Send records in few requests. Return the records that must be sent individually.

    `send` sends a request. It raises Rejected if Klaviyo rejects it, and RequestBlocked if a firewall does. `culprits`
    returns the records that Klaviyo's pointer names. The other records are sent again. If the pointer names no record,
    the records are halved. If every rejection has a pointer, each bad record costs one more request. The maximum is
    2 * MAX_REJECTIONS requests.
    """
    individual: list[R] = []
    unsent = [records]
    rejections = 0
    while unsent:
        part = unsent.pop()
        if rejections and (len(part) <= 1 or rejections == MAX_REJECTIONS):
            individual += part
            continue
        try:
            send(part)
        except (Rejected, RequestBlocked) as rejection:
            rejections += 1
            found = culprits(part, rejection.pointer) if isinstance(rejection, Rejected) else []
            individual += found
            unsent += [_without(found, part)] if found else _halves(part)
    return individual


def _without(excluded: list[R], records: list[R]) -> list[R]:
    ids = set(map(id, excluded))
    return [record for record in records if id(record) not in ids]


def _halves(records: list[R]) -> list[list[R]]:
    middle = len(records) // 2
    return [records[middle:], records[:middle]]


def with_fallback(
    operations: Sequence[Operation], results: Sequence[BulkResult], send_individually: SendIndividually
) -> list[SendResult]:
    """Send the operations with an unknown result individually. Return the results of all operations."""
    unknown = [operation for operation, result in zip(operations, results, strict=True) if result is None]
    individual_results = iter(send_individually(unknown))
    return [next(individual_results) if result is None else result for result in results]
