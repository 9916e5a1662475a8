"""`python -m benchmarks`: run the rows asked for, print tables, write JSON."""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import orjson

from benchmarks import report
from benchmarks.messages import CUSTOMER, KINDS, MIXTURE, ORDER, ORDERS, Kind
from benchmarks.processes import BenchmarkError
from benchmarks.queues import missing
from benchmarks.rows import DRAINED, RAISED, SHARED, WORKERS, Drain, Idle, Memory, Throughput
from tests.rigs import RIGS

AnyRow = Throughput | Drain | Idle | Memory

_LATENCIES = (0.0, 50.0, 200.0)  # ms
_LATENCY = 50.0  # ms
_SINGLES = (Kind("orders of 3 lines", (ORDER,)), Kind("customer updates", (CUSTOMER,)))
_INTRODUCTION = f"""\
Every row starts the sandbox, publishes its messages and starts the installed worker with default settings, each in a
process of its own. Calls take the latency given. The account has {RAISED} times Klaviyo's documented rate limits, so
that the worker is measured and not its account; in the rows under LIMITS it has the documented ones. CPU is user and
system time of the worker's whole process, start and end included. The age of a message counts from publishing, before
the worker starts."""


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--messages", type=int, default=5_000, help="of a row of throughput (default: 5000)")
    parser.add_argument("--latency", type=float, nargs="*", help="only rows with this latency of the services, in ms")
    parser.add_argument("--kind", default="", help="only rows whose name holds this text")
    parser.add_argument("--queue", choices=RIGS, help="only rows on this queue")
    parser.add_argument("--quick", action="store_true", help="only throughput: 1,000 messages, 50 ms")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there, too")
    return parser.parse_args()


def _all_rows(messages: int) -> list[AnyRow]:
    elsewhere = [name for name in RIGS if name != "embedded" and not missing(name)]
    return [
        *(Throughput(kind, latency, "embedded", messages) for latency in _LATENCIES for kind in KINDS),
        *(Throughput(kind, _LATENCY, name, messages) for name in elsewhere for kind in (ORDERS, MIXTURE)),
        *(Idle(kind, latency) for latency in _LATENCIES[:2] for kind in _SINGLES),
        Memory(),
        Drain(f"drain {DRAINED:,} orders of 3 lines", DRAINED, 1),
        Drain(f"{WORKERS} workers, one account", SHARED, WORKERS),
    ]


def _chosen(arguments: argparse.Namespace) -> list[AnyRow]:
    rows = _all_rows(1_000 if arguments.quick else arguments.messages)
    if arguments.quick:
        rows = [row for row in rows if row.table == "throughput" and row.latency_ms == _LATENCY]
    return [
        row
        for row in rows
        if arguments.kind in row.name
        and arguments.queue in {None, row.queue}
        and (not arguments.latency or row.latency_ms in arguments.latency)
    ]


def _measure(row: AnyRow) -> dict[str, Any]:
    """Measure in a new process, which is small: who starts a process lends it the peak of its own memory."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as executor:
        return {"table": row.table, "row": row.name, **executor.submit(row.measure).result()}


def _surroundings() -> dict[str, Any]:
    names = ("klaviyo-worker", "klaviyo-api", "commercetools", "google-cloud-pubsub", "orjson", "urllib3")
    versions = {"python": platform.python_version(), **{name: version(name) for name in names}}
    return {"versions": versions, "platform": f"{platform.system()} {platform.machine()}", "cores": os.cpu_count()}


def main() -> int:
    """Run the rows, tell what fails, and return 1 if anything did."""
    arguments = _arguments()
    rows, surroundings, began = _chosen(arguments), _surroundings(), time.monotonic()
    if not rows:
        sys.exit("no row has this kind, latency and queue; without options, all are run")
    print(_INTRODUCTION)
    print(f"Python {surroundings['versions']['python']}, {surroundings['cores']} cores, {surroundings['platform']}.")
    measured: list[dict[str, Any]] = []
    for number, row in enumerate(rows, 1):
        at = f"{number}/{len(rows)}, {time.monotonic() - began:.0f} s"
        _tell(f"[{at}] {row.name}, {row.queue}, {row.latency_ms:.0f} ms")
        try:
            figures = _measure(row)
        except BenchmarkError as error:
            _tell(f"FAILED: {error}")
            continue
        if not measured or measured[-1]["table"] != row.table:
            print(report.heading(row.table))
        print(report.line(row.table, figures), flush=True)
        measured.append(figures)
        if arguments.json:
            arguments.json.write_bytes(orjson.dumps({**surroundings, "rows": measured}, option=orjson.OPT_INDENT_2))
    _tell(f"{len(measured)} of {len(rows)} rows in {time.monotonic() - began:.0f} s")
    return int(len(measured) < len(rows))


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
