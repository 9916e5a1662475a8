"""`klaviyo-worker dlq replay`: processes dead letters in place and removes those that succeed.

Nothing goes back to the queue (docs/decisions/0021-replay-in-place.md).
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass
from itertools import islice, takewhile
from threading import Condition
from typing import TYPE_CHECKING

from adapters import InertQueue, scheme_of
from worker.commands.dlq.dead_letters import iter_unseen
from worker.model import Ending
from worker.pipeline import Pipeline
from worker.runtime.runner import Runner
from worker.service import Components
from worker.telemetry.message_log import Telemetry
from worker.telemetry.metrics import Metrics

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from datetime import datetime

    from adapters import DeadLetter, DeadLetterQueue, Delivery, SupportsDeadLetters
    from worker.commands.dlq.dead_letters import DeadLetterFilter
    from worker.model import Ended
    from worker.settings import Settings

_FAILED = (Ending.DEAD_LETTERED, Ending.RETRIED)  # a replay does not retry
MAX_WAIT = 600.0  # total seconds to wait for outages to end
_MAX_BATCH = 50  # messages; small, so that progress is visible and an interruption takes effect soon


@dataclass(frozen=True, slots=True)
class ReplayOptions:
    """How dead letters are replayed."""

    rate: float | None = None  # maximum dead letters per second
    canary: bool = True  # process dead letters one at a time until one is sent; stop if one fails before that
    dry_run: bool = False  # print the requests; send and remove nothing


@dataclass(frozen=True, slots=True)
class ReplayDelivery:
    """A dead letter as a delivery. The queue counts no attempts of it."""

    dead_letter: DeadLetter

    @property
    def id(self) -> str:
        """Return the id of the dead letter."""
        return self.dead_letter.delivery.id

    @property
    def body(self) -> bytes:
        """Return the message as it was published."""
        return self.dead_letter.delivery.body

    @property
    def attributes(self) -> Mapping[str, str]:
        """Return the attributes of the dead letter."""
        return self.dead_letter.delivery.attributes

    @property
    def attempt(self) -> None:
        """Return None: a replay is no attempt."""
        return

    @property
    def published_at(self) -> datetime | None:
        """Return when the message was published."""
        return self.dead_letter.delivery.published_at


class ReplayStats:
    """Counts of endings, and the reasons for failures. Implements EndingListener."""

    def __init__(self, telemetry: Telemetry) -> None:
        self._telemetry = telemetry
        self.reasons: Counter[tuple[str, str]] = Counter()  # by stage and reason
        self.last_failed: DeadLetter | None = None
        self._changed = Condition()

    def count(self, *endings: Ending) -> int:
        """Return the number of dead letters with one of these endings; of all that have ended if none is given."""
        return sum(self._telemetry.endings[ending] for ending in endings or Ending)

    @property
    def failed(self) -> int:
        """Return the number of dead letters that failed again."""
        return self.count(*_FAILED)

    def on_endings(self, ended: Sequence[Ended]) -> None:
        """Count and log the endings."""
        with self._changed:
            for message, ending in ended:
                if ending in _FAILED and message.outcome:
                    self.reasons[message.outcome.stage, message.outcome.reason] += 1
                    assert isinstance(message.delivery, ReplayDelivery)
                    self.last_failed = message.delivery.dead_letter
            self._telemetry.on_endings(ended)
            self._changed.notify_all()

    def wait_for_endings(self, seconds: float) -> None:
        """Wait at most `seconds` until another dead letter has ended."""
        with self._changed:
            self._changed.wait(seconds)


class ReplayRateLimiter:
    """Spreads deliveries evenly, at most `rate` per second. `wait` sleeps for a number of seconds."""

    def __init__(
        self, rate: float, wait: Callable[[float], object], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._interval = 1 / rate
        self._wait = wait
        self._clock = clock
        self._next = clock()

    def acquire(self) -> None:
        """Wait until the next delivery is allowed."""
        if (delay := self._next - self._clock()) > 0:
            self._wait(delay)
        self._next = max(self._next, self._clock()) + self._interval


class ReplayQueue(InertQueue):
    """The selected dead letters as a finite queue. Implements QueueAdapter.

    With `remove_on_ack`, an ack removes the dead letter. A nack or dead-letter leaves it unchanged.
    """

    def __init__(
        self,
        dead_letters: DeadLetterQueue,
        selected: Iterator[DeadLetter],
        stats: ReplayStats,
        *,
        rate_limiter: ReplayRateLimiter | None,
        canary: bool,
        remove_on_ack: bool,
    ) -> None:
        self._dead_letters = dead_letters
        self._selected = selected
        self._stats = stats
        self._rate_limiter = rate_limiter
        self._canary = canary
        self._remove_on_ack = remove_on_ack
        self._is_exhausted = False
        self._deliveries = 0
        self.delivered_ids: set[str] = set()

    @property
    def canary_failed(self) -> bool:
        """Return whether a dead letter failed before any was sent. Then no more dead letters are delivered."""
        return self._needs_canary and self._stats.failed > 0

    def receive(self, max_messages: int, wait: float) -> Sequence[ReplayDelivery]:
        """Return the next dead letters: one at a time if a rate is set, or until the canary is sent."""
        needs_canary = self._needs_canary
        canary_in_flight = needs_canary and self._deliveries > self._stats.count()
        if self._is_exhausted or self.canary_failed or canary_in_flight:
            self._stats.wait_for_endings(wait)
            return ()
        wanted = 1 if needs_canary or self._rate_limiter else max_messages
        deliveries = [ReplayDelivery(dead_letter) for dead_letter in islice(self._selected, wanted)]
        self._is_exhausted = len(deliveries) < wanted
        if deliveries and self._rate_limiter:
            self._rate_limiter.acquire()
        self._deliveries += len(deliveries)
        self.delivered_ids |= {delivery.id for delivery in deliveries}
        return deliveries

    def ack(self, deliveries: Sequence[Delivery]) -> None:
        """Remove the dead letters. Raises QueueError if some of them possibly still exist."""
        if self._remove_on_ack:
            replayed = (delivery for delivery in deliveries if isinstance(delivery, ReplayDelivery))
            self._dead_letters.remove([delivery.dead_letter for delivery in replayed])

    def backlog(self) -> int:
        """Return 1 while there can be more dead letters to deliver, else 0."""
        return 0 if self._is_exhausted or self.canary_failed else 1

    def close(self) -> None:
        """Release the leases of all remaining dead letters."""
        self._dead_letters.close()

    @property
    def _needs_canary(self) -> bool:
        """Return whether the next dead letter is a canary: none was sent yet. An ignored dead letter sends nothing."""
        return self._canary and not self._stats.count(Ending.SENT)


class Replay:
    """A replay, ready to run. Raises SettingsError and QueueError."""

    def __init__(
        self, queue: SupportsDeadLetters, settings: Settings, filters: DeadLetterFilter, options: ReplayOptions
    ) -> None:
        settings = settings.model_copy(update={"max_batch": min(settings.max_batch, _MAX_BATCH)})
        telemetry = Telemetry(Metrics(scheme_of(settings.queue_url)))
        self.stats = ReplayStats(telemetry)
        self._components = components = Components(settings, telemetry, dry_run=options.dry_run)
        dead_letters = queue.dead_letters()
        until_stopped = takewhile(lambda _: not components.stopping.is_set(), iter_unseen(dead_letters))
        self.queue = ReplayQueue(
            dead_letters,
            filters.select(until_stopped),
            self.stats,
            rate_limiter=ReplayRateLimiter(options.rate, components.stopping.wait) if options.rate else None,
            canary=options.canary and not options.dry_run,
            remove_on_ack=not options.dry_run,
        )
        pipeline = Pipeline(
            self.queue,
            components.enricher.enrich,
            components.send,
            components.mapping,
            telemetry,
            self.stats,
            project=settings.ct_project_id,
        )
        self._runner = Runner(self.queue, pipeline, components, settings, telemetry, components.stopping)

    def run(self) -> None:
        """Replay the selected dead letters. Raises the errors of `Runner.run`."""
        try:
            self._runner.run(once=True, max_wait=MAX_WAIT)
        finally:
            self._components.close()

    def stop(self) -> None:
        """Finish the messages in flight and stop. A second call stops immediately."""
        self._runner.stop()
