"""`make faults`: runs every scenario on every queue, and prints the outcomes of the messages."""

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
_COLUMNS = ("SCENARIO", "QUEUE", "MESSAGES", "LOST", "DUPLICATED", "DEAD-LETTERED WRONGLY", "EXTRA ATTEMPTS")
_ROW = "{:<62}  {:<10}  {:>8}  {:>4}  {:>10}  {:>21}  {:>14}"


def main() -> int:
    """Run the scenarios. Return 1 if a message was lost, duplicated or wrongly dead-lettered, else 0."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="only scenarios whose name contains this")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="number of random mixtures (default: 3)")
    parser.add_argument("--first-seed", type=int, default=1, metavar="N", help="seed of the first mixture (default: 1)")
    parser.add_argument("--queue", choices=RIGS, help="only this queue")
    arguments = parser.parse_args()
    mixtures = [mixture(arguments.first_seed + number) for number in range(arguments.seeds)]
    selected = [
        scenario
        for scenario in (*SCENARIOS, *mixtures)
        if not arguments.names or _name_matches(scenario, arguments.names)
    ]
    shutil.rmtree(LOGS, ignore_errors=True)
    click.echo(_ROW.format(*_COLUMNS))
    with ExitStack() as stack:
        servers = _servers([arguments.queue] if arguments.queue else list(RIGS), stack)
        pairs = [(scenario, name) for scenario in selected for name in servers if name in scenario.queues]
        failed = [not _run_and_print(scenario, name, servers[name]) for scenario, name in pairs]
    return int(any(failed) or not failed)


def _servers(names: list[str], stack: ExitStack) -> dict[str, Any]:
    """Start the emulators of the queues that are installed."""
    running = {}
    for name in names:
        if requirement := rig_type(name).missing():
            click.echo(f"{name} is skipped: {requirement}")
        else:
            running[name] = stack.enter_context(rig_type(name).server())
    return running


def _name_matches(scenario: Scenario, names: list[str]) -> bool:
    return any(name.lower() in scenario.name.lower() for name in names)


def _run_and_print(scenario: Scenario, name: str, server: Any) -> bool:
    """Run a scenario and print its row. Return whether every message has its expected outcome."""
    directory = (LOGS / f"{''.join(c if c.isalnum() else '-' for c in scenario.name)[:60]}-{name}").resolve()
    directory.mkdir(parents=True)
    try:
        result = run(scenario, name, rig_type(name)(server, directory, kills=scenario.kills), directory, SIZE)
    except AssertionError as error:
        click.echo(f"{scenario.name} on {name}: {error}")
        return False
    click.echo(_row(result))
    if not result.is_correct:
        click.echo(f"    {result}")
    return result.is_correct


def _row(result: Result) -> str:
    counts = (len(result.lost), len(result.duplicated), len(result.dead_lettered_wrongly))
    return _ROW.format(result.scenario[:62], result.queue, result.messages, *counts, result.extra_attempts)


if __name__ == "__main__":
    sys.exit(main())
