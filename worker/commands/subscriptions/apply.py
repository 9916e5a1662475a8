"""Applying a plan."""

from __future__ import annotations

from typing import TYPE_CHECKING

from worker.commands.subscriptions.client import Conflict
from worker.commands.subscriptions.plan import plan
from worker.errors import Transient

if TYPE_CHECKING:
    from worker.commands.subscriptions.client import Subscriptions
    from worker.commands.subscriptions.plan import Plan
    from worker.model import Json

MAX_TRIES = 5


def apply(subscriptions: Subscriptions, first: Plan, *, renew: bool) -> Json:
    """Create or change the subscription as planned, and return its new state.

    After a conflict, or a request whose result is unknown, read the subscriptions and plan again.
    Raises the last of these errors after MAX_TRIES. Raises Rejected and CommercetoolsMisconfigured immediately.
    """
    current, last = first, None
    for _ in range(MAX_TRIES):
        try:
            return _execute(subscriptions, current)
        except (Conflict, Transient) as error:
            last = error
            current = plan(first.desired, subscriptions.all(), renew=renew)
    assert last is not None
    raise last


def _execute(subscriptions: Subscriptions, todo: Plan) -> Json:
    if todo.current is None:
        return subscriptions.create(todo.desired.draft())
    updates = todo.updates()
    return subscriptions.update(todo.current, updates) if updates else todo.current
