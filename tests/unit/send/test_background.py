"""Background events: sent once by a process, with a sender of their own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from worker.errors import Transient
from worker.model import Operation, OperationKind, SendResult
from worker.send import background
from worker.send.background import SenderWithBackground

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pytest


class Recorder:
    """A sender that records the keys, and fails for those in `failing`."""

    def __init__(self) -> None:
        self.sent: list[str] = []
        self.failing: set[str] = set()
        self.is_closed = False

    def send(self, operations: Sequence[Operation]) -> list[SendResult]:
        self.sent += [operation.key for operation in operations]
        return [SendResult(Transient("down") if each.key in self.failing else None, 1) for each in operations]

    def close(self) -> None:
        self.is_closed = True


def event(key: str, *, background: bool = True) -> Operation:
    return Operation(OperationKind.CREATE_EVENT, key, {}, background=background)


def test_each_kind_has_its_own_sender() -> None:
    """The results are in the order of the operations."""
    orders, carts = Recorder(), Recorder()
    carts.failing = {"b"}
    results = SenderWithBackground(orders, carts).send([event("a"), event("o", background=False), event("b")])
    assert (orders.sent, carts.sent) == (["o"], ["a", "b"])
    assert [result.error is None for result in results] == [True, True, False]


def test_event_is_sent_until_klaviyo_accepts_it() -> None:
    """A cart changes with every click. Other events are sent again, as Klaviyo ignores repeats."""
    orders, carts = Recorder(), Recorder()
    sender = SenderWithBackground(orders, carts)
    carts.failing = {"a"}
    assert sender.send([event("a")])[0].error is not None
    carts.failing.clear()
    for _ in range(3):
        assert [result.error for result in sender.send([event("a"), event("o", background=False)])] == [None, None]
    assert (orders.sent, carts.sent) == (["o"] * 3, ["a", "a"])


def test_other_operations_are_sent_together() -> None:
    """A batch of orders has no background events."""
    orders, carts = Recorder(), Recorder()
    assert len(SenderWithBackground(orders, carts).send([event("o", background=False)] * 2)) == 2
    assert (orders.sent, carts.sent) == (["o", "o"], [])


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """An event that was sent long ago is sent again. Klaviyo ignores it."""
    monkeypatch.setattr(background, "MAX_REMEMBERED", 2)
    carts = Recorder()
    sender = SenderWithBackground(Recorder(), carts)
    for key in ("a", "b", "a", "c", "a", "b"):
        sender.send([event(key)])
    assert carts.sent == ["a", "b", "c", "b"]


def test_closing_closes_both() -> None:
    """No thread is left."""
    senders = Recorder(), Recorder()
    SenderWithBackground(*senders).close()
    assert all(sender.is_closed for sender in senders)
