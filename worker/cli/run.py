"""`klaviyo-worker run`: the worker itself."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import click

from worker.cli.options import Command, settings_options
from worker.cli.termination import exit_without_waiting, handle_errors, on_signals
from worker.settings import Settings, load

if TYPE_CHECKING:
    from worker.service import Worker


@click.command(cls=Command)
@click.option("--once", is_flag=True, help="Handle what is in the queue, then exit.")
@click.option(
    "--max-wait",
    type=float,
    default=600.0,
    show_default=True,
    metavar="SECONDS",
    help="How long --once waits for what must wait.",
)
@click.option("--dry-run", is_flag=True, help="Print what would be sent; settle nothing. Implies --once.")
@settings_options(Settings)
def run(*, once: bool, max_wait: float, dry_run: bool, **flags: Any) -> None:
    """Read the queue and keep Klaviyo in step with commercetools.

    Runs until SIGTERM or SIGINT: the first finishes what is in flight, the second does not wait for it.

    Secrets have no flag: they come from CT_API_CLIENT, KLAVIYO_AUTH_KEY and, for servicebus://,
    SERVICEBUS_CONNECTION_STRING, or from files named by CT_API_CLIENT_FILE and so on.
    """
    from worker.runtime.runner import ShutdownTimeoutError  # noqa: PLC0415 - keeps --help and publish fast
    from worker.service import Worker  # noqa: PLC0415
    from worker.telemetry.log import configure_logging, log  # noqa: PLC0415

    with handle_errors():
        settings = load(Settings, flags)
        configure_logging(settings.log_level, settings.log_format)
        service: Worker | None = None

        def stop() -> None:
            if service is None:  # the queue has yet to answer, which may take half a minute; nothing is held
                log.info("stopped")
                os._exit(0)
            service.stop()

        on_signals(stop)
        service = Worker(settings, dry_run=dry_run)
        try:
            service.run(once=once or dry_run, max_wait=max_wait)
        except ShutdownTimeoutError as error:
            exit_without_waiting(str(error))
