"""Parts that the commands share: options for settings, the sections of --help, and opening the queue."""

from __future__ import annotations

from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn, get_args, get_origin

import click

from adapters import QueueAdapter, open_queue
from worker.cli.termination import run_process

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pydantic.fields import FieldInfo
    from pydantic_settings import BaseSettings

    from worker.settings import QueueSettings

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


def settings_options(
    kind: type[BaseSettings], without: frozenset[str] = frozenset()
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Add an option for every setting of `kind` except secrets and `without`. `load` validates the values."""

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        for name, info in reversed(kind.model_fields.items()):
            if name not in SECRETS | without:
                default = info.get_default()
                default_text = "" if default in (None, "") or info.is_required() else f"  [default: {default}]"
                text = f"{info.description}{default_text}  [env: {info.validation_alias}]"
                option_name = "--" + name.replace("_", "-")
                metavar = _metavar(info)
                kind_of_value = click.Path() if metavar == "FILE" else str  # lets shells complete a path
                option = click.option(
                    option_name, name, cls=Setting, type=kind_of_value, default=None, help=text, metavar=metavar
                )
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
def open_configured_queue(settings: QueueSettings) -> Iterator[QueueAdapter]:
    """Open the queue of the settings, and close it afterwards."""
    queue = open_queue(settings.queue_url, settings.queue_options)
    try:
        yield queue
    finally:
        queue.close()
