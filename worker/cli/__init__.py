"""The command line: a file per command, which parses options and calls one function."""

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

_EXIT_CODES = """
\b
Exit codes: 0 ok · 1 unexpected · 2 usage or configuration · 3 queue ·
4 commercetools credentials · 5 Klaviyo credentials · 6 shutdown timed out ·
7 interrupted
"""
_CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 110}


@click.group(cls=Group, epilog=_EXIT_CODES, context_settings=_CONTEXT)
@click.version_option(package_name="klaviyo-worker")
def main() -> None:
    """Keep Klaviyo in step with commercetools: nothing lost, nothing doubled.

    `demo` shows it without any account, `check` tells whether the settings are right, `run` is the worker.
    """


@main.command()
def handlers() -> None:
    """List the notifications that have an effect, and which."""
    from worker.transform import HANDLERS  # noqa: PLC0415

    rows = [("RESOURCE", "NOTIFICATION", "KLAVIYO")]
    rows += [(handler.resource_type, handler.type, handler.effect) for handler in HANDLERS.values()]
    widths = [max(len(row[column]) for row in rows) + 2 for column in (0, 1)]
    for resource, kind, effect in rows:
        click.echo(f"{resource:<{widths[0]}}{kind:<{widths[1]}}{effect}")


@main.command()
@click.option("--keep", type=click.Path(path_type=Path), metavar="DIRECTORY", help="Keep the queue and the log here.")
def demo(*, keep: Path | None) -> None:
    """Show the worker at work, without any account.

    Puts messages of a sample shop into a queue, runs the worker against a stand-in for Klaviyo, and shows what is
    there then.
    """
    from worker.commands.demo import run_demo  # noqa: PLC0415

    sys.exit(run_demo(keep))


dlq.add_command(replay)
for command in (run, check, publish, transform, dlq, subscriptions, backfill):
    main.add_command(command)
