"""The command line. Each command has a file that parses options and calls one function of worker/commands."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from worker.cli.backfill import backfill
from worker.cli.check import check
from worker.cli.dlq import dlq
from worker.cli.dlq_replay import replay
from worker.cli.options import Group
from worker.cli.publish import publish
from worker.cli.run import run
from worker.cli.subscriptions import subscriptions
from worker.cli.transform import transform
from worker.errors import ExitCode

_EXIT_CODES = "\b\nExit codes:\n" + "\n".join(f"  {code}  {code.meaning}" for code in ExitCode)
_CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 110}


@click.group(cls=Group, epilog=_EXIT_CODES, context_settings=_CONTEXT)
@click.version_option(package_name="klaviyo-worker")
def main() -> None:
    """Send changes in commercetools to Klaviyo, without losing messages or duplicating their effects.

    `demo` needs no account, `check` verifies the settings, `run` starts the worker.
    """


@main.command()
def handlers() -> None:
    """List the notifications that have an effect in Klaviyo."""
    from worker.transform import HANDLERS  # noqa: PLC0415

    rows = [("RESOURCE", "NOTIFICATION", "KLAVIYO")]
    rows += [(handler.resource_type, handler.type, handler.summary) for handler in HANDLERS.values()]
    widths = [max(len(row[column]) for row in rows) + 2 for column in (0, 1)]
    for resource, kind, effect in rows:
        click.echo(f"{resource:<{widths[0]}}{kind:<{widths[1]}}{effect}")


@main.command()
@click.option(
    "--keep", type=click.Path(path_type=Path), metavar="DIRECTORY", help="Keep the queue and the log in this directory."
)
def demo(*, keep: Path | None) -> None:
    """Run the worker against emulators, without any account.

    Publishes messages of a sample shop to a queue, runs the worker against emulators of commercetools and Klaviyo,
    and prints the resulting content of Klaviyo.
    """
    from worker.commands.demo import run_demo  # noqa: PLC0415

    sys.exit(run_demo(keep))


dlq.add_command(replay)
for command in (run, check, publish, transform, dlq, subscriptions, backfill):
    main.add_command(command)
