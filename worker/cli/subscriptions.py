"""`klaviyo-worker subscriptions`: what commercetools is to send, and where to."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click
import orjson

from worker.cli.options import Group, settings_options
from worker.cli.termination import CommandError, handle_errors
from worker.errors import ExitCode, SettingsError, WorkerError
from worker.json_access import printable
from worker.settings import SubscriptionSettings, load

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from worker.commands.subscriptions.client import Subscriptions
    from worker.commands.subscriptions.plan import Plan, Wanted
    from worker.model import Json


@click.group(cls=Group)
def subscriptions() -> None:
    """Plan or apply the commercetools subscription for the queue.

    CT_API_CLIENT is one with the scope manage_subscriptions, which the worker itself does not need. The secret of
    a destination, where it has one, is KLAVIYO_WORKER_DESTINATION_SECRET (or its _FILE).
    """


def _options(command: Callable[..., None]) -> Callable[..., None]:
    """Add what both commands take."""
    options = (
        click.option(
            "--destination",
            default="",
            metavar="URL",
            help="Where to send to, docs/subscriptions.md.  [default: QUEUE_URL's]",
        ),
        click.option(
            "--key", default="klaviyo-worker", show_default=True, metavar="KEY", help="Key of the subscription."
        ),
        click.option(
            "--format",
            "delivery_format",
            type=click.Choice(["Platform", "CloudEvents"]),
            help="Format, for a new one.  [default: Platform; CloudEvents on Event Grid]",
        ),
        click.option("--renew", is_flag=True, help="Send the destination again: its secret has changed."),
        click.option("--json", "as_json", is_flag=True, help="JSON lines."),
        settings_options(SubscriptionSettings),
    )
    for option in reversed(options):
        command = option(command)
    return command


@subscriptions.command("plan")
@_options
def plan_command(*, as_json: bool, renew: bool, **flags: Any) -> None:
    """Show what `apply` would do. Changes nothing."""
    with _told():
        client, wanted = _opened(**flags)
        _show(_planned(client, wanted, renew=renew), as_json=as_json)


@subscriptions.command("apply")
@click.option(
    "--wait",
    type=click.FloatRange(min=0),
    default=60.0,
    show_default=True,
    metavar="SECONDS",
    help="Time to get healthy.",
)
@click.option("--delete-stale", is_flag=True, help="Delete the other subscriptions to the same destination.")
@click.option("--yes", is_flag=True, help="Delete them without asking.")
@_options
def apply_command(*, wait: float, delete_stale: bool, yes: bool, as_json: bool, renew: bool, **flags: Any) -> None:
    """Create or change the subscription, and watch its health.

    Applied again, it changes nothing.
    Exits with 4 when commercetools refuses, or cannot deliver.
    """
    from worker.commands.subscriptions.apply import apply  # noqa: PLC0415
    from worker.commands.subscriptions.health import DELIVERS  # noqa: PLC0415

    with _told():
        client, wanted = _opened(**flags)
        plan = _planned(client, wanted, renew=renew)
        _show(plan, as_json=as_json)
        doomed = plan.stale if delete_stale else ()
        if doomed and not yes:
            click.confirm(f"Delete {len(doomed)} stale subscriptions for good?", abort=True, err=True)
        applied = apply(client, plan, renew=renew)
        status = client.watched(applied, wait)
        doomed = doomed if status in DELIVERS else ()  # a stale one may be the only one that delivers
        for subscription in doomed:
            client.delete(subscription)
        _tell(applied, status, deleted=len(doomed), as_json=as_json)


@contextmanager
def _told() -> Iterator[None]:
    """Turn whatever commercetools has against it into one line and exit code 4."""
    with handle_errors():
        try:
            yield
        except WorkerError as error:
            raise CommandError(str(error), ExitCode.COMMERCETOOLS) from None


def _opened(*, destination: str, key: str, delivery_format: str | None, **flags: Any) -> tuple[Subscriptions, Wanted]:
    """Return the client, and what is wanted. Raises SettingsError."""
    from threading import Event  # noqa: PLC0415

    from worker.commands.subscriptions.client import Subscriptions  # noqa: PLC0415
    from worker.commands.subscriptions.destination import of_queue, parse  # noqa: PLC0415
    from worker.commands.subscriptions.plan import Wanted  # noqa: PLC0415
    from worker.commands.subscriptions.spec import needs  # noqa: PLC0415
    from worker.commercetools.client import Commercetools  # noqa: PLC0415

    settings = load(SubscriptionSettings, flags)
    secret = settings.destination_secret.get_secret_value().strip()
    target = parse(destination or of_queue(settings.queue_url), secret)
    wanted = Wanted(key, target, needs(settings.mapping().disabled_types), delivery_format or "")
    if not wanted.needs:
        raise SettingsError("disabled_types: the mapping leaves no handler, so there is nothing to subscribe to")
    return Subscriptions(Commercetools(settings, Event()), target.hide), wanted


def _planned(client: Subscriptions, wanted: Wanted, *, renew: bool) -> Plan:
    from worker.commands.subscriptions.plan import plan  # noqa: PLC0415

    return plan(wanted, client.all(), renew=renew)


def _show(plan: Plan, *, as_json: bool) -> None:
    if as_json:
        _echo_json(plan.document())
        return
    for line in plan.lines():
        click.echo(printable(line))


def _tell(applied: Json, status: str, *, deleted: int, as_json: bool) -> None:
    """Print what came of it; raise CommandError unless it is healthy, or commercetools does not tell."""
    from worker.commands.subscriptions.health import DELIVERS, explain  # noqa: PLC0415

    why, todo = explain(status) if status else ("this commercetools does not tell its health", "")
    if as_json:
        _echo_json({"id": applied.get("id"), "version": applied.get("version"), "status": status, "deleted": deleted})
    else:
        also = f", {deleted} stale deleted" if deleted else ""
        click.echo(printable(f"applied: version {applied.get('version')}{also}; {why}"))
    if status not in DELIVERS:
        raise CommandError(f"subscription {applied.get('key')} is not healthy: {why}: {todo}", ExitCode.COMMERCETOOLS)


def _echo_json(document: Json) -> None:
    click.echo(orjson.dumps(document))
