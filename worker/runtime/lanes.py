"""The lanes of a worker, grouped by effect."""

from __future__ import annotations

import time
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


class Lanes:
    """`settings.lanes` lanes for each effect. A resource always has the same lane, and so has all stock."""

    def __init__(
        self, pipeline: Pipeline, in_flight: InFlight, settings: Settings, stopping: Event, callbacks: LaneCallbacks
    ) -> None:
        self._groups = {
            effect: [
                Lane(f"{effect.value}-{number}", pipeline, in_flight, settings, stopping, callbacks)
                for number in range(1, settings.lanes + 1)
            ]
            for effect in Effect
        }

    def __iter__(self) -> Iterator[Lane]:
        return (lane for group in self._groups.values() for lane in group)

    def start(self) -> None:
        """Start the threads."""
        for lane in self:
            lane.start()

    def put(self, effect: Effect, message: Message) -> None:
        """Put a message into the lane of its resource, in the lanes of an effect."""
        group = self._groups[effect]
        group[hash(message.lane_key) % len(group)].put(message)

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
        return {effect.value: [lane.batch_size for lane in group] for effect, group in self._groups.items()}
