"""`klaviyo-worker dlq replay`: dead letters handled as messages are, here, and removed once their effect is there.

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
from worker.commands.dlq.dead_letters import through
from worker.pipeline import Pipeline
from worker.runtime.dry_run import print_instead
from worker.runtime.runner import Runner
from worker.service import Components
from worker.telemetry.message_log import Telemetry, outcome_name
from worker.telemetry.metrics import Metrics

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from datetime import datetime

    from adapters import DeadLetter, DeadLetterQueue, Delivery, SupportsDeadLetters
    from worker.commands.dlq.dead_letters import Choice
    from worker.model import Message
    from worker.settings import Settings

_FAILED = ("dead_lettered", "retried")  # outcomes, where dead letters are replayed
MAX_WAIT = 600.0  # seconds, in all, to wait for an outage to end
_BATCH = 50  # messages in a batch, at most: so that progress is seen, and an interruption does not wait long


@dataclass(frozen=True, slots=True)
class Options:
    """How dead letters are replayed."""

    rate: float | None = None  # letters a second, at most
    canary: bool = True  # one by one, until the first has its effect; not one more if it fails again
    dry_run: bool = False  # print what would be sent; send and remove nothing


@dataclass(frozen=True, slots=True)
class Again:
    """A dead letter as a delivery: of no known attempt, so that no event of it is taken for new."""

    letter: DeadLetter

    @property
    def id(self) -> str:
        """The dead letter's."""
        return self.letter.delivery.id

    @property
    def body(self) -> bytes:
        """The message as it was published."""
        return self.letter.delivery.body

    @property
    def attributes(self) -> Mapping[str, str]:
        """The dead letter's."""
        return self.letter.delivery.attributes

    @property
    def attempt(self) -> None:
        """Not counted."""
        return

    @property
    def published_at(self) -> datetime | None:
        """The dead letter's."""
        return self.letter.delivery.published_at


class Tally(Telemetry):
    """Counts the endings, and why letters failed again."""

    def __init__(self, metrics: Metrics) -> None:
        super().__init__(metrics)
        self.reasons: Counter[tuple[str, str]] = Counter()  # by stage and reason
        self.last_failed: DeadLetter | None = None
        self._changed = Condition()

    @property
    def ended(self) -> int:
        """Count the letters that were handed out and have ended, whichever way."""
        return self.outcomes.total()

    @property
    def failed(self) -> int:
        """Count those that failed again."""
        return sum(self.outcomes[outcome] for outcome in _FAILED)

    def settled(self, jobs: Iterable[Message]) -> None:
        """Count endings."""
        jobs = list(jobs)
        with self._changed:
            for job in jobs:
                if job.outcome and outcome_name(job) in _FAILED:
                    self.reasons[job.outcome.stage, job.outcome.reason] += 1
                    self.last_failed = job.delivery.letter if isinstance(job.delivery, Again) else None
            super().settled(jobs)
            self._changed.notify_all()

    def wait(self, seconds: float) -> None:
        """Wait until letters have ended."""
        with self._changed:
            self._changed.wait(seconds)


class Throttle:
    """Lets letters through evenly, `rate` a second at most. `wait` takes seconds."""

    def __init__(
        self, rate: float, wait: Callable[[float], object], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._interval = 1 / rate
        self._wait = wait
        self._clock = clock
        self._next = clock()

    def turn(self) -> None:
        """Wait until one more may go."""
        if (ahead := self._next - self._clock()) > 0:
            self._wait(ahead)
        self._next = max(self._next, self._clock()) + self._interval


class ReplayQueue(InertQueue):
    """The chosen dead letters as a queue that ends. Implements QueueAdapter.

    What is acked is removed; all else stays a dead letter.
    """

    def __init__(
        self,
        letters: DeadLetterQueue,
        chosen: Iterator[DeadLetter],
        tally: Tally,
        *,
        pace: Throttle | None,
        canary: bool,
        removes: bool,
    ) -> None:
        self._letters = letters
        self._chosen = chosen
        self._tally = tally
        self._pace = pace
        self._canary = canary
        self._removes = removes
        self._has_ended = False
        self.handed_out: set[str] = set()
        self._number = 0  # of letters handed out

    @property
    def has_stopped(self) -> bool:
        """Tell whether the canary failed: no more letters are handed out."""
        return self._is_alone and self._tally.failed > 0

    def receive(self, max_messages: int, wait: float) -> Sequence[Again]:
        """Hand out the next letters: one where the pace or the canary asks for that."""
        is_alone = self._is_alone
        if self._has_ended or self.has_stopped or (is_alone and self._number > self._tally.ended):
            self._tally.wait(wait)
            return ()
        wanted = 1 if is_alone or self._pace else max_messages
        found = [Again(letter) for letter in islice(self._chosen, wanted)]
        self._has_ended = len(found) < wanted
        if found and self._pace:
            self._pace.turn()
        self._number += len(found)
        self.handed_out |= {again.id for again in found}
        return found

    def ack(self, deliveries: Sequence[Delivery]) -> None:
        """Remove the letters. Raises QueueError when that cannot be told."""
        if self._removes:
            self._letters.remove([again.letter for again in deliveries if isinstance(again, Again)])

    def backlog(self) -> int:
        """Return 1 while there may be more letters to hand out, 0 when there are none."""
        return 0 if self._has_ended or self.has_stopped else 1

    def close(self) -> None:
        """Leave all others as they were."""
        self._letters.close()

    @property
    def _is_alone(self) -> bool:
        """Tell whether letters go one by one, as none had its effect yet: one with nothing to do proves nothing."""
        return self._canary and not self._tally.outcomes["sent"]


class Replay:
    """A replay, ready to run. Raises SettingsError and QueueError."""

    def __init__(self, queue: SupportsDeadLetters, settings: Settings, choice: Choice, options: Options) -> None:
        settings = settings.model_copy(update={"max_batch": min(settings.max_batch, _BATCH)})
        self.tally = Tally(Metrics(scheme_of(settings.queue_url)))
        self._stages = stages = Components(settings, self.tally)
        letters = queue.dead_letters()
        until_stopped = takewhile(lambda _: not stages.stopping.is_set(), through(letters))
        self.queue = ReplayQueue(
            letters,
            choice.of(until_stopped),
            self.tally,
            pace=Throttle(options.rate, stages.stopping.wait) if options.rate else None,
            canary=options.canary and not options.dry_run,
            removes=not options.dry_run,
        )
        send = print_instead if options.dry_run else stages.sender.send
        pipeline = Pipeline(self.queue, stages.enricher.enrich, send, stages.mapping, self.tally)
        self._runner = Runner(self.queue, pipeline, settings, self.tally, stages.stopping)

    def run(self) -> None:
        """Replay until there are no more. Raises what Runner.run does with `once`."""
        try:
            self._runner.run(once=True, max_wait=MAX_WAIT)
        finally:
            self._stages.sender.close()

    def stop(self) -> None:
        """Finish what is in flight and stop; called again: do not wait."""
        self._runner.stop()
