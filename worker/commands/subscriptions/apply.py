"""Carries a plan out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from worker.commands.subscriptions.client import Conflict
from worker.commands.subscriptions.plan import plan
from worker.errors import Transient

if TYPE_CHECKING:
    from worker.commands.subscriptions.client import Subscriptions
    from worker.commands.subscriptions.plan import Plan
    from worker.model import Json

TRIES = 5


def apply(subscriptions: Subscriptions, first: Plan, *, renew: bool) -> Json:
    """Create or change the subscription as planned, and return it as it is then.

    Where somebody else was first, or nobody knows whether a request arrived, it is read and planned again.
    Raises the last of these after TRIES; Rejected and CommercetoolsMisconfigured at once.
    """
    todo, last = first, None
    for _ in range(TRIES):
        try:
            return _carried_out(subscriptions, todo)
        except (Conflict, Transient) as error:
            last = error
            todo = plan(first.wanted, subscriptions.all(), renew=renew)
    assert last is not None
    raise last


def _carried_out(subscriptions: Subscriptions, todo: Plan) -> Json:
    if todo.current is None:
        return subscriptions.create(todo.wanted.draft())
    updates = todo.updates()
    return subscriptions.update(todo.current, updates) if updates else todo.current
