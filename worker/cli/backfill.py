"""`klaviyo-worker backfill`."""

from __future__ import annotations

import os
import re
import sys
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from worker.cli.options import Command, settings_options
from worker.cli.termination import CommandError, exit_without_waiting, handle_errors, on_signals
from worker.commands.backfill.settings import BackfillSettings
from worker.errors import ExitCode, Rejected, SettingsError
from worker.json_access import printable
from worker.setting_sources import load

if TYPE_CHECKING:
    from worker.commands.backfill.backfill import Backfill
    from worker.commands.backfill.checkpoint import BackfillProgress
    from worker.commands.backfill.records import RecordSelection
    from worker.commands.progress_bar import Rate, StatusLine

_QUEUE_SETTINGS = frozenset(
    {
        "queue_url",
        "dead_letter_mode",
        "pub_sub_port",
        "http_port",
        "status_page",
        "app_type",
        "dead_letter_queue_url",
        "park_retry_interval",
    }
)
_FILE = click.Path(path_type=Path, dir_okay=False)
_ID = re.compile(r"[\w-]{1,256}", re.ASCII)  # anything else could be an email address, which must not be printed


class _Files(NamedTuple):
    checkpoint: Path | None
    failures: Path | None


@click.command(cls=Command)
@click.argument(
    "name", metavar="KIND", type=click.Choice(["customers", "orders", "products", "categories", "inventory"])
)
@click.option(
    "--since",
    metavar="TIME",
    help="Only orders created, or other records changed, at this time or later: 2026-01-31 or 2026-01-31T12:00Z. "
    "UTC by default.",
)
@click.option("--until", metavar="TIME", help="Only orders created, or other records changed, before this time.")
@click.option(
    "--ids",
    metavar="IDS|FILE",
    help="Only records with these ids, separated by commas, or in a file with one per line.",
)
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Maximum number of records.")
@click.option("--dry-run", is_flag=True, help="Print the requests. Send nothing and write no files.")
@click.option(
    "--checkpoint", type=_FILE, metavar="FILE", help="Save progress in this file, or continue from it if it exists."
)
@click.option(
    "--failures-file",
    type=_FILE,
    metavar="FILE",
    help="Append failed records to this file.  [default: next to the checkpoint]",
)
@settings_options(BackfillSettings, without=_QUEUE_SETTINGS)
def backfill(  # noqa: PLR0913 - options
    *,
    name: str,
    since: str | None,
    until: str | None,
    ids: str | None,
    limit: int | None,
    dry_run: bool,
    checkpoint: Path | None,
    failures_file: Path | None,
    **option_values: Any,
) -> None:
    """Send existing commercetools records to Klaviyo.

    Records pass through the same stages as messages. Their events are marked as backfill and start no flow.
    A record that was already sent has no second effect. The worker can run at the same time.

    After an interruption (exit code 7), run the same command with --checkpoint again to continue. Exit code 1 means
    that some records failed.
    """
    from worker.commands.progress_bar import StatusLine  # noqa: PLC0415 - keeps --help fast
    from worker.telemetry.log import configure_logging  # noqa: PLC0415

    with handle_errors():
        settings = load(BackfillSettings, option_values)
        selection = _parse_selection(name, since, until, ids)
        status_line = StatusLine(sys.stderr)
        configure_logging(settings.log_level, settings.log_format, status_line)  # type: ignore[arg-type] # a partial TextIO
        failures_file = failures_file or (checkpoint and checkpoint.with_suffix(".failures.jsonl"))
        files = _Files(checkpoint, None if dry_run else failures_file)
        try:
            running = _prepare(settings, selection, limit, files, dry_run=dry_run)
            on_signals(running.stop)
            _run(running, status_line, f"dry run of {name}" if dry_run else name, files)
        except OSError as error:  # network errors have other classes
            raise CommandError(_file_error(error), ExitCode.UNEXPECTED) from None


def _prepare(
    settings: BackfillSettings,
    selection: RecordSelection,
    limit: int | None,
    files: _Files,
    *,
    dry_run: bool,
) -> Backfill:
    """Create the backfill and open its files. Raises SettingsError."""
    from worker.commands.backfill.backfill import Backfill  # noqa: PLC0415
    from worker.commands.backfill.checkpoint import Checkpoint, FailureLog, checkpoint_key  # noqa: PLC0415

    if files.checkpoint and files.failures and files.checkpoint.resolve() == files.failures.resolve():
        raise SettingsError("--failures-file: expected another file than --checkpoint")
    key = checkpoint_key(selection, settings.ct_project_id)
    try:
        return Backfill(
            settings,
            selection,
            limit=limit,
            checkpoint=Checkpoint(files.checkpoint, key) if files.checkpoint else None,
            failure_log=FailureLog(files.failures) if files.failures else None,
            dry_run=dry_run,
        )
    except OSError as error:
        raise SettingsError(f"--checkpoint, --failures-file: {_file_error(error)}") from None


def _file_error(error: OSError) -> str:
    return f"cannot write {error.filename or 'the checkpoint or the failures file'}: {error.strerror}"


def _run(running: Backfill, status_line: StatusLine, title: str, files: _Files) -> None:
    """Run, print the summary, and raise or exit with a code other than 0 unless all records succeeded."""
    from worker.runtime.runner import ShutdownTimeoutError  # noqa: PLC0415

    advice = "without --checkpoint FILE the next run starts over"
    if files.checkpoint:
        advice = "run the same command to continue"
    try:
        rate = running.run(status_line)
    except Rejected as error:
        raise CommandError(str(error), ExitCode.UNEXPECTED) from None
    except ShutdownTimeoutError:
        exit_without_waiting(f"interrupted before all records in flight were sent: {advice}")
    for line in _summarize(title, running.progress, rate):
        click.echo(line, err=True)
    if running.progress.failed and files.failures:
        click.echo(f"The failures are in {files.failures}. To retry them: --ids {files.failures}", err=True)
    if running.is_interrupted:
        raise CommandError(f"interrupted: {advice}", ExitCode.INTERRUPTED)
    if running.progress.failed:
        sys.exit(ExitCode.UNEXPECTED)


def _summarize(title: str, progress: BackfillProgress, rate: Rate) -> list[str]:
    """Return the counts of all runs, and the reasons for failures, the most frequent first."""
    from worker.commands.progress_bar import format_duration  # noqa: PLC0415

    failed = progress.failed
    counts = f"{progress.sent:,} sent, {progress.ignored:,} ignored, {failed.total():,} failed"
    duration = f"this run took {format_duration(rate.seconds)}, {rate.per_second:,.0f} per second"
    reasons = [f"failed: {number:,} x {printable(reason)}" for reason, number in failed.most_common()]
    return [f"{title}: {progress.done:,} done: {counts}; {duration}", *reasons]


def _parse_selection(name: str, since: str | None, until: str | None, ids: str | None) -> RecordSelection:
    """Return the records that the options select. Raises SettingsError."""
    from worker.commands.backfill.records import RecordSelection  # noqa: PLC0415

    if ids is not None and (since or until):
        raise SettingsError("--ids: cannot be combined with --since or --until: remove them")
    selection = RecordSelection(name, _parse_time("--since", since), _parse_time("--until", until))
    if selection.since and selection.until and selection.since >= selection.until:
        raise SettingsError("--until: expected a time after --since")
    return selection if ids is None else replace(selection, ids=_parse_ids(ids, selection.kind.resource_type))


def _parse_time(option: str, text: str | None) -> datetime | None:
    if text is None:
        return None
    try:
        time = datetime.fromisoformat(text)
        return (time if time.tzinfo else time.replace(tzinfo=UTC)).astimezone(UTC)
    except (ValueError, OverflowError):
        raise SettingsError(f"{option}: expected a date or a time like 2026-01-31 or 2026-01-31T12:00:00Z") from None


def _parse_ids(text: str, resource_type: str) -> tuple[str, ...]:
    """Return the ids in the text, or in the file that it names, sorted and without duplicates. Raises SettingsError."""
    from worker.commands.backfill.checkpoint import read_ids  # noqa: PLC0415

    path = Path(text.removeprefix("@"))
    is_file = text.startswith("@") or os.path.isfile(path)  # noqa: PTH113 - Path.is_file raises if the name is too long
    found = read_ids(path, resource_type) if is_file else [part.strip() for part in text.split(",")]
    if not found or not all(map(_ID.fullmatch, found)):
        raise SettingsError("--ids: expected commercetools ids, separated by commas, or a file with one per line")
    return tuple(sorted(set(found)))
