"""`klaviyo-worker dlq`: the messages that were given up on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click
import orjson

from adapters import DeadLetters, QueueError
from worker.cli.base import Group, exit_codes, opened, settings_options
from worker.dead_letters import each
from worker.errors import Ignored, WorkerError
from worker.settings import QueueSettings, load

if TYPE_CHECKING:
    from adapters import DeadLetter


@click.group(cls=Group)
def dlq() -> None:
    """Look at the messages that were given up on."""


@dlq.command("list")
@click.option("--json", "as_json", is_flag=True, help="One JSON line per dead letter.")
@settings_options(QueueSettings)
def dlq_list(*, as_json: bool, **flags: Any) -> None:
    """List the dead letters, oldest first."""
    with exit_codes(), opened(load(QueueSettings, flags)) as queue:
        if not isinstance(queue, DeadLetters):
            raise QueueError("QUEUE_URL: the dead letters of this queue cannot be read from here")
        letters = [_dead_letter(letter) for letter in each(queue)]
    for letter in letters:
        click.echo(orjson.dumps(letter) if as_json else _readable(letter))
    if not letters and not as_json:
        click.echo("no dead letters", err=True)


def _dead_letter(letter: DeadLetter) -> dict[str, Any]:
    from worker.parse import parse  # noqa: PLC0415

    try:
        notification = parse(letter.delivery.body)
    except (WorkerError, Ignored):
        notification = None
    return {
        "message_id": letter.delivery.id,
        "message_type": notification and notification.type,
        "resource_type": notification and notification.resource_type,
        "resource_id": notification and notification.resource_id,
        "reason": letter.failure.reason,
        "stage": letter.failure.stage,
        "attempts": letter.delivery.attempt,
        "dead_lettered_at": letter.dead_lettered_at and letter.dead_lettered_at.isoformat(),
    }


def _readable(letter: dict[str, Any]) -> str:
    about = f"{letter['message_type'] or 'unreadable'} {letter['resource_type'] or ''} {letter['resource_id'] or ''}"
    when = (letter["dead_lettered_at"] or "")[:19]
    return f"{when}  {letter['message_id']:>6}  {about.strip()}  [{letter['stage']}] {letter['reason']}"
