"""`make faults`: every scenario on every queue, and a table of what became of the messages."""

from __future__ import annotations

import argparse
import shutil
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click

from tests.faults.harness import Result, Scenario, run
from tests.faults.scenarios import SCENARIOS, mixture
from tests.rigs import RIGS, rig_type

LOGS = Path("build/faults")
SIZE = 150  # good messages
_COLUMNS = ("SCENARIO", "QUEUE", "MESSAGES", "LOST", "DOUBLED", "DEAD-LETTERED WRONGLY", "EXTRA ATTEMPTS")
_ROW = "{:<62}  {:<10}  {:>8}  {:>4}  {:>7}  {:>21}  {:>14}"


def main() -> int:
    """Run what was asked for and return the exit code: 1 when a message was lost, doubled or buried wrongly."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="only scenarios whose name holds this")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="random mixtures to run (default: 3)")
    parser.add_argument("--first-seed", type=int, default=1, metavar="N", help="of the mixtures (default: 1)")
    parser.add_argument("--queue", choices=RIGS, help="only this queue")
    arguments = parser.parse_args()
    mixtures = [mixture(arguments.first_seed + number) for number in range(arguments.seeds)]
    chosen = [one for one in (*SCENARIOS, *mixtures) if not arguments.names or _is_named(one, arguments.names)]
    shutil.rmtree(LOGS, ignore_errors=True)
    click.echo(_ROW.format(*_COLUMNS))
    with ExitStack() as stack:
        servers = _servers([arguments.queue] if arguments.queue else list(RIGS), stack)
        pairs = [(scenario, name) for scenario in chosen for name in servers if name in scenario.queues]
        wrong = [not _show(scenario, name, servers[name]) for scenario, name in pairs]
    return int(any(wrong) or not wrong)


def _servers(names: list[str], stack: ExitStack) -> dict[str, Any]:
    """Start what stands in for the services, as far as it is installed."""
    running = {}
    for name in names:
        if why := rig_type(name).missing():
            click.echo(f"{name} is left out: {why}")
        else:
            running[name] = stack.enter_context(rig_type(name).server())
    return running


def _is_named(scenario: Scenario, names: list[str]) -> bool:
    return any(name.lower() in scenario.name.lower() for name in names)


def _show(scenario: Scenario, name: str, server: Any) -> bool:
    """Run a scenario, print its row, and tell whether every message came to its right end."""
    directory = (LOGS / f"{''.join(c if c.isalnum() else '-' for c in scenario.name)[:60]}-{name}").resolve()
    directory.mkdir(parents=True)
    try:
        result = run(scenario, name, rig_type(name)(server, directory, kills=scenario.kills), directory, SIZE)
    except AssertionError as error:
        click.echo(f"{scenario.name} on {name}: {error}")
        return False
    click.echo(_row(result))
    if not result.is_right:
        click.echo(f"    {result}")
    return result.is_right


def _row(result: Result) -> str:
    wrong = (len(result.lost), len(result.doubled), len(result.dead_lettered_wrongly))
    return _ROW.format(result.scenario[:62], result.queue, result.messages, *wrong, result.extra_attempts)


if __name__ == "__main__":
    sys.exit(main())
