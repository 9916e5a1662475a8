"""`klaviyo-worker dlq list`, `show` and `drop`."""

from __future__ import annotations

import sys
from collections import Counter
from contextlib import closing, contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from functools import wraps
from itertools import islice
from typing import TYPE_CHECKING, Any

import click

from adapters import QueueError, SupportsDeadLetters, scheme_of
from worker.cli.options import Group, open_configured_queue, settings_options, with_options
from worker.cli.termination import CommandError, handle_errors
from worker.commands.dlq.dead_letters import (
    BATCH_SIZE,
    DeadLetterFilter,
    dead_lettered_or_published_at,
    display_type,
    format_body,
    format_json_line,
    iter_dead_letters,
    iter_unseen,
    parse_since,
    summarize,
)
from worker.errors import ExitCode, kind_of
from worker.json_access import printable, shorten
from worker.setting_sources import load
from worker.settings import QueueSettings

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Sequence

    from adapters import DeadLetter
    from worker.commands.dlq.dead_letters import DeadLetterSummary

DEFAULT_LIMIT = 50  # dead letters that `list` prints without --limit and --json
_MAX_COUNT_ROWS = 20
_MAX_ATTRIBUTES = 100
_MAX_TEXT = 2_000  # characters of a reason or an attribute
_LATEST = datetime.max.replace(tzinfo=UTC)


def _parse_since_option(text: str) -> datetime:
    try:
        return parse_since(text, datetime.now(UTC))
    except ValueError:
        expected = "expected an age like 90s, 30m, 2h, 3d, 1w, or a time like 2026-11-24T18:00"
        raise click.BadParameter(f"{text!r}: {expected}") from None


_FILTER_OPTIONS = (
    click.option("--reason", default="", metavar="TEXT", help="Only dead letters whose reason contains this text."),
    click.option(
        "--type",
        "message_type",
        default="",
        metavar="TYPE",
        help="Only messages of this type; `unreadable` selects those that cannot be parsed.",
    ),
    click.option(
        "--since",
        type=_parse_since_option,
        metavar="AGE|TIME",
        help="Only messages dead-lettered within this age (2h, 3d), or since this time (2026-11-24).",
    ),
    click.option(
        "--older-than",
        "before",
        type=_parse_since_option,
        metavar="AGE|TIME",
        help="Only messages dead-lettered longer ago than this age (30d), or before this time.",
    ),
    click.option(
        "--about",
        default="",
        metavar="TEXT",
        help="Only messages that contain this text, such as the id or the email of a person.",
    ),
    click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Maximum number of dead letters."),
)


def filter_options(function: Callable[..., None]) -> Callable[..., None]:
    """Add the options that select dead letters, and pass them to `function` as its argument `filters`."""

    @wraps(function)
    def with_filters(
        *,
        reason: str,
        message_type: str,
        since: datetime | None,
        before: datetime | None,
        about: str,
        limit: int | None,
        message_ids: Sequence[str] = (),
        **arguments: Any,
    ) -> None:
        filters = DeadLetterFilter(frozenset(message_ids), reason, message_type, since, before, about, limit)
        function(filters=filters, **arguments)

    return with_options(*_FILTER_OPTIONS)(with_filters)


@contextmanager
def open_dead_letters(settings: QueueSettings) -> Iterator[SupportsDeadLetters]:
    """Open a queue whose dead letters can be read. Raises QueueError."""
    if scheme_of(settings.queue_url) == "push":
        raise QueueError(
            "QUEUE_URL: push:// cannot read dead letters: for this command, set QUEUE_URL to "
            "pubsub://PROJECT/SUBSCRIPTION with the name of the push subscription"
        )
    with open_configured_queue(settings) as queue:
        if not isinstance(queue, SupportsDeadLetters):
            raise QueueError("QUEUE_URL: klaviyo-worker cannot read the dead letters of this queue: use its own tools")
        yield queue


@click.group(cls=Group)
def dlq() -> None:
    """List, show, replay or drop dead letters."""


@dlq.command("list")
@filter_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON line per dead letter.")
@settings_options(QueueSettings)
def list_(*, filters: DeadLetterFilter, as_json: bool, **option_values: Any) -> None:
    """List dead letters, and count them by type and reason.

    Prints the oldest dead letters first. Without --limit, prints 50, or all with --json. Removes nothing.
    """
    with handle_errors(), open_dead_letters(load(QueueSettings, option_values)) as queue:
        selected = replace(filters, limit=None).select(iter_dead_letters(queue))
        dated = [(dead_lettered_or_published_at(found) or _LATEST, summarize(found)) for found in selected]
    summaries = [summary for _, summary in sorted(dated, key=lambda pair: pair[0])]
    shown = summaries[: filters.limit or (None if as_json else DEFAULT_LIMIT)]
    if summaries and not as_json:
        _print_counts(summaries)
        click.echo()
    for summary in shown:
        click.echo(format_json_line(summary) if as_json else _format_line(summary))
    if len(shown) < len(summaries):
        click.echo(f"{len(summaries) - len(shown):,} more: use --limit {len(summaries)} to list all", err=True)
    if not summaries and not as_json:
        click.echo("no dead letters", err=True)


@dlq.command()
@click.argument("message_id")
@settings_options(QueueSettings)
def show(*, message_id: str, **option_values: Any) -> None:
    """Show one dead letter.

    Prints the body to stdout and everything else to stderr. The body can contain personal data.
    """
    filters = DeadLetterFilter(frozenset([message_id]))
    with (
        handle_errors(),
        open_dead_letters(load(QueueSettings, option_values)) as queue,
        closing(iter_dead_letters(queue)) as dead_letters,
    ):
        dead_letter = next(filters.select(dead_letters), None)
    if dead_letter is None:
        raise not_found_error([message_id])
    click.echo("The body can contain personal data: share it only with people who are allowed to see it.", err=True)
    for name, value in _details(dead_letter):
        if value:
            click.echo(f"{name:<18}{shorten(printable(value), _MAX_TEXT)}", err=True)
    click.echo(err=True)
    click.echo(format_body(dead_letter.delivery.body))


@dlq.command()
@click.argument("message_ids", metavar="[MESSAGE_ID]...", nargs=-1)
@filter_options
@click.option("--all", "is_all", is_flag=True, help="Drop all dead letters.")
@click.option("--yes", is_flag=True, help="Drop without asking for confirmation.")
@settings_options(QueueSettings)
def drop(*, filters: DeadLetterFilter, is_all: bool, yes: bool, **option_values: Any) -> None:
    """Remove dead letters permanently.

    Requires MESSAGE_IDs, a filter other than --limit, or --all.
    """
    is_filtered = bool(filters.ids or filters.selects_by_content)
    if is_filtered == is_all:
        raise click.UsageError(
            "expected MESSAGE_ID or an option that selects dead letters; or --all without any of them"
        )
    if not yes and not sys.stdin.isatty():
        raise click.UsageError("cannot ask for confirmation without a terminal: use --yes")
    with handle_errors(), open_dead_letters(load(QueueSettings, option_values)) as queue:
        summaries = [summarize(dead_letter) for dead_letter in filters.select(iter_dead_letters(queue))]
        listed = frozenset(summary.message_id for summary in summaries)
        if missing := filters.missing_ids(listed):
            raise not_found_error(missing)
        if not summaries:
            click.echo("no dead letters to drop", err=True)
            return
        _print_counts(summaries)
        if not yes:
            click.confirm(f"Drop {count_phrase(len(summaries))} permanently?", abort=True)
        dropped = _drop(queue, replace(filters, limit=None), listed, len(summaries))
    if dropped < len(summaries):
        remaining = count_phrase(len(summaries) - dropped)
        raise CommandError(
            f"{remaining} not dropped, because another process has removed or leased them: try again",
            ExitCode.UNEXPECTED,
        )


def _drop(queue: SupportsDeadLetters, filters: DeadLetterFilter, listed: Collection[str], maximum: int) -> int:
    """Remove the listed dead letters. Return how many were removed, and print that number even after an error."""
    dropped = 0
    try:
        with closing(queue.dead_letters()) as dead_letters:
            matching = (found for found in filters.select(iter_unseen(dead_letters)) if found.delivery.id in listed)
            selected = islice(matching, maximum)  # limit the number, because ids on Service Bus are not unique
            while batch := list(islice(selected, BATCH_SIZE)):
                dead_letters.remove(batch)
                dropped += len(batch)
    finally:
        click.echo(f"dropped {count_phrase(dropped)}")
    return dropped


def _print_counts(summaries: Iterable[DeadLetterSummary]) -> None:
    """Print how many dead letters have each type and kind of reason, the most frequent first."""
    counts = Counter((printable(display_type(each)), kind_of(_format_reason(each))) for each in summaries).most_common()
    rows = [("COUNT", "TYPE", "REASON"), *((f"{number:,}", *group) for group, number in counts[:_MAX_COUNT_ROWS])]
    number_width, type_width = (max(len(row[column]) for row in rows) for column in (0, 1))
    for number, message_type, reason in rows:
        click.echo(f"{number:>{number_width}}  {message_type:<{type_width}}  {reason}")
    if rest := counts[_MAX_COUNT_ROWS:]:
        click.echo(f"{sum(number for _, number in rest):>{number_width},}  of {len(rest)} other types and reasons")


def _format_line(summary: DeadLetterSummary) -> str:
    resource = " ".join(filter(None, (display_type(summary), summary.resource_type, summary.resource_id)))
    time, message_id = _format_time(summary.dead_lettered_at), shorten(printable(summary.message_id), _MAX_TEXT)
    return f"{time:<19}  {message_id:>6}  {printable(resource)}  {_format_reason(summary)}"


def _format_time(at: datetime | None) -> str:
    return at.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S") if at else ""


def _format_reason(summary: DeadLetterSummary) -> str:
    return shorten(printable(f"[{summary.stage}] {summary.reason}"), _MAX_TEXT)


def _details(dead_letter: DeadLetter) -> Iterator[tuple[str, str]]:
    summary, failure, delivery = summarize(dead_letter), dead_letter.failure, dead_letter.delivery
    yield "message_id", summary.message_id
    yield "message_type", display_type(summary)
    yield "resource", " ".join(filter(None, (summary.resource_type, summary.resource_id)))
    yield "reason", failure.reason
    yield "stage", failure.stage
    yield "error", failure.error
    yield "attempts", str(summary.attempts or "")
    yield "published_at", _format_time(delivery.published_at)
    yield "dead_lettered_at", _format_time(dead_letter.dead_lettered_at)
    for name, value in islice(delivery.attributes.items(), _MAX_ATTRIBUTES):
        yield "attribute", f"{name}={value}"
    yield "body", f"{len(delivery.body):,} bytes"


def not_found_error(message_ids: Collection[str]) -> CommandError:
    """Return the error for MESSAGE_IDs that are not dead letters."""
    names = ", ".join(sorted(map(printable, message_ids)))
    return CommandError(f"no dead letter {names}: `klaviyo-worker dlq list` shows the ids", ExitCode.UNEXPECTED)


def count_phrase(number: int) -> str:
    """Return `1 dead letter`, `2 dead letters`."""
    return f"{number:,} dead letter{'' if number == 1 else 's'}"
