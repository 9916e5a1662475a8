"""The command line: parses options, calls one function, maps errors to exit codes."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any, BinaryIO

import click
import orjson

from adapters import DeadLetters, Publisher, QueueAdapter, QueueError, QueueURLError, open_queue
from worker.errors import Ignored, Misconfigured, SettingsError, WorkerError
from worker.settings import MappingSettings, QueueSettings, Settings, load

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pydantic_settings import BaseSettings

    from adapters.base import DeadLetter

OK, UNEXPECTED, USAGE, QUEUE, COMMERCETOOLS, KLAVIYO, SHUTDOWN_TIMED_OUT = range(7)
_EXIT_CODES = """
\b
Exit codes: 0 ok · 1 unexpected · 2 usage or configuration · 3 queue ·
4 commercetools credentials · 5 Klaviyo credentials · 6 shutdown timed out
"""
_STOP = frozenset({signal.SIGTERM, signal.SIGINT})
SECRETS = frozenset({"ct_api_client", "klaviyo_auth_key", "servicebus_connection_string"})


class Failed(click.ClickException):
    """One line on stderr and an exit code."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code  # type: ignore[misc] # click's own way, declared as a class variable


@contextmanager
def _exit_codes() -> Iterator[None]:
    """Turn the errors an operator can act on into one line and an exit code."""
    try:
        yield
    except (SettingsError, QueueURLError) as error:
        raise Failed(str(error), USAGE) from None
    except QueueError as error:
        raise Failed(str(error), QUEUE) from None
    except Misconfigured as error:
        raise Failed(str(error), error.exit_code) from None


def settings_options(kind: type[BaseSettings]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Add a flag for every setting of `kind` that is no secret; its value stays a text, checked by `load`."""

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        for name, info in reversed(kind.model_fields.items()):
            if name not in SECRETS:
                default = info.get_default()
                shown = "" if default in (None, "") or info.is_required() else f"  [default: {default}]"
                text = f"{info.description}{shown}  [env: {info.validation_alias}]"
                flag = "--" + name.replace("_", "-")
                function = click.option(flag, name, default=None, help=text, metavar="TEXT")(function)
        return function

    return decorate


@click.group(epilog=_EXIT_CODES, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="klaviyo-worker")
def main() -> None:
    """Keep Klaviyo in step with commercetools: nothing lost, nothing doubled."""


@main.command()
@click.option("--once", is_flag=True, help="Handle what is in the queue, then exit.")
@click.option(
    "--max-wait",
    type=float,
    default=600.0,
    show_default=True,
    help="Seconds --once waits for what must wait.",
)
@click.option("--dry-run", is_flag=True, help="Print what would be sent; settle nothing. Implies --once.")
@settings_options(Settings)
def run(*, once: bool, max_wait: float, dry_run: bool, **flags: Any) -> None:
    """Read the queue and keep Klaviyo in step, until SIGTERM or SIGINT.

    The first signal finishes what is in flight, the second does not wait for it.
    Secrets have no flag: they come from CT_API_CLIENT, KLAVIYO_AUTH_KEY and, for servicebus://,
    SERVICEBUS_CONNECTION_STRING, or from files named by CT_API_CLIENT_FILE and so on.
    """
    from worker.runner import ShutdownTimeoutError  # noqa: PLC0415 - keeps --help and publish fast
    from worker.service import Service  # noqa: PLC0415
    from worker.telemetry import configure_logging, log  # noqa: PLC0415

    with _exit_codes():
        settings = load(Settings, flags)
        configure_logging(settings.log_level, settings.log_format)
        signal.pthread_sigmask(signal.SIG_BLOCK, _STOP)  # before any thread starts: all inherit it
        service: Service | None = None

        def stop() -> None:
            if service is None:  # the queue has yet to answer, which may take half a minute; nothing is held
                log.info("stopped")
                os._exit(0)
            service.stop()

        Thread(target=_call_on_signals, args=(stop,), daemon=True).start()
        service = Service(settings, dry_run=dry_run)
        try:
            service.run(once=once or dry_run, max_wait=max_wait)
        except ShutdownTimeoutError as error:
            click.echo(f"Error: {error}", err=True)
            sys.stdout.flush()
            os._exit(SHUTDOWN_TIMED_OUT)  # lanes may hang in calls that no thread can interrupt


def _call_on_signals(stop: Callable[[], None]) -> None:
    """Wait for signals in a thread: a handler in the main thread could meet a lock it already holds."""
    while True:
        signal.sigwait(_STOP)
        stop()


@main.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON line per check.")
@click.option("--probe-bulk", is_flag=True, help="Find out whether KLAVIYO_WORKER_BULK_EVENTS=always is safe; writes.")
@click.option(
    "--probe-wait",
    type=click.FloatRange(min=0, min_open=True),
    default=120.0,
    show_default=True,
    help="Seconds that the events of the probe are given to show.",
)
@settings_options(Settings)
def check(*, as_json: bool, probe_bulk: bool, probe_wait: float, **flags: Any) -> None:
    """Tell whether queue, commercetools and Klaviyo may be used, one line each.

    Exits with the code of the first that failed: 3 queue, 4 commercetools, 5 Klaviyo, refused or out of reach.
    Nothing is written, and no message is received.

    --probe-bulk does write to the Klaviyo account: one profile (name "klaviyo-worker probe", external id
    klaviyo-worker-probe, no email, no consent) and, each time, three events of the metric "klaviyo-worker probe".
    It needs the scopes profiles:read and events:read too, takes up to three times --probe-wait, and exits with 1
    when it cannot tell. To remove what it wrote: search Klaviyo for the profile by its name, then Profile actions,
    Delete profile.
    """
    from worker.check import check as findings  # noqa: PLC0415

    exit_code = OK
    with _exit_codes():
        for finding in findings(
            load(Settings, flags), probe_wait if probe_bulk else None, partial(click.echo, err=True)
        ):
            click.echo(finding.json() if as_json else finding.line())
            exit_code = exit_code or finding.exit_code
    sys.exit(exit_code)


@main.command()
@click.argument("file", type=click.File("rb"))
@settings_options(QueueSettings)
def publish(*, file: BinaryIO, **flags: Any) -> None:
    """Put every line of FILE (- for stdin) into the queue as one message, and print how many."""
    with _exit_codes(), _open(load(QueueSettings, flags)) as queue:
        if not isinstance(queue, Publisher):
            raise QueueError("QUEUE_URL: this queue cannot be published to from here")
        click.echo(queue.publish(line.removesuffix(b"\n") for line in file))


@main.command()
@click.argument("file", type=click.File("rb"))
@click.option(
    "--enriched",
    type=click.File("rb"),
    help='What commercetools holds: JSON {"orders": […], "customers": […], "product-projections": […], …}.',
)
@settings_options(MappingSettings)
def transform(*, file: BinaryIO, enriched: BinaryIO | None, **flags: Any) -> None:
    """Print the Klaviyo requests for the notifications in FILE (- for stdin), without any network.

    FILE holds one JSON document or one per line, in any envelope. Output: a JSON line per operation.
    """
    from worker.offline import documents, transform_offline  # noqa: PLC0415

    failed = False
    with _exit_codes():
        mapping = load(MappingSettings, flags).mapping()
        snapshot = _snapshot(enriched)
        for body in documents(file.read()):
            try:
                for line in transform_offline(body, snapshot, mapping):
                    click.echo(line)
            except Ignored as reason:
                hint = "" if enriched else " (without --enriched, only the payload is known)"
                click.echo(f"ignored: {reason}{hint}", err=True)
            except WorkerError as error:
                failed = True
                click.echo(f"error: {error}", err=True)
    if failed:
        sys.exit(UNEXPECTED)


def _snapshot(file: BinaryIO | None) -> dict[str, Any]:
    if file is None:
        return {}
    try:
        document = orjson.loads(file.read())
    except orjson.JSONDecodeError as error:
        raise SettingsError(f"--enriched: not JSON: {error.msg} at {error.pos}") from None
    if not isinstance(document, dict) or not all(isinstance(entry, list) for entry in document.values()):
        raise SettingsError('--enriched: expected JSON like {"orders": […], "customers": […]}')
    return document


@main.command()
def handlers() -> None:
    """List the notifications that have an effect, and which."""
    from worker.transform import HANDLERS  # noqa: PLC0415

    rows = [("RESOURCE", "NOTIFICATION", "KLAVIYO")]
    rows += [(handler.resource_type, handler.type, handler.sends) for handler in HANDLERS.values()]
    widths = [max(len(row[column]) for row in rows) + 2 for column in (0, 1)]
    for resource, kind, sends in rows:
        click.echo(f"{resource:<{widths[0]}}{kind:<{widths[1]}}{sends}")


@main.group()
def dlq() -> None:
    """Look at the messages that were given up on."""


@dlq.command("list")
@click.option("--json", "as_json", is_flag=True, help="One JSON line per dead letter.")
@settings_options(QueueSettings)
def dlq_list(*, as_json: bool, **flags: Any) -> None:
    """List the dead letters, oldest first."""
    with _exit_codes(), _open(load(QueueSettings, flags)) as queue:
        if not isinstance(queue, DeadLetters):
            raise QueueError("QUEUE_URL: the dead letters of this queue cannot be read from here")
        letters = [_dead_letter(letter) for letter in queue.dead_letters()]
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
        "dead_lettered_at": letter.dead_lettered_at.isoformat(),
    }


def _readable(letter: dict[str, Any]) -> str:
    about = f"{letter['message_type'] or 'unreadable'} {letter['resource_type'] or ''} {letter['resource_id'] or ''}"
    when = letter["dead_lettered_at"][:19]
    return f"{when}  {letter['message_id']:>6}  {about.strip()}  [{letter['stage']}] {letter['reason']}"


@main.command()
@click.option("--keep", type=click.Path(path_type=Path), help="Directory to keep the demo's queue and log in.")
def demo(*, keep: Path | None) -> None:
    """Show the worker at work: a sample shop, a stand-in for Klaviyo, no account needed."""
    from worker.demo import run_demo  # noqa: PLC0415

    sys.exit(run_demo(keep))


@contextmanager
def _open(settings: QueueSettings) -> Iterator[QueueAdapter]:
    queue = open_queue(settings.queue_url, settings.queue_options)
    try:
        yield queue
    finally:
        queue.close()
