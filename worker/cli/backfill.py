"""`klaviyo-worker backfill`: what commercetools holds already."""

from __future__ import annotations

import os
import re
import sys
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from worker.cli.options import Command, settings_options
from worker.cli.termination import CommandError, exit_without_waiting, handle_errors, on_signals
from worker.commands.backfill.settings import BackfillSettings
from worker.errors import ExitCode, Rejected, SettingsError
from worker.settings import load

if TYPE_CHECKING:
    from worker.commands.backfill.backfill import Backfill
    from worker.commands.backfill.progress import Progress
    from worker.commands.backfill.records import Selection
    from worker.commands.progress_bar import Pace, Screen

_OF_A_QUEUE = frozenset(
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
_ID = re.compile(r"[\w-]{1,256}", re.ASCII)  # anything else may be an email address, which errors must not repeat


@click.command(cls=Command)
@click.argument("name", metavar="KIND", type=click.Choice(["customers", "orders", "products", "categories"]))
@click.option("--since", metavar="TIME", help="Only those since then: 2026-01-31, or with a time; UTC, unless it says.")
@click.option("--until", metavar="TIME", help="Only those before. Orders by creation, others by last change.")
@click.option("--ids", metavar="IDS|FILE", help="Only these: with commas between, or a file.")
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Stop after so many records.")
@click.option("--dry-run", is_flag=True, help="Print what would be sent; send and write nothing.")
@click.option("--resume", type=_FILE, metavar="FILE", help="Checkpoint: made, or gone on from.")
@click.option("--failures", type=_FILE, metavar="FILE", help="For what failed.  [default: beside the checkpoint]")
@settings_options(BackfillSettings, without=_OF_A_QUEUE)
def backfill(  # noqa: PLR0913 - options
    *,
    name: str,
    since: str | None,
    until: str | None,
    ids: str | None,
    limit: int | None,
    dry_run: bool,
    resume: Path | None,
    failures: Path | None,
    **flags: Any,
) -> None:
    """Send what commercetools holds already.

    It is handled as the worker handles news of it, which may run meanwhile, but that events are marked as history, so
    that no flow begins. What is sent twice has no second effect. Interrupted (exit code 7), the same command with
    --resume goes on where it was. Exit code 1: some records failed.
    """
    from worker.commands.progress_bar import Screen  # noqa: PLC0415 - keeps --help fast
    from worker.telemetry.log import configure_logging  # noqa: PLC0415

    with handle_errors():
        settings = load(BackfillSettings, flags)
        selection = _selection(name, since, until, ids)
        screen = Screen(sys.stderr)
        configure_logging(settings.log_level, settings.log_format, screen)  # type: ignore[arg-type] # all it needs
        failures = None if dry_run else failures or (resume and resume.with_suffix(".failures.jsonl"))
        try:
            work = _prepared(settings, selection, limit, failures, resume, dry_run=dry_run)
            on_signals(work.stop)
            _run(work, screen, f"dry run of {name}" if dry_run else name, resume, failures)
        except OSError as error:  # what is read and written over the network raises none
            raise CommandError(_unwritten(error), ExitCode.UNEXPECTED) from None


def _prepared(
    settings: BackfillSettings,
    selection: Selection,
    limit: int | None,
    failures: Path | None,
    resume: Path | None,
    *,
    dry_run: bool,
) -> Backfill:
    from worker.commands.backfill.backfill import Backfill  # noqa: PLC0415
    from worker.commands.backfill.checkpoint import Checkpoint, Failures, describe  # noqa: PLC0415

    if resume and failures and resume.resolve() == failures.resolve():
        raise SettingsError("--failures: expected another file than that of --resume")
    try:
        return Backfill(
            settings,
            selection,
            limit=limit,
            checkpoint=Checkpoint(resume, describe(selection, settings.ct_project_id)) if resume else None,
            failures=Failures(failures) if failures else None,
            dry_run=dry_run,
        )
    except OSError as error:
        raise SettingsError(f"--resume, --failures: {_unwritten(error)}") from None


def _unwritten(error: OSError) -> str:
    return f"cannot write {error.filename or 'the checkpoint or the failures'}: {error.strerror}"


def _run(work: Backfill, screen: Screen, name: str, resume: Path | None, failures: Path | None) -> None:
    """Run to the end, say what was done, and exit with a code that tells whether all of it was."""
    from worker.runtime.runner import ShutdownTimeoutError  # noqa: PLC0415

    how = "the same command goes on from there" if resume else "without --resume FILE the next run begins anew"
    try:
        pace = work.run(screen)
    except Rejected as error:
        raise CommandError(str(error), ExitCode.UNEXPECTED) from None
    except ShutdownTimeoutError:
        exit_without_waiting(f"interrupted, and what was in work was not finished: {how}")
    for line in _summary(name, work.progress, pace):
        click.echo(line, err=True)
    if work.progress.failed and failures:
        click.echo(f"The failures are in {failures}. To try them again: --ids {failures}", err=True)
    if work.is_interrupted:
        raise CommandError(f"interrupted: {how}", ExitCode.INTERRUPTED)
    if work.progress.failed:
        sys.exit(ExitCode.UNEXPECTED)


def _summary(name: str, progress: Progress, pace: Pace) -> list[str]:
    """Return what was done, in all runs, and why records failed: the most frequent reasons first."""
    from worker.commands.progress_bar import duration  # noqa: PLC0415

    failed = progress.failed
    counts = f"{progress.sent:,} sent, {progress.nothing_to_do:,} with nothing to do, {failed.total():,} failed"
    pace_text = f"this run took {duration(pace.seconds)}, {pace.rate:,.0f} a second"
    reasons = [f"failed: {number:,} x {reason}" for reason, number in failed.most_common()]
    return [f"{name}: {progress.done:,} done: {counts}; {pace_text}", *reasons]


def _selection(name: str, since: str | None, until: str | None, ids: str | None) -> Selection:
    """Return what the options select. Raises SettingsError."""
    from worker.commands.backfill.records import Selection  # noqa: PLC0415

    if ids is not None and (since or until):
        raise SettingsError("--ids: names all records already: leave out --since and --until")
    selection = Selection(name, _moment("--since", since), _moment("--until", until))
    if selection.since and selection.until and selection.since >= selection.until:
        raise SettingsError("--until: expected a moment after --since")
    return selection if ids is None else replace(selection, ids=_ids(ids, selection.collection.resource_type))


def _moment(option: str, text: str | None) -> datetime | None:
    if text is None:
        return None
    try:
        moment = datetime.fromisoformat(text)
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).astimezone(UTC)
    except (ValueError, OverflowError):
        raise SettingsError(f"{option}: expected a date or a time like 2026-01-31 or 2026-01-31T12:00:00Z") from None


def _ids(text: str, resource_type: str) -> tuple[str, ...]:
    """Return the ids in a text or in the file it names, each once, in order. Raises SettingsError."""
    from worker.commands.backfill.checkpoint import read_ids  # noqa: PLC0415

    path = Path(text.removeprefix("@"))
    is_file = text.startswith("@") or os.path.isfile(path)  # noqa: PTH113 - Path's fails for a name that is too long
    found = read_ids(path, resource_type) if is_file else [part.strip() for part in text.split(",")]
    if not found or not all(map(_ID.fullmatch, found)):
        raise SettingsError("--ids: expected ids of commercetools, separated by commas, or a file with one in a line")
    return tuple(sorted(set(found)))
