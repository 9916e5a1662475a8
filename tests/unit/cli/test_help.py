"""The output of `--help` for every command."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click
import pytest

from worker.cli import main
from worker.cli.options import Setting

if TYPE_CHECKING:
    from collections.abc import Iterator


def contexts(
    command: click.Command, name: str = "klaviyo-worker", parent: click.Context | None = None
) -> dict[str, click.Context]:
    """Return the context of every command, for a terminal of 80 columns."""
    context = command.make_context(name, [], parent, resilient_parsing=True, terminal_width=80)
    found = {context.command_path: context}
    for inner, entry in command.commands.items() if isinstance(command, click.Group) else ():
        found |= contexts(entry, inner, context)
    return found


HELP = contexts(main)


def options(path: str) -> Iterator[click.Option]:
    params = HELP[path].command.get_params(HELP[path])
    return (param for param in params if isinstance(param, click.Option))


@pytest.mark.parametrize("path", HELP)
def test_every_command_and_option_has_help(path: str) -> None:
    """The first sentence of a command fits beside its name on a terminal of 80 columns."""
    assert HELP[path].command.help
    assert all(option.help for option in options(path))
    listed = HELP[path].get_help().partition("\nCommands:\n")[2].partition("\n\n")[0]
    assert not [line for line in listed.splitlines() if line.endswith("...")]


@pytest.mark.parametrize("path", HELP)
def test_settings_and_own_options_are_separate_sections(path: str) -> None:
    """The many settings do not hide the few options of a command."""
    text = HELP[path].get_help()
    own, settings = (text.partition(f"\n{title}:\n")[2].partition("\n\n")[0] for title in ("Options", "Settings"))
    assert all(line[2] in " -" for line in own.splitlines())
    for option in options(path):
        is_setting = isinstance(option, Setting)
        assert (f"{option.opts[-1]} " in settings, f"{option.opts[-1]} " in own) == (is_setting, not is_setting)


def test_setting_shows_its_type() -> None:
    """The metavar is a list of choices, a number, a file or a URL."""
    text = " ".join(HELP["klaviyo-worker run"].get_help().split())
    shown = "--bulk-events auto|always|never", "--lanes INTEGER", "--rate-limit-share NUMBER", "--config FILE"
    for flag in (*shown, "--queue-url URL", "--ct-project-id TEXT"):
        assert f"{flag} " in text
    files = [option.opts for option in options("klaviyo-worker run") if isinstance(option.type, click.Path)]
    assert files == [["--config"], ["--http-tls-certificate"], ["--http-tls-key"]]
