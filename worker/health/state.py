"""The condition of a worker on its status page: a state with its severity, reasons and advice."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

    from worker.telemetry.state import WorkerState

_WAIT = "Messages are held and retried; none is lost. The worker resumes by itself: do not restart it."
_FIX = "Fix the cause. No message is lost and the worker resumes by itself; restart it only after replacing a key."
_ADD_SCOPE = "Messages that need the endpoint are held, all others continue. The worker resumes by itself."
_RESTART = "Restart the worker, and please report it."
_STOPPING = "The worker finishes the messages in progress and returns the others to the queue."


class Condition(NamedTuple):
    """The condition of a worker, in words for an operator."""

    state: str  # one word
    severity: str  # good, quiet, warning or bad
    reasons: Sequence[str] = ()
    advice: str = ""


def condition_of(state: WorkerState, *, settled_recently: bool) -> Condition:
    """Return the condition of a worker. If several states apply, return the most important one."""
    outages = [f"{service}: {reason}" for service, reason in state.outage_reasons().items() if reason]
    in_flight = state.in_flight()
    if state.is_stopping():
        return Condition("stopping", "quiet", outages, _STOPPING)
    if stall_reason := state.stall_reason():
        return Condition("stalled", "bad", [stall_reason], _RESTART)
    if parked_reason := state.parked_reason():
        return Condition("parked", "bad", [parked_reason, *outages], _FIX)
    if outages:
        return Condition("paused" if state.paused_reason() else "running", "warning", outages, _WAIT)
    if state.held() and (refused := state.refused_endpoints()):
        return Condition("running", "warning", refused, _ADD_SCOPE)
    if not state.has_received():
        return Condition("starting", "quiet", ["the queue has not answered yet"])
    if not in_flight and not settled_recently:
        return Condition("idle", "quiet", ["the queue has had no messages for this worker in the last minute"])
    return Condition("running", "good")
