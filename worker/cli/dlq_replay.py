"""`klaviyo-worker dlq replay`."""

from __future__ import annotations

import os
import sys
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import TYPE_CHECKING, Any

import click

from adapters import QueueError, SupportsCounts
from worker.cli.dlq import count_phrase, filter_options, not_found_error, open_dead_letters
from worker.cli.options import Command, settings_options
from worker.cli.termination import CommandError, exit_without_waiting, handle_errors, on_signals
from worker.commands.dlq.dead_letters import display_type, summarize
from worker.errors import ExitCode
from worker.json_access import printable
from worker.model import Ending
from worker.setting_sources import load
from worker.settings import Settings

if TYPE_CHECKING:
    from adapters import DeadLetter, SupportsDeadLetters
    from worker.commands.dlq.dead_letters import DeadLetterFilter
    from worker.commands.dlq.replay import Replay, ReplayStats
    from worker.commands.progress_bar import StatusLine


@click.command(cls=Command)
@click.argument("message_ids", metavar="[MESSAGE_ID]...", nargs=-1)
@filter_options
@click.option(
    "--rate", type=click.FloatRange(min=0, min_open=True), metavar="N", help="Maximum dead letters per second."
)
@click.option(
    "--canary/--no-canary",
    default=True,
    help="Stop if the first dead letter fails again (default), or process the others.",
)
@click.option("--dry-run", is_flag=True, help="Print the requests. Send and remove nothing.")
@settings_options(Settings)
def replay(*, filters: DeadLetterFilter, rate: float | None, canary: bool, dry_run: bool, **option_values: Any) -> None:
    """Process dead letters again.

    Replays the dead letters with the given MESSAGE_IDs, those that match the options, or all. This command sends them
    to Klaviyo itself and gives none back to the queue. It removes those that Klaviyo has accepted, and those that have
    no effect in Klaviyo. All others remain dead letters.

    The first dead letter is a canary: the others are processed only after Klaviyo has accepted it. If it has no
    effect, the next one is the canary.
    """
    from worker.commands.dlq.replay import Replay, ReplayOptions  # noqa: PLC0415
    from worker.commands.progress_bar import Rate, StatusLine, show_progress  # noqa: PLC0415 - keeps --help fast

    stop = _StopOnSignal()
    with handle_errors():
        settings = load(Settings, option_values)
        status_line = StatusLine(sys.stderr)
        has_bar = status_line.isatty() and not dry_run
        _configure_logging(settings, status_line, has_bar=has_bar)
        on_signals(stop)
        is_single = len(filters.ids) == 1 or filters.limit == 1
        options = ReplayOptions(rate, canary=canary and not is_single, dry_run=dry_run)
        with open_dead_letters(settings) as queue:
            expected = _count_expected(queue, filters) if has_bar else None
            stop.running = running = Replay(queue, settings, filters, options)
            throughput = Rate(running.stats.count, expected)
            try:
                _run(running, show_progress("replaying", throughput, status_line) if has_bar else nullcontext())
            finally:
                _print_summary(running.stats, dry_run=dry_run)
    _check_completed(running, filters, is_interrupted=stop.was_called)


class _StopOnSignal:
    """The signal handler: the first signal finishes the messages in flight, the second stops immediately."""

    def __init__(self) -> None:
        self.running: Replay | None = None
        self.was_called = False

    def __call__(self) -> None:
        self.was_called = True
        if self.running is None:  # the queue is still opening, which can take half a minute
            os._exit(ExitCode.INTERRUPTED)
        self.running.stop()


def _configure_logging(settings: Settings, status_line: StatusLine, *, has_bar: bool) -> None:
    """Log as `run` does. With a progress bar, omit the line per message, which would make the bar unreadable."""
    from worker.telemetry.log import configure_logging, log  # noqa: PLC0415

    configure_logging(settings.log_level, settings.log_format, status_line)  # type: ignore[arg-type] # a partial TextIO
    if has_bar:
        log.handlers[0].addFilter(lambda record: record.getMessage() != "message_processed")


def _count_expected(queue: SupportsDeadLetters, filters: DeadLetterFilter) -> int | None:
    """Return the maximum number of dead letters to replay; None if unknown."""
    known: list[int | None] = [filters.limit, len(filters.ids) or None]
    if isinstance(queue, SupportsCounts) and not filters.selects_by_content:
        with suppress(QueueError):
            known.append(queue.counts().dead_letters)
    return min((number for number in known if number is not None), default=None)


def _run(running: Replay, progress: AbstractContextManager[None]) -> None:
    from worker.runtime.runner import ShutdownTimeoutError  # noqa: PLC0415

    try:
        with progress:
            running.run()
    except ShutdownTimeoutError:
        exit_without_waiting("the grace period ended: the dead letters in flight are unchanged")


def _print_summary(stats: ReplayStats, *, dry_run: bool) -> None:
    """Print the number of dead letters per outcome: to stderr in a dry run, because stdout holds the requests."""
    rows = [
        (
            "would be sent" if dry_run else "replayed",
            stats.count(Ending.SENT),
            "" if dry_run else "sent to Klaviyo, removed",
        ),
        ("ignored", stats.count(Ending.IGNORED), "" if dry_run else "nothing to send, removed"),
        ("failed again", stats.failed, "still dead letters"),
        ("not finished", stats.count(Ending.RETURNED), "still dead letters"),
    ]
    for name, number, note in rows:
        if number or name == rows[0][0]:
            click.echo(f"{name:<14}{number:>7,}  {note}".rstrip(), err=dry_run)
        if name == "failed again":
            for (stage, reason), times in stats.reasons.most_common():
                click.echo(f"  {times:>19,}  [{stage}] {printable(reason)}", err=dry_run)


def _check_completed(running: Replay, filters: DeadLetterFilter, *, is_interrupted: bool) -> None:
    """Raise CommandError unless every selected dead letter was sent or ignored."""
    stats = running.stats
    if running.queue.canary_failed and stats.last_failed:
        raise _canary_error(stats.last_failed, stats)
    if is_interrupted:
        raise CommandError(
            "interrupted: the remaining dead letters are unchanged; run the same command to continue",
            ExitCode.INTERRUPTED,
        )
    if missing := filters.missing_ids(running.queue.delivered_ids):
        raise not_found_error(missing)
    if not stats.count():
        click.echo("no dead letters to replay", err=True)
    if stats.count(Ending.RETURNED):
        raise CommandError(
            "the outage did not end in time: replay the remaining dead letters later", ExitCode.UNEXPECTED
        )
    if stats.failed:
        raise CommandError(f"{count_phrase(stats.failed)} failed again", ExitCode.UNEXPECTED)


def _canary_error(canary: DeadLetter, stats: ReplayStats) -> CommandError:
    summary, ((_, reason),) = summarize(canary), stats.reasons
    fields = (summary.message_id, display_type(summary), summary.resource_type, summary.resource_id)
    description = printable(" ".join(filter(None, fields)))
    return CommandError(
        f"the first dead letter failed again, so the others were not tried: {description}: "
        f"{printable(reason).rstrip('.')}. Fix the cause, select others with --type, --reason or MESSAGE_ID, "
        "or try all with --no-canary",
        ExitCode.UNEXPECTED,
    )
