"""The reason and the description that Service Bus keeps with a dead letter."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime

from adapters.base import Failure

MAX_CHARACTERS = 4096  # of a reason, and of a description
_REASON = re.compile(r"(parse|enrich|transform|send): (\w+)")
_DESCRIPTION = re.compile(
    r"(.*?) ?\([^()]*attempt ([0-9]{1,9}), ([0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z)\)"
)
_BY_POLICY = "MaxDeliveryCountExceeded"
_DELIVERIES = re.compile(r"after ([0-9]{1,9}) delivery attempts")


@dataclass(frozen=True, slots=True)
class ParsedReason:
    """Why a message was dead-lettered, after how many deliveries, and when; None if unknown."""

    failure: Failure
    attempt: int | None = None
    at: datetime | None = None


def format_reason(failure: Failure, attempt: int | None, at: datetime) -> tuple[str, str]:
    """Return a reason, such as `parse: Rejected`, and a description with all other details. `at` is in UTC."""
    details = {
        "message_type": failure.message_type,
        failure.resource_type or "resource": failure.resource_id,
        "attempt": attempt,
    }
    known = [f"{name} {value}" for name, value in details.items() if value]
    end = f" ({', '.join([*known, f'{at:%Y-%m-%dT%H:%M:%SZ}'])})"
    description = failure.reason[: max(MAX_CHARACTERS - len(end), 0)] + end
    return f"{failure.stage}: {failure.error}"[:MAX_CHARACTERS], description[:MAX_CHARACTERS]


def parse_reason(reason: str, description: str) -> ParsedReason:
    """Parse a reason and a description, written by the worker, Service Bus or an operator."""
    reason, description = (" ".join(text.split()) for text in (reason, description))
    if reason == _BY_POLICY:
        match = _DELIVERIES.search(description)
        after = f" after {match[1]} deliveries" if match else ""
        failure = Failure(f"dead-lettered by the queue{after}: the worker's log has the reason", "queue", reason)
        return ParsedReason(failure, int(match[1]) if match else None)
    by_worker = _REASON.fullmatch(reason)
    if by_worker is None:
        return ParsedReason(Failure(description or reason, "queue" if reason else "", reason))
    if match := _DESCRIPTION.fullmatch(description):
        try:
            at = datetime.fromisoformat(match[3])
            return ParsedReason(Failure(match[1], *by_worker.groups()), int(match[2]), at)
        except ValueError:  # not a valid date
            pass
    return ParsedReason(Failure(description, *by_worker.groups()))
