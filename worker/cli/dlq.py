"""`klaviyo-worker dlq list`, `show` and `drop`: the messages that were given up on."""

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
from worker.cli.options import Group, open_configured_queue, settings_options
from worker.cli.termination import CommandError, handle_errors
from worker.commands.dlq.dead_letters import (
    AT_ONCE,
    Choice,
    body_text,
    each,
    entry,
    given_up_at,
    json_line,
    parse_since,
    through,
    type_of,
)
from worker.errors import ExitCode
from worker.json_access import printable
from worker.settings import QueueSettings, load

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Sequence

    from adapters import DeadLetter
    from worker.commands.dlq.dead_letters import Entry

SHOWN = 50  # letters listed for people, unless they ask for more
_KINDS = 20  # rows of the table that counts them
_LATEST = datetime.max.replace(tzinfo=UTC)


def _since(text: str) -> datetime:
    try:
        return parse_since(text, datetime.now(UTC))
    except ValueError:
        expected = "expected an age like 90s, 30m, 2h, 3d, 1w, or a time like 2026-11-24T18:00"
        raise click.BadParameter(f"{text!r}: {expected}") from None


def choosing(function: Callable[..., None]) -> Callable[..., None]:
    """Add the options that choose dead letters; `function` takes them as its `choice`."""

    @click.option("--reason", default="", metavar="TEXT", help="Only those whose reason contains this.")
    @click.option("--type", "message_type", default="", metavar="TYPE", help="Only those of this type; or unreadable.")
    @click.option("--since", type=_since, metavar="AGE|TIME", help="Only those given up on since: 2h, 3d, 2026-11-24.")
    @click.option("--limit", type=click.IntRange(min=1), metavar="N", help="So many at most.")
    @wraps(function)
    def with_choice(
        *,
        reason: str,
        message_type: str,
        since: datetime | None,
        limit: int | None,
        message_ids: Sequence[str] = (),
        **more: Any,
    ) -> None:
        function(choice=Choice(frozenset(message_ids), reason, message_type, since, limit), **more)

    return with_choice


@contextmanager
def opened_dead_letters(settings: QueueSettings) -> Iterator[SupportsDeadLetters]:
    """Open a queue whose dead letters can be read. Raises QueueError."""
    if scheme_of(settings.queue_url) == "push":
        raise QueueError(
            "QUEUE_URL: push:// cannot read dead letters: "
            "set it to pubsub://PROJECT/SUBSCRIPTION, the subscription that pushes, for this command"
        )
    with open_configured_queue(settings) as queue:
        if not isinstance(queue, SupportsDeadLetters):
            raise QueueError("QUEUE_URL: the dead letters of this queue cannot be read from here: use its own tools")
        yield queue


@click.group(cls=Group)
def dlq() -> None:
    """Look at messages that were given up on, replay or drop them."""


@dlq.command("list")
@choosing
@click.option("--json", "as_json", is_flag=True, help="One JSON line per dead letter.")
@settings_options(QueueSettings)
def list_(*, choice: Choice, as_json: bool, **flags: Any) -> None:
    """List the dead letters, and count them by type and reason.

    The oldest come first: 50, unless --limit says otherwise, and with --json all. Nothing is removed.
    """
    with handle_errors(), opened_dead_letters(load(QueueSettings, flags)) as queue:
        letters = replace(choice, limit=None).of(each(queue))
        found = [(given_up_at(letter) or _LATEST, entry(letter)) for letter in letters]
    entries = [entry for _, entry in sorted(found, key=lambda pair: pair[0])]
    shown = entries[: choice.limit or (len(entries) if as_json else SHOWN)]
    if entries and not as_json:
        _echo_counts(entries)
        click.echo()
    for row in shown:
        click.echo(json_line(row) if as_json else _line(row))
    if len(shown) < len(entries):
        click.echo(f"{len(entries) - len(shown):,} more: --limit {len(entries)} lists them all", err=True)
    if not entries and not as_json:
        click.echo("no dead letters", err=True)


@dlq.command()
@click.argument("message_id")
@settings_options(QueueSettings)
def show(*, message_id: str, **flags: Any) -> None:
    """Show all of one dead letter.

    Its body, which may hold personal data, goes to stdout; what else is known of it to stderr.
    """
    with handle_errors(), opened_dead_letters(load(QueueSettings, flags)) as queue, closing(each(queue)) as letters:
        letter = next(Choice(frozenset([message_id])).of(letters), None)
    if letter is None:
        raise not_found([message_id])
    click.echo("This may hold personal data: mind who reads it, and where it is pasted.", err=True)
    for name, value in _facts(letter):
        if value:
            click.echo(f"{name:<18}{printable(value)}", err=True)
    click.echo(err=True)
    click.echo(body_text(letter.delivery.body))


@dlq.command()
@click.argument("message_ids", metavar="[MESSAGE_ID]...", nargs=-1)
@choosing
@click.option("--all", "is_all", is_flag=True, help="All of them, whatever they are.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@settings_options(QueueSettings)
def drop(*, choice: Choice, is_all: bool, yes: bool, **flags: Any) -> None:
    """Remove dead letters for good.

    Those named, those chosen by options, or --all.
    """
    is_chosen = bool(choice.ids or choice.reason or choice.message_type or choice.since)
    if is_chosen == is_all:
        raise click.UsageError("say which: MESSAGE_ID, --reason, --type, --since, or --all")
    if not yes and not sys.stdin.isatty():
        raise click.UsageError("there is no terminal to ask on: --yes drops without asking")
    with handle_errors(), opened_dead_letters(load(QueueSettings, flags)) as queue:
        entries = [entry(letter) for letter in choice.of(each(queue))]
        found = frozenset(entry.message_id for entry in entries)
        if missing := choice.missing(found):
            raise not_found(missing)
        if not entries:
            click.echo("no dead letters to drop", err=True)
            return
        _echo_counts(entries)
        if not yes:
            click.confirm(f"Drop {number_of(len(entries))} for good?", abort=True)
        dropped = _drop(queue, replace(choice, limit=None), found, len(entries))
    if dropped < len(entries):
        left = number_of(len(entries) - dropped)
        raise CommandError(
            f"{left} not dropped: somebody else has removed them, or looks at them now; try again", ExitCode.UNEXPECTED
        )


def _drop(queue: SupportsDeadLetters, choice: Choice, found: Collection[str], wanted: int) -> int:
    """Remove the letters found; say how many that were, also when it breaks off, and return it."""
    dropped = 0
    try:
        with closing(queue.dead_letters()) as letters:
            fit = (letter for letter in choice.of(through(letters)) if letter.delivery.id in found)
            chosen = islice(fit, wanted)  # not until all ids were seen: who publishes to Service Bus may repeat them
            while batch := list(islice(chosen, AT_ONCE)):
                letters.remove(batch)
                dropped += len(batch)
    finally:
        click.echo(f"dropped {number_of(dropped)}")
    return dropped


def _echo_counts(entries: Iterable[Entry]) -> None:
    """Print a table: how many letters of a type have a reason, the most first."""
    counts = Counter((printable(type_of(entry)), _why(entry)) for entry in entries).most_common()
    shown = [("COUNT", "TYPE", "REASON"), *((f"{number:,}", *kind) for kind, number in counts[:_KINDS])]
    number_width, type_width = (max(len(row[column]) for row in shown) for column in (0, 1))
    for number, kind, reason in shown:
        click.echo(f"{number:>{number_width}}  {kind:<{type_width}}  {reason}")
    if more := counts[_KINDS:]:
        click.echo(f"{sum(number for _, number in more):>{number_width},}  of {len(more)} other types and reasons")


def _line(entry: Entry) -> str:
    about = " ".join(filter(None, (type_of(entry), entry.resource_type, entry.resource_id)))
    return f"{_time(entry.dead_lettered_at):<19}  {printable(entry.message_id):>6}  {printable(about)}  {_why(entry)}"


def _time(at: datetime | None) -> str:
    return at.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S") if at else ""


def _why(entry: Entry) -> str:
    return printable(f"[{entry.stage}] {entry.reason}")


def _facts(letter: DeadLetter) -> Iterator[tuple[str, str]]:
    about, failure, delivery = entry(letter), letter.failure, letter.delivery
    yield "message_id", about.message_id
    yield "message_type", type_of(about)
    yield "resource", " ".join(filter(None, (about.resource_type, about.resource_id)))
    yield "reason", failure.reason
    yield "stage", failure.stage
    yield "error", failure.error
    yield "attempts", str(about.attempts or "")
    yield "published_at", _time(delivery.published_at)
    yield "dead_lettered_at", _time(letter.dead_lettered_at)
    for name, value in delivery.attributes.items():
        yield "attribute", f"{name}={value}"
    yield "body", f"{len(delivery.body):,} bytes"


def not_found(message_ids: Collection[str]) -> CommandError:
    """Return the error that there are no such dead letters."""
    names = ", ".join(sorted(map(printable, message_ids)))
    return CommandError(f"no dead letter {names}: `klaviyo-worker dlq list` lists what there is", ExitCode.UNEXPECTED)


def number_of(letters: int) -> str:
    """Return so many dead letters in words."""
    return f"{letters:,} dead letter{'' if letters == 1 else 's'}"
