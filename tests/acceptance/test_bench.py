"""`make bench`: a small run, and the parts of the benchmarks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import processes
from benchmarks.messages import MESSAGE_KINDS, MIXTURE
from benchmarks.processes import BenchmarkError, Worker
from benchmarks.rows import percentile, time_waiting

ROOT = Path(__file__).parents[2]


def test_small_run_returns_plausible_figures(tmp_path: Path) -> None:
    """The run itself checks the effects of all messages; calls and CPU are counted."""
    options = ["--messages", "60", "--latency", "0", "--kind", "mixture", "--queue", "embedded"]
    command = [sys.executable, "-m", "benchmarks", *options, "--json", str(tmp_path / "figures.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "figures.json").read_text(encoding="utf-8"))
    assert {"versions", "cores"} < figures.keys()
    (row,) = figures["rows"]
    assert (row["row"], row["queue"], row["latency_ms"], row["messages"]) == ("mixture", "embedded", 0, 60)
    assert 0 < row["klaviyo_calls"] < 4 * 60  # events are sent individually, on a busy machine
    assert 0 < row["commercetools_calls"] < 60
    assert row["klaviyo_calls_answered_429"] == row["retried"] == 0
    assert 0 < row["cpu_s"] < 30
    assert 20 < row["peak_rss_mb"] < 1_000
    assert 0 < row["age_p50_s"] <= row["age_p99_s"] < 60
    assert row["messages_per_s"] == pytest.approx(60 / row["seconds"])
    assert done.stdout.splitlines()[-1].split()[:3] == ["mixture", "embedded", "0"]


def test_worker_that_exits_fails_the_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names the exit code."""
    monkeypatch.setattr(processes, "COMMAND", "false")
    with Worker({}, tmp_path / "log") as worker, pytest.raises(BenchmarkError, match=r"^the worker exited with 1: "):
        worker.wait_until_started()


def test_message_kinds_declare_their_effects() -> None:
    """Half of the mixture are orders, a fifth is stock whose products Klaviyo must already have."""
    assert {kind.name: dict(kind.added(1)) for kind in MESSAGE_KINDS[:4]} == {
        "orders of 3 lines": {"events": 4, "profiles": 1},
        "orders of 3 lines, half by guests": {"events": 4, "profiles": 1},
        "orders of 3 lines, fetched": {"events": 4, "profiles": 1},
        "order states": {"events": 1, "profiles": 1},
    }
    assert dict(MIXTURE.added(20)) == {"events": 42, "profiles": 15, "items": 1, "variants": 2}
    assert len(MIXTURE.stocked(20)) == 4
    assert len(set(MIXTURE.bodies(40))) == 40


def test_messages_about_one_resource_add_its_objects_once() -> None:
    """Ten changes of a cart are one checkout and three added lines."""
    carts = next(kind for kind in MESSAGE_KINDS if kind.changes == 10)
    assert dict(carts.added(25)) == {"events": 12, "profiles": 3}
    assert len(set(carts.bodies(25))) == 3


def test_percentile_is_a_measured_value() -> None:
    """The method is nearest rank: of few values, the highest is the 99th percentile."""
    values = [float(value) for value in range(100, 0, -1)]
    assert [percentile(values, share) for share in (0.5, 0.99, 1.0)] == [50.0, 99.0, 100.0]
    assert percentile([3.0, 1.0], 0.99) == 3.0


@pytest.mark.parametrize(
    ("answers", "expected"),
    [([], 0.0), ([1.5], 0.5), ([1.5, 1.5], 0.5), ([1.5, 1.75], 0.75), ([1.5, 2.25], 1.0), ([0.5, 3.5], 0.0)],
)
def test_concurrent_calls_count_once(answers: list[float], expected: float) -> None:
    """Each call takes half a second; those answered outside the span do not count."""
    assert time_waiting(answers, (1.0, 3.0), 0.5) == expected
