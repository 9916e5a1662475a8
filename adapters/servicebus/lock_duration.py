"""For how long a lock of Service Bus lasts, as far as two clocks tell that nobody compares."""

from __future__ import annotations

import logging
from datetime import UTC, datetime
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from azure.servicebus import ServiceBusReceivedMessage

log = logging.getLogger("klaviyo_worker.servicebus")

SHORTEST_LEASE, LONGEST_LEASE = 5.0, 300.0  # seconds a lock of Service Bus lasts
NEVER = datetime.max.replace(tzinfo=UTC)


class Lease:
    """Learnt from messages, which tell when their locks end, by the clock of Service Bus."""

    def __init__(self) -> None:
        self.seconds = SHORTEST_LEASE  # until a message came, and while the clock here is plainly wrong
        self._behind = 0.0  # seconds that the clock here is behind that of Service Bus, at least
        self._is_wrong = False

    def note(self, messages: Sequence[ServiceBusReceivedMessage]) -> None:
        """Take the last of these locks for how long one lasts: others may have waited for a while.

        A lease that is taken for too long is lost, so nothing that cannot be is believed: that a message was stored
        later than now, or that a lock lasts longer than any.
        """
        now = datetime.now(UTC)
        stored = [(at - now).total_seconds() for at in (message.enqueued_time_utc for message in messages) if at]
        ends = [(end - now).total_seconds() for end in map(lock_end, messages) if end]
        if not ends:
            return
        self._behind = max(self._behind, *stored)
        seconds = max(ends) - self._behind
        is_wrong = not 0 < seconds <= LONGEST_LEASE
        if is_wrong:  # or was, and is set right now
            self._behind = 0.0
        if is_wrong and not self._is_wrong:
            reason = f"a lock seems to end in {seconds:.0f} s: the clock of this machine is wrong, set it"
            log.warning("clock_skew", extra={"reason": reason})
        self._is_wrong = is_wrong
        self.seconds = SHORTEST_LEASE if is_wrong else seconds


def lock_end(message: ServiceBusReceivedMessage) -> datetime | None:
    """Return when a lock ends; None when that is unknown or the message is settled."""
    end = message.locked_until_utc
    return None if end == NEVER else end


def let_service_judge(message: ServiceBusReceivedMessage) -> None:
    """Keep the SDK from taking a lock for ended by the clock here: it would refuse to settle what is done."""
    message._expiry = NEVER  # noqa: SLF001 - there is no other way
