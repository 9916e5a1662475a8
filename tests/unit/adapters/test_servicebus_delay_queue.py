"""Messages that wait in the worker to be sent back."""

from __future__ import annotations

from queue import SimpleQueue
from threading import Event

from adapters.servicebus.delay_queue import Parking


def test_items_are_released_when_they_are_due_and_not_in_the_order_they_came() -> None:
    """Each by its own delay, however many wait already."""
    released: SimpleQueue[list[str]] = SimpleQueue()
    parking = Parking(10, released.put)
    assert parking.park(["late"], 60.0) == []
    assert parking.park(["second"], 0.2) == []
    assert parking.park(["first"], 0.05) == []
    assert [released.get(timeout=10), released.get(timeout=10)] == [["first"], ["second"]]
    assert parking.parked() == ["late"]
    assert released.empty()
    parking.close()


def test_beyond_its_places_what_is_due_first_goes_at_once() -> None:
    """It has waited longest, as a rule."""
    parking: Parking[str] = Parking(2, lambda _: None)
    assert parking.park(["b"], 50.0) == []
    assert parking.park(["a", "c"], 60.0) == ["b"]
    assert parking.park(["d"], 40.0) == ["d"]
    assert sorted(parking.close()) == ["a", "c"]


def test_once_closed_it_holds_nothing() -> None:
    """What is parked during shutdown goes back at once."""
    parking: Parking[str] = Parking(2, lambda _: None)
    parking.park(["a"], 60.0)
    assert parking.close() == ["a"]
    assert parking.close() == []
    assert parking.park(["b"], 60.0) == ["b"]


def test_what_is_being_released_does_not_keep_others_from_being_parked() -> None:
    """Releasing takes round trips."""
    going, go_on = Event(), Event()

    def release(_: list[str]) -> None:
        going.set()
        go_on.wait(10)

    parking = Parking(2, release)
    parking.park(["a"], 0.01)
    assert going.wait(10)
    assert parking.park(["b"], 60.0) == []
    go_on.set()
    assert parking.close() == ["b"]
