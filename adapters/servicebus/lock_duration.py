"""The duration of Service Bus locks, estimated from two clocks that can differ."""

from __future__ import annotations

import logging
from datetime import UTC, datetime
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from azure.servicebus import ServiceBusReceivedMessage

log = logging.getLogger("klaviyo_worker.servicebus")

MIN_LOCK, MAX_LOCK = 5.0, 300.0  # seconds that a lock of Service Bus can last
NEVER = datetime.max.replace(tzinfo=UTC)


class LockDuration:
    """The duration of a queue's locks, estimated from its messages, which hold the end of their lock."""

    def __init__(self) -> None:
        self.seconds = MIN_LOCK  # until a message arrives, and while the local clock is wrong
        self._clock_offset = 0.0  # minimum number of seconds by which the local clock is behind
        self._is_wrong = False

    def update(self, messages: Sequence[ServiceBusReceivedMessage]) -> None:
        """Use the remaining time of the lock that ends last, because the other messages have possibly waited longer.

        Overestimating the duration means losing locks. Implausible values therefore reset it to the minimum: a
        message enqueued in the future, or a lock that lasts longer than the maximum.
        """
        now = datetime.now(UTC)
        enqueued = [(at - now).total_seconds() for at in (message.enqueued_time_utc for message in messages) if at]
        ends = [(end - now).total_seconds() for end in map(lock_end, messages) if end]
        if not ends:
            return
        self._clock_offset = max(self._clock_offset, *enqueued)
        seconds = max(ends) - self._clock_offset
        is_wrong = not 0 < seconds <= MAX_LOCK
        if is_wrong:  # the clock is wrong, or it was and has just been corrected
            self._clock_offset = 0.0
        if is_wrong and not self._is_wrong:
            reason = f"a lock seems to end in {seconds:.0f} s: the clock of this machine is wrong, set it"
            log.warning("clock_skew", extra={"reason": reason})
        self._is_wrong = is_wrong
        self.seconds = MIN_LOCK if is_wrong else seconds


def lock_end(message: ServiceBusReceivedMessage) -> datetime | None:
    """Return when a lock ends; None if that is unknown or the message is settled."""
    end = message.locked_until_utc
    return None if end == NEVER else end


def ignore_local_expiry(message: ServiceBusReceivedMessage) -> None:
    """Stop the SDK from checking the lock by a wrong local clock, which would prevent settling a locked message."""
    message._expiry = NEVER  # noqa: SLF001 - there is no other way
