"""`klaviyo-worker subscriptions`: the commercetools subscription that feeds the queue."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click
import orjson

from worker.cli.options import Group, settings_options, with_options
from worker.cli.termination import CommandError, handle_errors
from worker.errors import ExitCode, SettingsError, WorkerError
from worker.json_access import printable
from worker.setting_sources import load
from worker.settings import SubscriptionSettings

if TYPE_CHECKING:
    from collections.abc import Iterator

    from worker.commands.subscriptions.client import Subscriptions
    from worker.commands.subscriptions.plan import DesiredSubscription, Plan
    from worker.model import Json


@click.group(cls=Group)
def subscriptions() -> None:
    """Plan or apply the subscription that feeds the queue.

    CT_API_CLIENT must have the scope manage_subscriptions, which the worker itself does not need. If the
    destination needs a secret, set KLAVIYO_WORKER_DESTINATION_SECRET (or KLAVIYO_WORKER_DESTINATION_SECRET_FILE).
    """


_options = with_options(
    click.option(
        "--destination",
        default="",
        metavar="URL",
        help="Destination of the notifications, see docs/subscriptions.md.  [default: from QUEUE_URL]",
    ),
    click.option("--key", default="klaviyo-worker", show_default=True, metavar="KEY", help="Key of the subscription."),
    click.option(
        "--format",
        "delivery_format",
        type=click.Choice(["Platform", "CloudEvents"]),
        help="Format of a new subscription.  [default: Platform; CloudEvents for Event Grid]",
    ),
    click.option(
        "--renew",
        is_flag=True,
        help="Send the destination to commercetools again, for example because its secret has changed.",
    ),
    click.option("--json", "as_json", is_flag=True, help="Print JSON lines."),
    settings_options(SubscriptionSettings),
)


@subscriptions.command("plan")
@_options
def plan_command(*, as_json: bool, renew: bool, **option_values: Any) -> None:
    """Show what `apply` would change."""
    with _commercetools_errors():
        client, desired = _connect(**option_values)
        _print_plan(_make_plan(client, desired, renew=renew), as_json=as_json)


@subscriptions.command("apply")
@click.option(
    "--wait",
    type=click.FloatRange(min=0),
    default=60.0,
    show_default=True,
    metavar="SECONDS",
    help="How long to wait until the subscription is healthy.",
)
@click.option("--delete-stale", is_flag=True, help="Delete all other subscriptions with the same destination.")
@click.option("--yes", is_flag=True, help="With --delete-stale: do not ask for confirmation.")
@_options
def apply_command(
    *, wait: float, delete_stale: bool, yes: bool, as_json: bool, renew: bool, **option_values: Any
) -> None:
    """Create or change the subscription, and wait until it is healthy.

    Changes nothing if the subscription is up to date. Exits with 4 if commercetools refuses the subscription or
    cannot deliver notifications.
    """
    from worker.commands.subscriptions.apply import apply  # noqa: PLC0415
    from worker.commands.subscriptions.health import DELIVERING  # noqa: PLC0415

    with _commercetools_errors():
        client, desired = _connect(**option_values)
        plan = _make_plan(client, desired, renew=renew)
        _print_plan(plan, as_json=as_json)
        to_delete = plan.stale if delete_stale else ()
        if to_delete and not yes:
            noun = "subscription" if len(to_delete) == 1 else "subscriptions"
            click.confirm(f"Permanently delete {len(to_delete)} stale {noun}?", abort=True, err=True)
        applied = apply(client, plan, renew=renew)
        status = client.wait_until_healthy(applied, wait)
        if status not in DELIVERING:  # possibly only a stale subscription delivers
            to_delete = ()
        for subscription in to_delete:
            client.delete(subscription)
        _report(applied, status, deleted=len(to_delete), as_json=as_json)


@contextmanager
def _commercetools_errors() -> Iterator[None]:
    """Convert every commercetools error into one line and exit code 4."""
    with handle_errors():
        try:
            yield
        except WorkerError as error:
            raise CommandError(str(error), ExitCode.COMMERCETOOLS) from None


def _connect(
    *, destination: str, key: str, delivery_format: str | None, **option_values: Any
) -> tuple[Subscriptions, DesiredSubscription]:
    """Return a client and the desired subscription. Raises SettingsError."""
    from threading import Event  # noqa: PLC0415

    from worker.commands.subscriptions.client import Subscriptions  # noqa: PLC0415
    from worker.commands.subscriptions.destination import from_queue_url, parse  # noqa: PLC0415
    from worker.commands.subscriptions.plan import DesiredSubscription  # noqa: PLC0415
    from worker.commands.subscriptions.spec import required_spec  # noqa: PLC0415
    from worker.commercetools.client import Commercetools  # noqa: PLC0415

    settings = load(SubscriptionSettings, option_values)
    secret = settings.destination_secret.get_secret_value().strip()
    target = parse(destination or from_queue_url(settings.queue_url), secret)
    spec = required_spec(settings.mapping())
    if not spec:
        raise SettingsError("disabled_types: the mapping disables every handler, so there is nothing to subscribe to")
    desired = DesiredSubscription(key, target, spec, delivery_format or "")
    return Subscriptions(Commercetools(settings, Event()), target.redact), desired


def _make_plan(client: Subscriptions, desired: DesiredSubscription, *, renew: bool) -> Plan:
    from worker.commands.subscriptions.plan import plan  # noqa: PLC0415

    return plan(desired, client.all(), renew=renew)


def _print_plan(plan: Plan, *, as_json: bool) -> None:
    if as_json:
        _echo_json(plan.document())
        return
    for line in plan.lines():
        click.echo(printable(line))


def _report(applied: Json, status: str, *, deleted: int, as_json: bool) -> None:
    """Print the result. Raises CommandError if commercetools reports that it cannot deliver."""
    from worker.commands.subscriptions.health import DELIVERING, explain_status  # noqa: PLC0415

    health, todo = explain_status(status) if status else ("this commercetools does not report health", "")
    if as_json:
        _echo_json({"id": applied.get("id"), "version": applied.get("version"), "status": status, "deleted": deleted})
    else:
        also = f", {deleted} stale deleted" if deleted else ""
        click.echo(printable(f"applied: version {applied.get('version')}{also}; {health}"))
    if status not in DELIVERING:
        raise CommandError(
            f"subscription {applied.get('key')} is not healthy: {health}: {todo}", ExitCode.COMMERCETOOLS
        )


def _echo_json(document: Json) -> None:
    click.echo(orjson.dumps(document))
