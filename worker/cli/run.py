"""`klaviyo-worker run`: the worker."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import click

from worker.cli.options import Command, settings_options
from worker.cli.termination import CommandError, exit_without_waiting, handle_errors, on_signals
from worker.errors import ExitCode
from worker.setting_sources import load
from worker.settings import Settings, unknown_variables

if TYPE_CHECKING:
    from worker.service import Worker


@click.command(cls=Command)
@click.option(
    "--once",
    is_flag=True,
    help="Process the messages on the queue, then exit: with 0 if no message is left, otherwise with 6.",
)
@click.option(
    "--max-wait",
    type=float,
    default=600.0,
    show_default=True,
    metavar="SECONDS",
    help="How long --once waits in total for messages that are held, or that the queue redelivers later.",
)
@click.option("--dry-run", is_flag=True, help="Print the requests. Send and settle nothing. Implies --once.")
@settings_options(Settings)
def run(*, once: bool, max_wait: float, dry_run: bool, **option_values: Any) -> None:
    """Process the messages on the queue and update Klaviyo.

    Runs until SIGTERM or SIGINT. After the first signal, the worker finishes the messages in flight. After a second
    signal, it exits without waiting for them.

    Secrets have no options. Set CT_API_CLIENT, KLAVIYO_AUTH_KEY and, for servicebus://, SERVICEBUS_CONNECTION_STRING,
    or set CT_API_CLIENT_FILE and so on to the path of a file that contains the value.
    """
    from worker.runtime.runner import ShutdownTimeoutError  # noqa: PLC0415 - keeps --help and publish fast
    from worker.service import Worker  # noqa: PLC0415
    from worker.telemetry.log import configure_logging, log  # noqa: PLC0415

    with handle_errors():
        settings = load(Settings, option_values)
        configure_logging(settings.log_level, settings.log_format)
        for warning in unknown_variables(os.environ):
            log.warning("unknown_setting", extra={"reason": warning})
        worker: Worker | None = None

        def stop() -> None:
            if worker is None:  # opening the queue can take half a minute, and no message is held yet
                log.info("stopped")
                os._exit(0)
            worker.stop()

        on_signals(stop)
        worker = Worker(settings, dry_run=dry_run)
        try:
            left = worker.run(once=once or dry_run, max_wait=max_wait)
        except ShutdownTimeoutError as error:
            exit_without_waiting(str(error))
        if left and not dry_run:
            raise CommandError(f"{left}: run the command again to process them", ExitCode.UNFINISHED)
