"""The lanes of a worker, grouped by effect."""

from __future__ import annotations

import time
from itertools import chain
from typing import TYPE_CHECKING

from worker.model import Effect
from worker.runtime.lane import Lane

if TYPE_CHECKING:
    from collections.abc import Iterator
    from threading import Event

    from worker.model import Message
    from worker.pipeline import Pipeline
    from worker.runtime.in_flight import InFlight
    from worker.runtime.lane import LaneCallbacks
    from worker.settings import Settings

# Messages in a batch of events: Klaviyo's profiles are read in requests of 100, and the rate limit for these is the
# first one that the orders of new customers reach (docs/decisions/0035-whose-event.md).
MAX_EVENTS_BATCH = 200


class Lanes:
    """`settings.lanes` lanes for each effect, and one for stock. A resource always has the same lane.

    In the lane for stock, the messages about all SKUs of a new product are in one batch, so the product is written
    once. Its batches are as large as those of the other lanes of an effect together.
    """

    def __init__(
        self, pipeline: Pipeline, in_flight: InFlight, settings: Settings, stopping: Event, callbacks: LaneCallbacks
    ) -> None:
        def lane(name: str, max_batch: int) -> Lane:
            own = settings.model_copy(update={"max_batch": max_batch})
            return Lane(name, pipeline, in_flight, own, stopping, callbacks)

        sizes = dict.fromkeys(Effect, settings.max_batch)
        sizes[Effect.EVENTS] = min(settings.max_batch, MAX_EVENTS_BATCH)
        self._groups = {
            effect: [lane(f"{effect.value}-{number}", size) for number in range(1, settings.lanes + 1)]
            for effect, size in sizes.items()
        }
        self._stock = lane("catalog-stock", settings.max_batch * settings.lanes)

    def __iter__(self) -> Iterator[Lane]:
        yield from chain.from_iterable(self._groups.values())
        yield self._stock

    def start(self) -> None:
        """Start the threads."""
        for lane in self:
            lane.start()

    def put(self, effect: Effect, message: Message) -> None:
        """Put a message into the lane of its resource, in the lanes of an effect."""
        group = self._groups[effect]
        is_stock = message.key[0] == "inventory-entry"
        lane = self._stock if is_stock else group[hash(message.key) % len(group)]
        lane.put(message)

    def end(self) -> None:
        """End the lanes after they have processed their inboxes."""
        for lane in self:
            lane.end()

    def drain_inboxes(self) -> list[Message]:
        """Empty all inboxes and return their messages."""
        return [message for lane in self for message in lane.drain_inbox()]

    def is_any_alive(self) -> bool:
        """Return whether a lane has not ended."""
        return any(lane.is_alive() for lane in self)

    def stall_reason(self) -> str:
        """Return why a lane does not work although it should, or "" if all lanes work."""
        now = time.monotonic()
        return next(filter(None, (lane.stall_reason(now) for lane in self)), "")

    def batch_sizes(self) -> dict[str, list[int]]:
        """Return the number of messages in the current batch of each lane, by effect; 0 if the lane is idle."""
        sizes = {effect.value: [lane.batch_size for lane in group] for effect, group in self._groups.items()}
        sizes[Effect.CATALOG.value].append(self._stock.batch_size)
        return sizes
