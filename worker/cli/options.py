"""Parts that the commands share: options for settings, the sections of --help, and opening the queue."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn, get_args, get_origin

import click

from adapters import QueueAdapter, open_queue
from worker.cli.termination import run_process

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pydantic.fields import FieldInfo
    from pydantic_settings import BaseSettings

    from worker.settings import QueueSettings

Decorator = Callable[[Callable[..., None]], Callable[..., None]]  # of the function of a command
SECRETS = frozenset(
    {"ct_api_client", "destination_secret", "http_password", "klaviyo_auth_key", "servicebus_connection_string"}
)


class Setting(click.Option):
    """An option for a setting."""


class Command(click.Command):
    """A command whose help lists its own options and the settings in separate sections."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the two sections."""
        options = [param for param in self.get_params(ctx) if isinstance(param, click.Option)]
        for title, are_settings in (("Options", False), ("Settings", True)):
            selected = [option for option in options if isinstance(option, Setting) == are_settings]
            if records := [record for option in selected if (record := option.get_help_record(ctx))]:
                with formatter.section(title):
                    formatter.write_dl(records)


class Group(click.Group):
    """A group whose commands are of the class `Command`."""

    command_class = Command

    def __call__(self, *arguments: Any, **options: Any) -> NoReturn:
        """Run the command as this process, which ends even if threads hang."""
        run_process(partial(self.main, *arguments, **options))


def with_options(*options: Decorator) -> Decorator:
    """Return a decorator that adds the options in this order."""

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


def settings_options(kind: type[BaseSettings], without: frozenset[str] = frozenset()) -> Decorator:
    """Add an option for every setting of `kind` except secrets and `without`. `load` validates the values."""
    names = [name for name in kind.model_fields if name not in SECRETS | without]
    return with_options(*(_setting_option(name, kind.model_fields[name]) for name in names))


def _setting_option(name: str, info: FieldInfo) -> Decorator:
    default = info.get_default()
    default_text = "" if default in (None, "") or info.is_required() else f"  [default: {default}]"
    text = f"{info.description}{default_text}  [env: {info.validation_alias}]"
    metavar = _metavar(info)
    kind = click.Path() if metavar == "FILE" else str  # lets shells complete a path
    option = "--" + name.replace("_", "-")
    return click.option(option, name, cls=Setting, type=kind, default=None, help=text, metavar=metavar)


def _metavar(info: FieldInfo) -> str:
    if get_origin(info.annotation) is Literal:
        return "|".join(get_args(info.annotation))
    if str(info.validation_alias).endswith("_URL"):
        return "URL"
    kinds: dict[Any, str] = {int: "INTEGER", float: "NUMBER", Path | None: "FILE"}
    return kinds.get(info.annotation, "TEXT")


@contextmanager
def open_configured_queue(settings: QueueSettings) -> Iterator[QueueAdapter]:
    """Open the queue of the settings, and close it afterwards."""
    queue = open_queue(settings.queue_url, settings.queue_options)
    try:
        yield queue
    finally:
        queue.close()
