"""What Service Bus keeps with a dead letter: a reason in short, and a description. Written and read here."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime

from adapters.base import Failure

MOST = 4096  # characters of a reason, and of a description
_REASON = re.compile(r"(parse|enrich|transform|send): (\w+)")
_DESCRIPTION = re.compile(
    r"(.*?) ?\([^()]*attempt ([0-9]{1,9}), ([0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z)\)"
)
_BY_POLICY = "MaxDeliveryCountExceeded"
_DELIVERIES = re.compile(r"after ([0-9]{1,9}) delivery attempts")


@dataclass(frozen=True, slots=True)
class Burial:
    """Why, after how many deliveries and when a message was given up on; None for what nobody tells."""

    failure: Failure
    attempt: int | None = None
    at: datetime | None = None


def written(failure: Failure, attempt: int | None, at: datetime) -> tuple[str, str]:
    """Return reason and description: `parse: Rejected`, and a sentence with what else is known. `at` is in UTC."""
    about = {
        "message_type": failure.message_type,
        failure.resource_type or "resource": failure.resource_id,
        "attempt": attempt,
    }
    known = [f"{name} {value}" for name, value in about.items() if value]
    end = f" ({', '.join([*known, f'{at:%Y-%m-%dT%H:%M:%SZ}'])})"
    return f"{failure.stage}: {failure.error}"[:MOST], (failure.reason[: max(MOST - len(end), 0)] + end)[:MOST]


def read(reason: str, description: str) -> Burial:
    """Read reason and description, whoever wrote them: the worker, Service Bus itself, or an operator."""
    reason, description = (" ".join(text.split()) for text in (reason, description))
    if reason == _BY_POLICY:
        told = _DELIVERIES.search(description)
        after = f" after {told[1]} deliveries" if told else ""
        failure = Failure(f"gave up{after}: the worker's log has the reason", "queue", reason)
        return Burial(failure, int(told[1]) if told else None)
    ours = _REASON.fullmatch(reason)
    if ours is None:
        return Burial(Failure(description or reason, "queue" if reason else "", reason))
    if told := _DESCRIPTION.fullmatch(description):
        try:
            return Burial(Failure(told[1], *ours.groups()), int(told[2]), datetime.fromisoformat(told[3]))
        except ValueError:  # there is no such day
            pass
    return Burial(Failure(description, *ours.groups()))
