"""`klaviyo-worker dlq replay`: dead letters are handled once more, and removed once their effect is in Klaviyo."""

from __future__ import annotations

import os
import sys
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import TYPE_CHECKING, Any

import click

from adapters import QueueError, SupportsCounts
from worker.cli.dlq import choosing, not_found, number_of, opened_dead_letters
from worker.cli.options import Command, settings_options
from worker.cli.termination import CommandError, exit_without_waiting, handle_errors, on_signals
from worker.commands.dlq.dead_letters import entry, type_of
from worker.errors import ExitCode
from worker.json_access import printable
from worker.settings import Settings, load

if TYPE_CHECKING:
    from adapters import SupportsDeadLetters
    from worker.commands.dlq.dead_letters import Choice
    from worker.commands.dlq.replay import Replay, Tally
    from worker.commands.progress_bar import Screen


@click.command(cls=Command)
@click.argument("message_ids", metavar="[MESSAGE_ID]...", nargs=-1)
@choosing
@click.option("--rate", type=click.FloatRange(min=0, min_open=True), metavar="N", help="So many a second at most.")
@click.option("--canary/--no-canary", default=True, help="Stop if the first fails again (default), or go on.")
@click.option("--dry-run", is_flag=True, help="Print what would be sent; send and remove nothing.")
@settings_options(Settings)
def replay(*, choice: Choice, rate: float | None, canary: bool, dry_run: bool, **flags: Any) -> None:
    """Handle dead letters once more.

    Those named, those chosen by options, or all. That happens here, and nothing goes back to the queue: a letter is
    removed once its effect is in Klaviyo, or if there is nothing to do. What fails again, or is interrupted, stays a
    dead letter. The first goes alone, the canary.
    """
    from worker.commands.dlq.replay import Options, Replay  # noqa: PLC0415
    from worker.commands.progress_bar import Pace, Screen, shown  # noqa: PLC0415 - keeps --help fast

    interruption = _Interruption()
    with handle_errors():
        settings = load(Settings, flags)
        screen = Screen(sys.stderr)
        has_bar = screen.isatty() and not dry_run
        _configure_logging(settings, screen, has_bar=has_bar)
        on_signals(interruption)
        is_one = len(choice.ids) == 1 or choice.limit == 1
        options = Options(rate, canary=canary and not is_one, dry_run=dry_run)
        with opened_dead_letters(settings) as queue:
            expected = _expected(queue, choice) if has_bar else None
            running = Replay(queue, settings, choice, options)
            interruption.running = running
            try:
                _run(running, shown("replaying", Pace(running.tally, expected), screen) if has_bar else nullcontext())
            finally:
                _echo_summary(running.tally, dry_run=dry_run)
    _end(running, choice, is_interrupted=interruption.has_come)


class _Interruption:
    """What a signal does: the first finishes what is in flight, the second does not wait for it."""

    def __init__(self) -> None:
        self.running: Replay | None = None
        self.has_come = False

    def __call__(self) -> None:
        self.has_come = True
        if self.running is None:  # the queue has yet to answer; nothing is held
            os._exit(ExitCode.INTERRUPTED)
        self.running.stop()


def _configure_logging(settings: Settings, screen: Screen, *, has_bar: bool) -> None:
    """Log as the worker does; but a line per message would tear the bar to pieces."""
    from worker.telemetry.log import configure_logging, log  # noqa: PLC0415

    configure_logging(settings.log_level, settings.log_format, screen)  # type: ignore[arg-type] # all it needs
    if has_bar:
        log.handlers[0].addFilter(lambda record: record.getMessage() != "message_processed")


def _expected(queue: SupportsDeadLetters, choice: Choice) -> int | None:
    """Return how many letters there will be, at most; None where nobody knows without looking."""
    known: list[int | None] = [choice.limit, len(choice.ids) or None]
    chooses = choice.reason or choice.message_type or choice.since
    if isinstance(queue, SupportsCounts) and not chooses:
        with suppress(QueueError):
            known.append(queue.counts().dead_letters)
    return min((number for number in known if number is not None), default=None)


def _run(running: Replay, progress: AbstractContextManager[None]) -> None:
    from worker.runtime.runner import ShutdownTimeoutError  # noqa: PLC0415

    try:
        with progress:
            running.run()
    except ShutdownTimeoutError:
        exit_without_waiting("the grace period ended before all letters in flight did; they stay dead letters")


def _echo_summary(tally: Tally, *, dry_run: bool) -> None:
    """Say how the letters ended: on stdout, unless that holds requests."""
    outcomes = tally.outcomes
    rows = [
        ("would be sent" if dry_run else "replayed", outcomes["sent"], "" if dry_run else "their effect is in Klaviyo"),
        ("nothing to do", outcomes["ignored"], "" if dry_run else "removed"),
        ("failed again", tally.failed, "dead letters still"),
        ("not finished", outcomes["returned"], "dead letters still"),
    ]
    for name, number, note in rows:
        if number or name == rows[0][0]:
            click.echo(f"{name:<14}{number:>7,}  {note}".rstrip(), err=dry_run)
        if name == "failed again":
            for (stage, reason), times in tally.reasons.most_common():
                click.echo(f"  {times:>19,}  [{stage}] {printable(reason)}", err=dry_run)


def _end(running: Replay, choice: Choice, *, is_interrupted: bool) -> None:
    """Leave with an exit code other than 0 when not all that was asked for is done. Raises CommandError."""
    tally, failed = running.tally, running.tally.last_failed
    if running.queue.has_stopped and failed:
        about, ((_, reason),) = entry(failed), tally.reasons
        what = " ".join(filter(None, (about.message_id, type_of(about), about.resource_type, about.resource_id)))
        raise CommandError(
            f"the first failed again, so no other was tried: {printable(what)}: {printable(reason).rstrip('.')}. "
            "Mend that; or choose others with --type, --reason or MESSAGE_ID; or try all with --no-canary",
            ExitCode.UNEXPECTED,
        )
    if is_interrupted:
        raise CommandError(
            "interrupted: what was not replayed is a dead letter still; the same again goes on", ExitCode.INTERRUPTED
        )
    if missing := choice.missing(running.queue.handed_out):
        raise not_found(missing)
    if not tally.ended:
        click.echo("no dead letters to replay", err=True)
    if tally.outcomes["returned"]:
        raise CommandError("gave up waiting for an outage to end: replay the rest later", ExitCode.UNEXPECTED)
    if tally.failed:
        raise CommandError(f"{number_of(tally.failed)} failed again", ExitCode.UNEXPECTED)
