"""Messages that wait in the worker to be sent back."""

from __future__ import annotations

from queue import SimpleQueue
from threading import Event

from adapters.servicebus.delay_queue import DelayQueue


def test_items_are_released_when_they_are_due_and_not_in_the_order_they_came() -> None:
    """Each by its own delay, however many wait already."""
    released: SimpleQueue[list[str]] = SimpleQueue()
    delay_queue = DelayQueue(10, released.put)
    assert delay_queue.put(["late"], 60.0) == []
    assert delay_queue.put(["second"], 0.2) == []
    assert delay_queue.put(["first"], 0.05) == []
    assert [released.get(timeout=10), released.get(timeout=10)] == [["first"], ["second"]]
    assert delay_queue.items() == ["late"]
    assert released.empty()
    delay_queue.close()


def test_beyond_its_places_what_is_due_first_goes_at_once() -> None:
    """It has waited longest, as a rule."""
    delay_queue: DelayQueue[str] = DelayQueue(2, lambda _: None)
    assert delay_queue.put(["b"], 50.0) == []
    assert delay_queue.put(["a", "c"], 60.0) == ["b"]
    assert delay_queue.put(["d"], 40.0) == ["d"]
    assert sorted(delay_queue.close()) == ["a", "c"]


def test_once_closed_it_holds_nothing() -> None:
    """What is parked during shutdown goes back at once."""
    delay_queue: DelayQueue[str] = DelayQueue(2, lambda _: None)
    delay_queue.put(["a"], 60.0)
    assert delay_queue.close() == ["a"]
    assert delay_queue.close() == []
    assert delay_queue.put(["b"], 60.0) == ["b"]


def test_what_is_being_released_does_not_keep_others_from_being_parked() -> None:
    """Releasing takes round trips."""
    going, go_on = Event(), Event()

    def release(_: list[str]) -> None:
        going.set()
        go_on.wait(10)

    delay_queue = DelayQueue(2, release)
    delay_queue.put(["a"], 0.01)
    assert going.wait(10)
    assert delay_queue.put(["b"], 60.0) == []
    go_on.set()
    assert delay_queue.close() == ["b"]
