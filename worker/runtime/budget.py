"""The budget of an effect: how many messages, and how many bytes of them, can be in flight."""

from __future__ import annotations

import math
from collections import deque

REFILL_SHARE = 0.9  # of the budget; a budget that was full counts as full until less than this is in use
BATCH_TIMEOUT = 20.0  # seconds for which pulling waits for an effect whose budget is full: a batch can take as long
MAX_BATCH_TIMEOUT = 60.0  # seconds; the limit for an effect whose batches take longer, because of its bulk jobs
FULL_TIMEOUT = 5.0  # the same for an effect that was slow until recently
MEMORY = 60.0  # seconds since the budget was full for which the rate of that time is remembered
KNOWN_RATE = 9  # settled messages from which the rate of an effect is known
DELAY_FACTOR = 9.0  # times the seconds since the budget was full: the delay of messages while the rate is unknown
SLOW = 10.0  # settled messages per second; pulling does not wait long for an effect that is slower


class Budget:
    """The messages of one effect that are in flight, and their limits. All times are monotonic seconds.

    Pulling pauses while a budget is full, because the next message can belong to the effect. It does not pause for an
    effect that is slow, because of a rate limit or an outage: otherwise the other effects would wait for it. The
    messages of a slow effect that are beyond its budget go back to the queue, each until it is probably its turn.

    An effect is slow if it settles less than `slow` messages per second. Because whole batches are settled at once, it
    counts as slow only when the budget has been full for longer than a batch takes.
    """

    def __init__(self, max_messages: int, max_bytes: int, max_delay: float, slow: float = SLOW) -> None:
        self._max_messages = max_messages
        self._max_bytes = max_bytes
        self._max_delay = max_delay
        self._slow = slow
        self._messages = 0
        self._bytes = 0
        self._full_since: float | None = None
        self._settled = 0  # messages since the budget was last full, or became full
        self._last_full: tuple[float, float] | None = None  # from when to when it was full before
        self._first_timeout = self._timeout = FULL_TIMEOUT if math.isinf(slow) else BATCH_TIMEOUT
        self._returned: deque[float] = deque()  # when the queue redelivers each message beyond the budget

    @property
    def room(self) -> int:
        """Return the number of messages that are within the budget. The last one can exceed the limit of bytes."""
        return max(self._max_messages - self._messages, 0) if self._bytes < self._max_bytes else 0

    def add(self, size: int, now: float) -> None:
        """Count a message of `size` bytes."""
        self._messages += 1
        self._bytes += size
        if not self.room and self._full_since is None:
            self._learn(now)
            self._full_since, self._settled = now, 0

    def remove(self, size: int, now: float) -> None:
        """Count a message of `size` bytes as settled."""
        self._messages -= 1
        self._bytes -= size
        self._settled += 1
        is_full = self._messages >= REFILL_SHARE * self._max_messages or self._bytes >= REFILL_SHARE * self._max_bytes
        if self._full_since is not None and not is_full:
            self._last_full, self._full_since = (self._full_since, now), None

    def _learn(self, now: float) -> None:
        """Learn from the last time that the budget was full how fast the effect is, and how long its batches take."""
        since, until = self._last_full or (0.0, -math.inf)
        if now - until > MEMORY:
            self._timeout = self._first_timeout
        elif self._settled < self._slow * (now - since):
            self._timeout = FULL_TIMEOUT
        else:
            self._timeout = max(BATCH_TIMEOUT, min(2 * (until - since), MAX_BATCH_TIMEOUT))

    def is_slow(self, now: float) -> bool:
        """Return whether pulling must not wait until the budget has room."""
        elapsed = now - self._full_since if self._full_since is not None else 0.0
        return elapsed >= self._timeout and self._settled < self._slow * elapsed

    def return_delay(self, messages: int, now: float) -> float:
        """Return the seconds for which messages beyond the budget must go back to the queue.

        That is the time until the effect has settled as many messages as were returned before and are not redelivered
        yet, at the rate since its budget was full. If it has settled too few to know a rate, it is a multiple of the
        time since then: an effect that recovers soon gets its messages soon, and an outage of an hour costs three
        attempts. It is at most `max_delay`.
        """
        while self._returned and self._returned[0] <= now:
            self._returned.popleft()
        ahead = len(self._returned) + messages
        elapsed = now - self._full_since if self._full_since is not None else 0.0
        estimate = ahead * elapsed / self._settled if self._settled >= KNOWN_RATE else DELAY_FACTOR * elapsed
        delay = min(max(estimate, 1.0), self._max_delay)
        self._returned.extend([now + delay] * messages)
        return delay
