"""The messages in flight: their budgets, the order of a resource, redeliveries."""

from __future__ import annotations

import threading
from itertools import count

import pytest

from tests.conftest import FakeDelivery
from worker.model import Effect, Message, Notification
from worker.runtime.in_flight import InFlight

_ids = count()


class Clock:
    """A clock that a test sets."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def message(resource_type: str, resource_id: str = "1", kind: str = "ResourceUpdated") -> Message:
    delivery = FakeDelivery(b"x", str(next(_ids)))
    return Message(delivery, 0.0, Notification(kind, resource_type, resource_id, None, {}))


def deletion(resource_id: str = "1") -> Message:
    return message("customer", resource_id, "ResourceDeleted")


@pytest.mark.parametrize(
    ("given", "effect"),
    [
        (message("order"), Effect.EVENTS),
        (message("payment"), Effect.EVENTS),
        (message("customer"), Effect.PROFILES),
        (deletion(), Effect.DELETIONS),
        (message("category", kind="ResourceDeleted"), Effect.CATALOG),
        (message("product"), Effect.CATALOG),
        (message("inventory-entry"), Effect.CATALOG),
        (message("standalone-price"), Effect.CATALOG),
        (message("cart"), Effect.CARTS),
        (Message(FakeDelivery(b"unreadable"), 0.0), Effect.EVENTS),
    ],
)
def test_effect_of_a_message(given: Message, effect: Effect) -> None:
    """Deletions of profiles are separate, because Klaviyo accepts only 60 a minute."""
    assert given.effect is effect


def test_full_budget_of_a_fast_effect_pauses_pulling() -> None:
    """The next message can belong to that effect."""
    in_flight = InFlight(2, 1000, 600.0, Clock())
    assert in_flight.wait_for_capacity(0, skip_slow=True) == 2
    in_flight.add(message("product"))
    assert in_flight.wait_for_capacity(0, skip_slow=True) == 1
    product = message("product")
    in_flight.add(product)
    assert in_flight.wait_for_capacity(0, skip_slow=True) == 0
    in_flight.remove([product, product])
    assert in_flight.wait_for_capacity(0, skip_slow=True) == 1


def test_full_budget_of_a_slow_effect_does_not_pause_pulling() -> None:
    """Its own messages are beyond the budget, those of other effects are not."""
    clock = Clock()
    in_flight = InFlight(2, 1000, 600.0, clock)
    in_flight.add(deletion("1"))
    in_flight.add(deletion("2"))
    clock.now = 20.0
    assert in_flight.slow_effects() == [Effect.DELETIONS]
    assert in_flight.wait_for_capacity(0, skip_slow=True) == 2
    assert in_flight.wait_for_capacity(0, skip_slow=False) == 0
    assert in_flight.is_beyond_budget(deletion("3"))
    assert not in_flight.is_beyond_budget(message("customer"))
    assert in_flight.return_delay(Effect.DELETIONS, 1) == 180.0


def test_pulling_pauses_if_all_effects_are_slow() -> None:
    """Every message would go back to the queue and use up an attempt."""
    clock = Clock()
    in_flight = InFlight(1, 1000, 600.0, clock)
    for given in (message("order"), message("customer"), deletion("2"), message("product"), message("cart")):
        in_flight.add(given)
    clock.now = 20.0
    assert len(in_flight.slow_effects()) == 5
    assert in_flight.wait_for_capacity(0, skip_slow=True) == 0


def test_wait_for_capacity_ends_when_a_message_is_settled() -> None:
    """The receive loop does not poll."""
    in_flight = InFlight(1, 1000, 600.0)
    order = message("order")
    in_flight.add(order)
    capacities: list[int] = []
    waiting = threading.Thread(target=lambda: capacities.append(in_flight.wait_for_capacity(60, skip_slow=True)))
    waiting.start()
    in_flight.remove([order])
    waiting.join(60)
    assert capacities == [1]


def test_messages_of_a_customer_stay_in_the_lanes_of_the_first() -> None:
    """A deletion must not overtake an update that is in flight, and an update must not overtake a deletion."""
    in_flight = InFlight(9, 1000, 600.0)
    update, erasure, last = message("customer"), deletion(), message("customer")
    assert in_flight.add(update) is Effect.PROFILES
    assert in_flight.add(erasure) is Effect.PROFILES
    assert in_flight.add(deletion("2")) is Effect.DELETIONS
    in_flight.remove([update])
    assert in_flight.add(last) is Effect.PROFILES
    in_flight.remove([erasure, last])
    assert in_flight.add(deletion()) is Effect.DELETIONS
    assert in_flight.add(message("customer")) is Effect.DELETIONS


def test_redelivery_replaces_the_delivery_of_a_message_in_flight() -> None:
    """A message with another body is another message, even if its delivery has the same id."""
    in_flight = InFlight(9, 1000, 600.0)
    order = message("order")
    in_flight.add(order)
    again = FakeDelivery(b"x", order.delivery.id, attempt=2)
    assert in_flight.renew(again)
    assert order.delivery is again
    assert not in_flight.renew(FakeDelivery(b"y", order.delivery.id))
    in_flight.remove([order])
    assert not in_flight.renew(again)
    assert len(in_flight) == 0


def test_redelivery_during_a_nack_is_a_new_message() -> None:
    """Otherwise it would be forgotten with the nacked message, until its lease ends."""
    in_flight = InFlight(1, 1000, 600.0)
    order = message("order")
    in_flight.add(order)
    order.is_returned = True
    redelivery = FakeDelivery(b"x", order.delivery.id, attempt=2)
    assert not in_flight.renew(redelivery)
    redelivered = Message(redelivery, 0.0, order.notification)
    in_flight.add(redelivered)
    in_flight.remove([order, order])
    assert in_flight.messages() == [redelivered]
    assert in_flight.renew(redelivery)
    in_flight.remove([redelivered])
    assert in_flight.wait_for_capacity(0.0, skip_slow=False) == 1


def test_held_messages_are_counted() -> None:
    """A message was held if it has a time for its retry."""
    in_flight = InFlight(9, 1000, 600.0)
    assert (in_flight.held(), in_flight.has_only_held()) == (0, True)
    held, new = message("order"), message("order")
    held.due_at = 1.0
    in_flight.add(held)
    assert (in_flight.held(), in_flight.has_only_held()) == (1, True)
    in_flight.add(new)
    assert (in_flight.held(), in_flight.has_only_held()) == (1, False)
