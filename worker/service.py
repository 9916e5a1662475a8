"""The wiring of the worker: it creates clients, stages and the runner from the settings."""

from __future__ import annotations

import gc
import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.metadata import version
from threading import Event
from typing import TYPE_CHECKING

from adapters import open_queue, scheme_of
from worker.commercetools.cache import CachedReader
from worker.commercetools.client import MAX_CONCURRENT_QUERIES, Commercetools
from worker.enrich import Enricher
from worker.health.access import Access
from worker.health.running_worker import RunningWorkerState
from worker.health.server import HealthServer
from worker.health.status import Status
from worker.health.systemd import Notifier
from worker.klaviyo.client import REVISION, Klaviyo
from worker.pipeline import Pipeline
from worker.runtime.downtime import Downtime
from worker.runtime.dry_run import DryRunQueue, print_instead
from worker.runtime.runner import Runner
from worker.send import Sender, SendOptions
from worker.send.background import SenderWithBackground
from worker.send.bulk_verdict import BulkVerdict
from worker.telemetry.log import log
from worker.telemetry.message_log import Telemetry
from worker.telemetry.metrics import Metrics

if TYPE_CHECKING:
    from adapters import QueueAdapter
    from worker.pipeline import Send
    from worker.settings import Settings

STOP_WAIT_SHARE = 0.8  # of the grace period: how long bulk jobs are waited for. The rest is for settling the messages


class Components:
    """The clients and stages of a worker, without its queue. Raises SettingsError.

    In a dry run, `send` prints the operations.
    """

    def __init__(self, settings: Settings, telemetry: Telemetry, *, dry_run: bool = False) -> None:
        self.stopping = Event()
        self.mapping = settings.mapping()
        record_request = telemetry.metrics.record_request
        self.commercetools = Commercetools(settings, self.stopping, partial(record_request, "commercetools"))
        self.klaviyo = Klaviyo(settings, self.stopping, partial(record_request, "klaviyo"))
        self._downtimes = [Downtime(self.commercetools), Downtime(self.klaviyo)]
        brand = self.mapping.order.brand_attribute
        cached_reader = CachedReader(self.commercetools, settings.cache_ttl, (brand,))
        self._queries = ThreadPoolExecutor(MAX_CONCURRENT_QUERIES, thread_name_prefix="commercetools")
        self.enricher = Enricher(cached_reader, self.mapping, self._queries)
        # The verdict has its own client: that it cannot be read is no outage for any message.
        self.bulk_verdict = BulkVerdict(Klaviyo(settings, self.stopping), settings.bulk_events)
        options = SendOptions(
            settings.bulk_threshold,
            settings.job_timeout,
            stop_wait=settings.shutdown_grace_period * STOP_WAIT_SHARE,
            merges_guests=self.mapping.customer.merge_guests,
            resubscribes=self.mapping.consent.resubscribe,
        )
        sender = partial(
            Sender,
            max_requests=settings.max_requests,
            stopping=self.stopping,
            options=options,
            allows_bulk_events=self.bulk_verdict.allows_bulk,
        )
        self.sender = SenderWithBackground(sender(self.klaviyo), sender(self.klaviyo.background()))
        self.send: Send = print_instead if dry_run else self.sender.send

    def close(self) -> None:
        """Cancel the operations that have not started. Do not wait for the others."""
        self.bulk_verdict.close()
        self._queries.shutdown(wait=False, cancel_futures=True)
        self.sender.close()

    def refusal_reason(self) -> str:
        """Return why a service refuses the worker, or "" if both accept it."""
        return self.commercetools.refusal_reason() or self.klaviyo.refusal_reason()

    def down_reason(self) -> str:
        """Return why a service as a whole is down, so that no message can be processed; "" if both are up."""
        return next(filter(None, (downtime.reason() for downtime in self._downtimes)), "")


class Worker:
    """A worker that is ready to run. Raises SettingsError and QueueError."""

    def __init__(self, settings: Settings, *, dry_run: bool = False, telemetry: Telemetry | None = None) -> None:
        self._telemetry = telemetry or Telemetry(Metrics(scheme_of(settings.queue_url)))
        self._components = components = Components(settings, self._telemetry, dry_run=dry_run)
        queue = open_queue(settings.queue_url, settings.queue_options)
        for warning in queue.check():
            log.warning("queue_warning", extra={"reason": str(warning)})
        source: QueueAdapter = DryRunQueue(queue, settings.max_in_flight) if dry_run else queue
        pipeline = Pipeline(
            source,
            components.enricher.enrich,
            components.send,
            components.mapping,
            self._telemetry,
            project=settings.ct_project_id,
        )
        self._runner = Runner(source, pipeline, components, settings, self._telemetry, components.stopping)
        self._state = RunningWorkerState(
            self._runner,
            queue,
            settings.threads,
            components.commercetools,
            components.klaviyo,
            components.bulk_verdict.status,
        )
        self._telemetry.metrics.observe_worker(self._state)
        self._telemetry.metrics.set_build_info(version("klaviyo-worker"), REVISION)
        self._systemd = Notifier(self._state, os.environ)
        self._settings = settings
        self._dry_run = dry_run

    def run(self, *, once: bool, max_wait: float) -> str:
        """Run until `stop` is called, or with `once` until the queue is empty. See Runner.run for result and errors."""
        _collect_garbage_less_often()
        health = self._serve() if self._settings.http_port and not once else None
        if not once:
            self._systemd.start()
        log.info("started")
        if not self._dry_run:
            self._components.bulk_verdict.start()
        try:
            return self._runner.run(once=once, max_wait=max_wait)
        finally:
            self._components.close()
            if health:
                health.stop()
            self._systemd.stop()
            log.info("stopped", extra={ending.value: number for ending, number in self._telemetry.endings.items()})

    def stop(self) -> None:
        """Stop pulling and finish the messages in progress. If called again, do not wait for these messages."""
        self._runner.stop()

    def _serve(self) -> HealthServer | None:
        """Serve probes, metrics and the status page. If the port is unavailable, the worker runs without them."""
        settings = self._settings
        password = settings.http_password.get_secret_value()
        access = Access(settings.http_host, password, settings.http_tls_certificate, settings.http_tls_key)
        port = settings.http_port
        has_status_page = settings.status_page == "on"
        status = Status(settings, self._state, self._telemetry) if has_status_page else None
        server = HealthServer(access, port, self._telemetry.metrics, self._state, status)
        try:
            server.start()
        except OSError as error:
            hint = "check KLAVIYO_WORKER_HTTP_HOST, and give each worker its own KLAVIYO_WORKER_HTTP_PORT (0: none)"
            reason = f"{error.strerror}: {hint}"
            log.warning("http_port_unavailable", extra={"host": access.host, "port": port, "reason": reason})
            return None
        return server


def _collect_garbage_less_often() -> None:
    """Let the garbage collector run rarely and ignore the objects created at startup.

    The search for reference cycles costs CPU, and decoded JSON contains no cycles.
    """
    gc.freeze()
    gc.set_threshold(200_000, 10, 50)
