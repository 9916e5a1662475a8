"""The backfill: connects records, stages and files."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from worker.commands.backfill.checkpoint import BackfillProgress
from worker.commands.backfill.pages import open_pages
from worker.commands.backfill.queue import RecordQueue
from worker.commands.backfill.recorder import BackfillRecorder
from worker.commands.backfill.records import mark_as_backfill
from worker.commands.progress_bar import Rate, show_progress
from worker.errors import Transient
from worker.pipeline import Pipeline
from worker.runtime.runner import Runner
from worker.service import Components
from worker.telemetry.message_log import Telemetry
from worker.telemetry.metrics import Metrics

if TYPE_CHECKING:
    from collections.abc import Sequence

    from worker.commands.backfill.checkpoint import Checkpoint, FailureLog
    from worker.commands.backfill.pages import RecordPages
    from worker.commands.backfill.records import RecordSelection
    from worker.commands.backfill.settings import BackfillSettings
    from worker.commands.progress_bar import StatusLine
    from worker.mapping import MappingConfig
    from worker.model import Operation, SendResult


class Backfill:
    """A backfill, ready to run. Raises SettingsError, and OSError if a file is not writable."""

    def __init__(
        self,
        settings: BackfillSettings,
        selection: RecordSelection,
        *,
        limit: int | None = None,
        checkpoint: Checkpoint | None = None,
        failure_log: FailureLog | None = None,
        dry_run: bool = False,
    ) -> None:
        self.progress = checkpoint.load() if checkpoint else BackfillProgress()
        files = (None, None) if dry_run else (checkpoint, failure_log)
        recorder = BackfillRecorder(self.progress, selection.kind.resource_type, *files)
        recorder.save()
        telemetry = Telemetry(Metrics("backfill"))
        self._recorder = recorder
        self._selection = selection
        self._limit = limit
        self._components = components = Components(settings, telemetry, dry_run=dry_run)
        self._pages = open_pages(components.commercetools, selection, self.progress.last_id)
        queue = RecordQueue(self._pages, selection, recorder, limit, components.down_reason)
        mapping = without_buyers(components.mapping)
        pipeline = Pipeline(queue, components.enricher.enrich, self._send_marked, mapping, telemetry, recorder)
        in_bulk = selection.name == "orders" and not dry_run and components.bulk_verdict.allows_bulk()
        settings = settings if in_bulk else _limit_batch(settings, selection)
        self._runner = Runner(queue, pipeline, components, settings, telemetry, components.stopping)

    def run(self, status_line: StatusLine) -> Rate:
        """Process records until none remain or `stop` is called. The checkpoint is saved in either case.

        Raises Misconfigured, ShutdownTimeoutError and OSError.
        """
        rate = Rate(lambda: self._recorder.completed, count_remaining(self._pages, self._limit))
        try:
            with show_progress(self._selection.name, rate, status_line):
                self._runner.run(once=True, max_wait=math.inf)
        finally:
            self._components.close()
        return rate

    @property
    def is_interrupted(self) -> bool:
        """Return whether `stop` was called."""
        return self._runner.is_stopping()

    def stop(self) -> None:
        """Finish the messages in flight and stop. A second call stops immediately."""
        self._runner.stop()

    def _send_marked(self, operations: Sequence[Operation]) -> Sequence[SendResult]:
        return self._components.send(list(map(mark_as_backfill, operations)))


def _limit_batch(settings: BackfillSettings, selection: RecordSelection) -> BackfillSettings:
    """Return settings with batches that take only seconds, so that progress is visible."""
    return settings.model_copy(update={"max_batch": min(settings.max_batch, selection.kind.max_batch)})


def without_buyers(mapping: MappingConfig) -> MappingConfig:
    """Return a mapping with which orders write no profiles: they are read in no order of time."""
    return mapping.model_copy(update={"order": mapping.order.model_copy(update={"buyer": "none"})})


def count_remaining(pages: RecordPages, limit: int | None) -> int | None:
    """Return the number of records to process; None if commercetools is unreachable."""
    try:
        number = pages.count()
    except Transient:
        return None
    return number if limit is None else min(number, limit)
