"""What the commands share: settings as flags, errors as exit codes, the queue."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any, Literal, NoReturn, get_args, get_origin

import click

from adapters import QueueAdapter, QueueError, QueueURLError, open_queue
from worker.errors import Misconfigured, SettingsError
from worker.json_access import printable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pydantic.fields import FieldInfo
    from pydantic_settings import BaseSettings

    from worker.settings import QueueSettings

OK, UNEXPECTED, USAGE, QUEUE, COMMERCETOOLS, KLAVIYO, SHUTDOWN_TIMED_OUT, INTERRUPTED = range(8)
SECRETS = frozenset({"ct_api_client", "destination_secret", "klaviyo_auth_key", "servicebus_connection_string"})
_STOP = frozenset({signal.SIGTERM, signal.SIGINT})


class Failed(click.ClickException):
    """One line on stderr and an exit code."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(printable(message, keep="\n"))
        self.exit_code = exit_code  # type: ignore[misc] # click's own way, declared as a class variable


@contextmanager
def exit_codes() -> Iterator[None]:
    """Turn the errors an operator can act on into one line and an exit code."""
    try:
        yield
    except (SettingsError, QueueURLError) as error:
        raise Failed(str(error), USAGE) from None
    except QueueError as error:
        raise Failed(str(error), QUEUE) from None
    except Misconfigured as error:
        raise Failed(str(error), error.exit_code) from None
    except KeyboardInterrupt:
        raise Failed("interrupted", INTERRUPTED) from None


class Setting(click.Option):
    """A flag for a setting."""


class Command(click.Command):
    """A command whose help tells its own options apart from the settings."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write two sections."""
        options = [param for param in self.get_params(ctx) if isinstance(param, click.Option)]
        for title, are_settings in (("Options", False), ("Settings", True)):
            chosen = [option for option in options if isinstance(option, Setting) == are_settings]
            if records := [record for option in chosen if (record := option.get_help_record(ctx))]:
                with formatter.section(title):
                    formatter.write_dl(records)


class Group(click.Group):
    """A group of such commands."""

    command_class = Command


def settings_options(
    kind: type[BaseSettings], without: frozenset[str] = frozenset()
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Add a flag for every setting of `kind` that is no secret; its value stays a text, checked by `load`."""

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        for name, info in reversed(kind.model_fields.items()):
            if name not in SECRETS | without:
                default = info.get_default()
                shown = "" if default in (None, "") or info.is_required() else f"  [default: {default}]"
                text = f"{info.description}{shown}  [env: {info.validation_alias}]"
                flag = "--" + name.replace("_", "-")
                metavar = _metavar(info)
                shape = click.Path() if metavar == "FILE" else str  # for shells, which complete a path
                option = click.option(flag, name, cls=Setting, type=shape, default=None, help=text, metavar=metavar)
                function = option(function)
        return function

    return decorate


def _metavar(info: FieldInfo) -> str:
    if get_origin(info.annotation) is Literal:
        return "|".join(get_args(info.annotation))
    if str(info.validation_alias).endswith("_URL"):
        return "URL"
    kinds: dict[Any, str] = {int: "INTEGER", float: "NUMBER", Path | None: "FILE"}
    return kinds.get(info.annotation, "TEXT")


@contextmanager
def opened(settings: QueueSettings) -> Iterator[QueueAdapter]:
    """Open the queue, and close it in the end."""
    queue = open_queue(settings.queue_url, settings.queue_options)
    try:
        yield queue
    finally:
        queue.close()


def leave_lanes(why: str) -> NoReturn:
    """Say why, and end at once: lanes may hang in calls that no thread can interrupt."""
    click.echo(f"Error: {why}", err=True)
    sys.stdout.flush()
    os._exit(SHUTDOWN_TIMED_OUT)


def call_on_signals(stop: Callable[[], None]) -> None:
    """Have SIGTERM and SIGINT call `stop`, in a thread: a handler in the main thread could meet a lock it holds."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _STOP)  # before any thread starts: all inherit it
    Thread(target=_wait_for_signals, args=(stop,), daemon=True).start()


def _wait_for_signals(stop: Callable[[], None]) -> None:
    while True:
        signal.sigwait(_STOP)
        stop()
