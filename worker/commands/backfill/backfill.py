"""Wires a backfill: settings, files, clients, stages, and a source of records for a queue."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from worker.commands.backfill.listing import listing
from worker.commands.backfill.progress import Progress
from worker.commands.backfill.queue import Source
from worker.commands.backfill.recorder import Recorder
from worker.commands.backfill.records import as_history
from worker.commands.progress_bar import Pace, shown
from worker.errors import Transient
from worker.pipeline import Pipeline
from worker.runtime.dry_run import print_instead
from worker.runtime.runner import Runner
from worker.service import Components

if TYPE_CHECKING:
    from collections.abc import Sequence

    from worker.commands.backfill.checkpoint import Checkpoint, Failures
    from worker.commands.backfill.listing import Listing
    from worker.commands.backfill.records import Selection
    from worker.commands.backfill.settings import BackfillSettings
    from worker.commands.progress_bar import Screen
    from worker.model import Operation, SendResult


class Backfill:
    """A backfill, ready to run. Raises SettingsError and OSError, when a file cannot be written."""

    def __init__(
        self,
        settings: BackfillSettings,
        selection: Selection,
        *,
        limit: int | None = None,
        checkpoint: Checkpoint | None = None,
        failures: Failures | None = None,
        dry_run: bool = False,
    ) -> None:
        self.progress = checkpoint.load() if checkpoint else Progress()
        kept = (None, None) if dry_run else (checkpoint, failures)
        recorder = Recorder(self.progress, selection.collection.resource_type, *kept)
        recorder.save()
        self._recorder = recorder
        self._selection = selection
        self._limit = limit
        self._stages = stages = Components(settings, recorder)
        self._listing = listing(stages.commercetools, selection, self.progress.last_id)
        self._send = print_instead if dry_run else stages.sender.send
        source = Source(self._listing, selection, recorder, limit)
        pipeline = Pipeline(source, stages.enricher.enrich, self._send_history, stages.mapping, recorder)
        self._runner = Runner(source, pipeline, _sized(settings, selection), recorder, stages.stopping)

    def run(self, screen: Screen) -> Pace:
        """Work until all records have ended, or until `stop`.

        Raises Misconfigured, ShutdownTimeoutError, OSError; however it ends, the checkpoint says how far it came.
        """
        pace = Pace(self._recorder, to_end(self._listing, self._limit))
        try:
            with shown(self._selection.name, pace, screen):
                self._runner.run(once=True, max_wait=math.inf)
        finally:
            self._stages.sender.close()
        return pace

    @property
    def is_interrupted(self) -> bool:
        """Tell whether it was asked to stop."""
        return self._runner.is_stopping()

    def stop(self) -> None:
        """Finish what is in flight and stop; called again: do not wait."""
        self._runner.stop()

    def _send_history(self, operations: Sequence[Operation]) -> Sequence[SendResult]:
        return self._send(list(map(as_history, operations)))


def _sized(settings: BackfillSettings, selection: Selection) -> BackfillSettings:
    """Return settings whose batches show progress in seconds; where events go in bulk, they may be large."""
    if selection.name == "orders" and settings.bulk_events == "always":
        return settings
    return settings.model_copy(update={"max_batch": min(settings.max_batch, selection.collection.batch)})


def to_end(records: Listing, limit: int | None) -> int | None:
    """Return how many records there are to end; None: in an outage of commercetools nobody knows."""
    try:
        number = records.count()
    except Transient:
        return None
    return number if limit is None else min(number, limit)
