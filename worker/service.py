"""Wires the worker: settings -> clients -> stages -> runner."""

from __future__ import annotations

from threading import Event
from typing import TYPE_CHECKING

from adapters import open_queue
from worker.commercetools import Commercetools
from worker.dryrun import Peek, print_instead
from worker.enrich import Enricher
from worker.klaviyo import Klaviyo
from worker.pipeline import Pipeline
from worker.runner import Runner
from worker.send import Sender
from worker.telemetry import Telemetry, log

if TYPE_CHECKING:
    from adapters import QueueAdapter
    from worker.settings import Settings


class Service:
    """A worker, ready to run. Raises SettingsError and QueueError."""

    def __init__(self, settings: Settings, *, dry_run: bool = False, telemetry: Telemetry | None = None) -> None:
        mapping = settings.mapping()
        stopping = Event()
        queue = open_queue(settings.queue_url, settings.queue_options)
        for warning in queue.check():
            log.warning("queue_warning", extra={"reason": warning})
        reader = Commercetools(settings, stopping)
        enricher = Enricher(reader, mapping, catalog_ttl=settings.catalog_ttl)
        self._sender = Sender(Klaviyo(settings, stopping), settings.concurrency)
        self._telemetry = telemetry or Telemetry()
        source: QueueAdapter = Peek(queue, settings.max_in_flight) if dry_run else queue
        send = print_instead if dry_run else self._sender.send
        pipeline = Pipeline(source, enricher.enrich, send, mapping, self._telemetry)
        self._runner = Runner(source, pipeline, settings, self._telemetry, stopping)

    def run(self, *, once: bool, max_wait: float) -> None:
        """Work until stopped, or with `once` until the queue is empty; see Runner.run for what it raises."""
        log.info("started")
        try:
            self._runner.run(once=once, max_wait=max_wait)
        finally:
            self._sender.close()
            log.info("stopped", extra=dict(self._telemetry.outcomes))

    def stop(self) -> None:
        """Finish what is in flight and stop; called again: do not wait."""
        self._runner.stop()
