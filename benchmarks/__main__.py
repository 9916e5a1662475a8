"""`python -m benchmarks`: runs benchmarks, prints tables and writes JSON."""

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
from benchmarks.messages import CUSTOMER, MESSAGE_KINDS, MIXTURE, ORDER, ORDERS, MessageKind
from benchmarks.processes import BenchmarkError
from benchmarks.queues import missing_requirement
from benchmarks.rows import (
    DRAIN_ORDERS,
    RATE_LIMIT_FACTOR,
    SHARED_ORDERS,
    SHARED_WORKERS,
    SINGLE_ORDERS,
    Drain,
    Idle,
    Memory,
    Throughput,
)
from tests.rigs import RIGS

AnyRow = Throughput | Drain | Idle | Memory

_LATENCIES = (0.0, 50.0, 200.0)  # ms
_LATENCY = 50.0  # ms
_IDLE_KINDS = (MessageKind("orders of 3 lines", (ORDER,)), MessageKind("customer updates", (CUSTOMER,)))
_INTRODUCTION = f"""\
Each row starts the sandbox, publishes its messages and starts the installed worker with default settings. Sandbox and
worker are separate processes. LATENCY MS is the latency of each call. The account has {RATE_LIMIT_FACTOR} times
Klaviyo's documented rate limits, so that the worker is the bottleneck; the rows under LIMITS use the documented limits.
The account ignores repeated events and was asked (`klaviyo-worker check --probe-bulk`), so the worker sends events in
bulk. In the rows "no verdict" it was not asked.
CPU is the user and system time of the whole worker process, from start to exit. The age of a message starts when it is
published, before the worker starts."""


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--messages", type=int, default=5_000, help="messages per throughput row (default: 5000)")
    parser.add_argument("--latency", type=float, nargs="*", help="only rows with these latencies, in ms")
    parser.add_argument("--kind", default="", help="only rows whose name contains this text")
    parser.add_argument("--queue", choices=RIGS, help="only rows on this queue")
    parser.add_argument("--quick", action="store_true", help="only throughput rows with 1,000 messages and 50 ms")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all results to this file")
    return parser.parse_args()


def _all_rows(messages: int) -> list[AnyRow]:
    other_queues = [name for name in RIGS if name != "embedded" and not missing_requirement(name)]
    return [
        *(
            Throughput(kind, latency, "embedded", kind.messages or messages)
            for latency in _LATENCIES
            for kind in MESSAGE_KINDS
        ),
        *(Throughput(kind, _LATENCY, name, messages) for name in other_queues for kind in (ORDERS, MIXTURE)),
        *(Idle(kind, latency) for latency in _LATENCIES[:2] for kind in _IDLE_KINDS),
        Memory(),
        Drain(f"drain {DRAIN_ORDERS:,} orders of 3 lines", DRAIN_ORDERS, 1),
        Drain(f"{SHARED_WORKERS} workers, one account", SHARED_ORDERS, SHARED_WORKERS),
        Drain("default, no verdict", SINGLE_ORDERS, 1, has_verdict=False),
    ]


def _select_rows(arguments: argparse.Namespace) -> list[AnyRow]:
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


def _measure_in_new_process(row: AnyRow) -> dict[str, Any]:
    """Measure in a new, small process: on Linux, a child process inherits the peak memory of its parent."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as executor:
        return {"table": row.table, "row": row.name, **executor.submit(row.measure).result()}


def _environment_info() -> dict[str, Any]:
    names = ("klaviyo-worker", "klaviyo-api", "commercetools", "google-cloud-pubsub", "orjson", "urllib3")
    versions = {"python": platform.python_version(), **{name: version(name) for name in names}}
    return {"versions": versions, "platform": f"{platform.system()} {platform.machine()}", "cores": os.cpu_count()}


def main() -> int:
    """Run the rows and report failures. Return 1 if a row failed, else 0."""
    arguments = _arguments()
    rows, environment, started_at = _select_rows(arguments), _environment_info(), time.monotonic()
    if not rows:
        sys.exit("no row matches --kind, --latency and --queue: run without options to run all rows")
    print(_INTRODUCTION)
    print(f"Python {environment['versions']['python']}, {environment['cores']} cores, {environment['platform']}.")
    measured: list[dict[str, Any]] = []
    for number, row in enumerate(rows, 1):
        at = f"{number}/{len(rows)}, {time.monotonic() - started_at:.0f} s"
        _print_status(f"[{at}] {row.name}, {row.queue}, {row.latency_ms:.0f} ms")
        try:
            figures = _measure_in_new_process(row)
        except BenchmarkError as error:
            _print_status(f"FAILED: {error}")
            continue
        if not measured or measured[-1]["table"] != row.table:
            print(report.heading(row.table))
        print(report.line(row.table, figures), flush=True)
        measured.append(figures)
        if arguments.json:
            arguments.json.write_bytes(orjson.dumps({**environment, "rows": measured}, option=orjson.OPT_INDENT_2))
    _print_status(f"{len(measured)} of {len(rows)} rows in {time.monotonic() - started_at:.0f} s")
    return int(len(measured) < len(rows))


def _print_status(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
