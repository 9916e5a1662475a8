"""How a worker is, in a word, why, and what is to be done about it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from worker.telemetry.state import WorkerState

_WAIT = "Messages are kept and tried again, none is lost. It goes on by itself: nothing is to be restarted."
_MEND = "Mend that. No message is lost, and it goes on by itself; only a key that was replaced needs a restart."


def condition(state: WorkerState, *, settled_lately: bool) -> dict[str, object]:
    """Return `word`, `level` (good, quiet, warning, bad), `why` (sentences) and `advice` ("" when there is none)."""
    outages = [f"{service}: {reason}" for service, reason in state.outage_reasons().items() if reason]
    in_flight = state.in_flight()
    word, level, why, advice = "running", "good", outages, _WAIT if outages else ""
    if state.is_stopping():
        word, level, advice = "stopping", "quiet", "It finishes what is in work and returns the rest to the queue."
    elif not state.is_alive():
        word, level, why = "stalled", "bad", ["the receive loop does not come round"]
        advice = "Restart the worker, and please report it."
    elif parked := state.parked_reason():
        word, level, why, advice = "parked", "bad", [parked, *outages], _MEND
    elif outages:
        word, level = "paused" if 0 < in_flight <= state.held() else "running", "warning"
    elif not state.has_polled():
        word, level, why = "starting", "quiet", ["the queue has not answered yet"]
    elif not in_flight and not settled_lately:
        word, level, why = "idle", "quiet", ["the queue has had nothing for this worker within a minute"]
    return {"word": word, "level": level, "why": why, "advice": advice}
