"""`klaviyo-worker check`: verify the set-up."""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

import click

from worker.cli.options import Command, settings_options
from worker.errors import ExitCode
from worker.setting_sources import load
from worker.settings import Settings


@click.command(cls=Command)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON line per check.")
@click.option(
    "--probe-bulk",
    is_flag=True,
    help="Ask the Klaviyo account whether events can be sent in bulk. Writes to the account.",
)
@click.option(
    "--probe-wait",
    type=click.FloatRange(min=0, min_open=True),
    default=120.0,
    show_default=True,
    metavar="SECONDS",
    help="How long to wait until the events of the probe can be read.",
)
@click.option(
    "--subscription-key",
    default="klaviyo-worker",
    show_default=True,
    metavar="KEY",
    help="Key of the commercetools subscription.",
)
@settings_options(Settings)
def check(*, as_json: bool, probe_bulk: bool, probe_wait: float, subscription_key: str, **option_values: Any) -> None:
    """Verify settings, queue, commercetools and Klaviyo.

    Prints one line per check: OK; FAIL, with the reason and, after →, the advice; or SKIP if the API client has no
    permission for the check. Exits with the code of the first failure: 2 configuration, 3 queue, 4 commercetools,
    5 Klaviyo. Receives no message, and writes nothing without --probe-bulk.

    --probe-bulk writes to the Klaviyo account: one profile (name "klaviyo-worker probe", external id
    klaviyo-worker-probe, no email, no consent) and, in every run, eight events of the metric "klaviyo-worker probe".
    It stores its verdict as properties of the profile, where the workers read it. The probe also needs the scopes
    profiles:read and events:read. It takes up to three times --probe-wait. If it has no result, the exit code is 1. To
    remove the data and the verdict, search Klaviyo for the profile by its name and select Profile actions, Delete
    profile.
    """
    from worker.commands.check.checks import run_checks  # noqa: PLC0415

    exit_code: int = ExitCode.OK
    read_settings, report_progress = partial(load, Settings, option_values), partial(click.echo, err=True)
    timeout = probe_wait if probe_bulk else None
    for result in run_checks(read_settings, subscription_key, timeout, report_progress):
        click.echo(result.json() if as_json else result.line())
        exit_code = exit_code or result.exit_code
    sys.exit(exit_code)
