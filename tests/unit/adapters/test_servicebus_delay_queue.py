"""The delay queue of nacked messages."""

from __future__ import annotations

from queue import SimpleQueue
from threading import Event

from adapters.servicebus.delay_queue import DelayQueue


def test_items_are_released_when_due() -> None:
    """Each item is released after its own delay, independently of the order of arrival."""
    released: SimpleQueue[list[str]] = SimpleQueue()
    delay_queue = DelayQueue(10, released.put)
    assert delay_queue.put(["late"], 60.0) == []
    assert delay_queue.put(["second"], 0.2) == []
    assert delay_queue.put(["first"], 0.05) == []
    assert [released.get(timeout=60), released.get(timeout=60)] == [["first"], ["second"]]
    assert delay_queue.items() == ["late"]
    assert released.empty()
    delay_queue.close()


def test_full_queue_releases_item_that_is_due_first() -> None:
    """This item has usually waited longest."""
    delay_queue: DelayQueue[str] = DelayQueue(2, lambda _: None)
    assert delay_queue.put(["b"], 50.0) == []
    assert delay_queue.put(["a", "c"], 60.0) == ["b"]
    assert delay_queue.put(["d"], 40.0) == ["d"]
    assert sorted(delay_queue.close()) == ["a", "c"]


def test_closed_queue_accepts_no_items() -> None:
    """A message that is nacked during shutdown is released immediately."""
    delay_queue: DelayQueue[str] = DelayQueue(2, lambda _: None)
    delay_queue.put(["a"], 60.0)
    assert delay_queue.close() == ["a"]
    assert delay_queue.close() == []
    assert delay_queue.put(["b"], 60.0) == ["b"]


def test_release_in_progress_does_not_block_put() -> None:
    """Releasing takes round trips."""
    releasing, proceed = Event(), Event()

    def release(_: list[str]) -> None:
        releasing.set()
        proceed.wait(60)

    delay_queue = DelayQueue(2, release)
    delay_queue.put(["a"], 0.01)
    assert releasing.wait(60)
    assert delay_queue.put(["b"], 60.0) == []
    proceed.set()
    assert delay_queue.close() == ["b"]
