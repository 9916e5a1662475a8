"""`klaviyo-worker check`: whether the worker may do its work."""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

import click

from worker.cli.options import Command, settings_options
from worker.errors import ExitCode
from worker.settings import Settings, load


@click.command(cls=Command)
@click.option("--json", "as_json", is_flag=True, help="One JSON line per check.")
@click.option("--probe-bulk", is_flag=True, help="Find out whether KLAVIYO_WORKER_BULK_EVENTS=always is safe; writes.")
@click.option(
    "--probe-wait",
    type=click.FloatRange(min=0, min_open=True),
    default=120.0,
    show_default=True,
    metavar="SECONDS",
    help="How long the events of the probe are given to show.",
)
@click.option(
    "--subscription-key",
    default="klaviyo-worker",
    show_default=True,
    metavar="KEY",
    help="Key of the commercetools subscription.",
)
@settings_options(Settings)
def check(*, as_json: bool, probe_bulk: bool, probe_wait: float, subscription_key: str, **flags: Any) -> None:
    """Tell whether the worker may do its work, service by service.

    OK, FAIL why → what to do, or SKIP for what this API client may not see. Exits with the code of the first that
    failed: 2 configuration, 3 queue, 4 commercetools, 5 Klaviyo, refused or out of reach. Nothing is written, and
    no message is received.

    --probe-bulk does write to the Klaviyo account: one profile (name "klaviyo-worker probe", external id
    klaviyo-worker-probe, no email, no consent) and, each time, three events of the metric "klaviyo-worker probe".
    It needs the scopes profiles:read and events:read too, takes up to three times --probe-wait, and exits with 1
    when it cannot tell. To remove what it wrote: search Klaviyo for the profile by its name, then Profile actions,
    Delete profile.
    """
    from worker.commands.check.checks import check as findings  # noqa: PLC0415

    exit_code: int = ExitCode.OK
    say = partial(click.echo, err=True)
    for finding in findings(partial(load, Settings, flags), subscription_key, probe_wait if probe_bulk else None, say):
        click.echo(finding.json() if as_json else finding.line())
        exit_code = exit_code or finding.exit_code
    sys.exit(exit_code)
