"""How a worker is, in a word, why, and what is to be done about it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from worker.klaviyo.rate_limits import Standing

_WAIT = "Messages are kept and tried again, none is lost. It goes on by itself: nothing is to be restarted."
_MEND = "Mend that. No message is lost, and it goes on by itself; only a key that was replaced needs a restart."


class State(Protocol):
    """What a running worker tells about itself, from any thread."""

    def has_begun(self) -> bool:
        """Tell whether the receive loop has come round."""

    def is_alive(self) -> bool:
        """Tell whether the receive loop comes round."""

    def is_stopping(self) -> bool:
        """Tell whether the worker was asked to stop."""

    def parked(self) -> str:
        """Return why the worker is not allowed to work; "" when it is."""

    def outages(self) -> Mapping[str, str]:
        """Return for each service why it cannot answer; "" when it can."""

    def in_flight(self) -> int:
        """Count the messages received and not yet settled."""

    def waiting(self) -> int:
        """Count those of them that could not be handled yet."""

    def oldest_age(self) -> float | None:
        """Return how many seconds ago the oldest of them was published: 0 without any, None if unknown."""

    def backlog(self) -> int | None:
        """Count the messages in the queue; None when it cannot tell."""

    def dead_letters(self) -> int | None:
        """Count the dead letters; None when the queue cannot tell."""

    def at_work(self) -> Mapping[str, Sequence[int]]:
        """Count the messages that each lane handles now, by what lanes are for."""

    def limits(self) -> Mapping[str, Standing]:
        """Return how Klaviyo's limits stand, by endpoint."""


def condition(state: State, *, settled_lately: bool) -> dict[str, object]:
    """Return `word`, `level` (good, quiet, warning, bad), `why` (sentences) and `advice` ("" when there is none)."""
    outages = [f"{service}: {reason}" for service, reason in state.outages().items() if reason]
    in_flight = state.in_flight()
    word, level, why, advice = "running", "good", outages, _WAIT if outages else ""
    if state.is_stopping():
        word, level, advice = "stopping", "quiet", "It finishes what is in work and returns the rest to the queue."
    elif not state.is_alive():
        word, level, why = "stalled", "bad", ["the receive loop does not come round"]
        advice = "Restart the worker, and please report it."
    elif parked := state.parked():
        word, level, why, advice = "parked", "bad", [parked, *outages], _MEND
    elif outages:
        word, level = "paused" if 0 < in_flight <= state.waiting() else "running", "warning"
    elif not state.has_begun():
        word, level, why = "starting", "quiet", ["the queue has not answered yet"]
    elif not in_flight and not settled_lately:
        word, level, why = "idle", "quiet", ["the queue has had nothing for this worker within a minute"]
    return {"word": word, "level": level, "why": why, "advice": advice}
