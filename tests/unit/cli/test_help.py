"""What `--help` says, of every command there is."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click
import pytest

from worker import renamed
from worker.cli import main
from worker.cli.options import Setting

if TYPE_CHECKING:
    from collections.abc import Iterator


def contexts(
    command: click.Command, name: str = "klaviyo-worker", parent: click.Context | None = None
) -> dict[str, click.Context]:
    """Return every command's context, as on a terminal of 80 columns."""
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
def test_every_command_and_option_says_what_it_does(path: str) -> None:
    """The first sentence fits beside the command's name on a terminal of 80 columns."""
    assert HELP[path].command.help
    assert all(option.help for option in options(path))
    listed = HELP[path].get_help().partition("\nCommands:\n")[2].partition("\n\n")[0]
    assert not [line for line in listed.splitlines() if line.endswith("...")]


@pytest.mark.parametrize("path", HELP)
def test_settings_are_listed_apart_from_a_commands_own_options(path: str) -> None:
    """Thirty settings must not bury three options."""
    text = HELP[path].get_help()
    own, settings = (text.partition(f"\n{title}:\n")[2].partition("\n\n")[0] for title in ("Options", "Settings"))
    assert all(line[2] in " -" for line in own.splitlines())
    for option in options(path):
        is_setting = isinstance(option, Setting)
        assert (f"{option.opts[-1]} " in settings, f"{option.opts[-1]} " in own) == (is_setting, not is_setting)


@pytest.mark.parametrize(("old", "new"), renamed.OPTIONS.items())
def test_a_former_option_names_its_replacement(old: str, new: str) -> None:
    """Every command that has the new option knows the former one; the exit code is that of a usage error."""
    users = [path for path in HELP if any(new in option.opts for option in options(path))]
    assert users
    for path in users:
        with pytest.raises(click.UsageError) as error:
            HELP[path].command.make_context(path, [old, "1"], HELP[path].parent)
        assert (error.value.exit_code, error.value.message) == (2, f"{old} was renamed: use {new}")


def test_a_former_option_is_unknown_to_a_command_without_the_new_one() -> None:
    """Its replacement would be unknown too."""
    with pytest.raises(click.NoSuchOption):
        HELP["klaviyo-worker handlers"].command.make_context("handlers", ["--metrics-port", "1"])


def test_a_setting_shows_what_it_takes() -> None:
    """A choice, a number, a file, a URL."""
    text = " ".join(HELP["klaviyo-worker run"].get_help().split())
    shown = "--bulk-events auto|always|never", "--lanes INTEGER", "--rate-limit-share NUMBER", "--config FILE"
    for flag in (*shown, "--queue-url URL", "--ct-project-id TEXT"):
        assert f"{flag} " in text
    files = [option.opts for option in options("klaviyo-worker run") if isinstance(option.type, click.Path)]
    assert files == [["--config"]]
