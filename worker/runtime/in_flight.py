"""The messages in flight: received and not settled. Each effect has a budget of them."""

from __future__ import annotations

import math
import time
from datetime import UTC, datetime
from threading import Condition
from typing import TYPE_CHECKING

from worker.model import Effect
from worker.runtime.budget import SLOW, Budget

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from adapters.base import Delivery
    from worker.model import Message

_SLOW = {Effect.CARTS: math.inf}  # pulling never waits long for carts: orders are possibly behind them
_Name = tuple[str, bytes]  # id and body: a backfill has several messages of a record with the same id


class InFlight:
    """The messages in flight of all lanes. Thread-safe.

    `max_messages` and `max_bytes` apply to each effect. `max_delay` is the maximum number of seconds for which a
    message beyond the budget goes back to the queue.
    """

    def __init__(
        self, max_messages: int, max_bytes: int, max_delay: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._clock = clock
        self._budgets = {
            effect: Budget(max_messages, max_bytes, max_delay, _SLOW.get(effect, SLOW)) for effect in Effect
        }
        self._messages: dict[Message, None] = {}  # in the order of their arrival
        self._by_name: dict[_Name, Message] = {}
        self._resources: dict[tuple[str, str], _Resource] = {}
        self._changed = Condition()

    def __len__(self) -> int:
        return len(self._messages)

    def messages(self) -> list[Message]:
        """Return all messages in flight."""
        with self._changed:
            return list(self._messages)

    def renew(self, delivery: Delivery) -> bool:
        """Return whether the message of this delivery is in flight. If so, this delivery replaces its previous one.

        The queue has redelivered the message because its lease, or its push request, ended before it was settled. The
        redelivery of a message that is just being nacked is a new message.
        """
        with self._changed:
            message = self._by_name.get((delivery.id, delivery.body))
            if message is None or message.is_returned:
                return False
            message.delivery = delivery
            return True

    def add(self, message: Message) -> Effect:
        """Add a message. Return the effect whose lanes must process it.

        It is the effect of the message, unless an earlier message of the resource is in flight in other lanes: the
        messages of a resource are processed in order.
        """
        delivery = message.delivery
        with self._changed:
            self._messages[message] = None
            self._by_name[delivery.id, delivery.body] = message
            self._budgets[message.effect].add(len(delivery.body), self._clock())
            resource = self._resources.setdefault(message.key, _Resource(message.effect))
            resource.messages += 1
            return resource.effect

    def remove(self, messages: Sequence[Message]) -> None:
        """Remove messages that were settled. Ignore those that are not in flight."""
        with self._changed:
            now = self._clock()
            for message in messages:
                if message in self._messages:
                    del self._messages[message]
                    name = message.delivery.id, message.delivery.body
                    if self._by_name[name] is message:
                        del self._by_name[name]
                    self._budgets[message.effect].remove(len(message.delivery.body), now)
                    self._leave(message.key)
            self._changed.notify_all()

    def wait_for_capacity(self, seconds: float, *, skip_slow: bool) -> int:
        """Return how many messages can be received, so that none exceeds the budget of its effect.

        With `skip_slow`, the budgets of slow effects do not count. If the number is 0, first wait at most `seconds`
        until a message is settled.
        """
        with self._changed:
            if self._capacity(skip_slow=skip_slow) == 0:
                self._changed.wait(seconds)
            return self._capacity(skip_slow=skip_slow)

    def slow_effects(self) -> list[Effect]:
        """Return the effects whose budgets are full for long."""
        with self._changed:
            now = self._clock()
            return [effect for effect, budget in self._budgets.items() if budget.is_slow(now)]

    def is_beyond_budget(self, message: Message) -> bool:
        """Return whether a message must go back to the queue: the budget of its effect is full, and the effect slow."""
        with self._changed:
            budget = self._budgets[message.effect]
            return not budget.room and budget.is_slow(self._clock())

    def return_delay(self, effect: Effect, messages: int) -> float:
        """Return the seconds for which messages beyond the budget of an effect must go back to the queue."""
        with self._changed:
            return self._budgets[effect].return_delay(messages, self._clock())

    def wait_for_change(self, seconds: float) -> None:
        """Wait at most `seconds` until a message is settled."""
        with self._changed:
            self._changed.wait(seconds)

    def wake(self) -> None:
        """End all waits."""
        with self._changed:
            self._changed.notify_all()

    def held(self) -> int:
        """Count the messages that are held, or are retried after they were held."""
        return sum(message.due_at > 0 for message in self.messages())

    def has_only_held(self) -> bool:
        """Return whether every message is held. True without messages."""
        return all(message.due_at > 0 for message in self.messages())

    def oldest_age(self) -> float | None:
        """Return the number of seconds since the oldest message was published: 0 without messages, None if unknown."""
        messages = self.messages()
        published = [message.delivery.published_at for message in messages if message.delivery.published_at is not None]
        if not published:
            return None if messages else 0.0
        return max((datetime.now(UTC) - min(published)).total_seconds(), 0.0)  # clocks can differ

    def _capacity(self, *, skip_slow: bool) -> int:
        now = self._clock()
        budgets = (budget for budget in self._budgets.values() if not (skip_slow and budget.is_slow(now)))
        return min((budget.room for budget in budgets), default=0)

    def _leave(self, key: tuple[str, str]) -> None:
        self._resources[key].messages -= 1
        if not self._resources[key].messages:
            del self._resources[key]


class _Resource:
    """The messages of a resource in flight: their number, and the effect whose lanes process them."""

    __slots__ = ("effect", "messages")

    def __init__(self, effect: Effect) -> None:
        self.effect = effect
        self.messages = 0
