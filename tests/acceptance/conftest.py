"""The installed command, run as a user runs it: a subprocess with an environment."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson
import pytest

from adapters import SupportsPublish, open_queue

if TYPE_CHECKING:
    from collections.abc import Iterator

    from worker.sandbox import Sandbox

NOT_MEASURED = {"COVERAGE_PROCESS_START": "", "COVERAGE_PROCESS_CONFIG": ""}  # coverage costs a third more
COMMAND = str(Path(sys.executable).with_name("klaviyo-worker"))
_started: list[subprocess.Popen[bytes]] = []


@dataclass
class Worker:
    """Runs `klaviyo-worker` against a sandbox and a queue of its own."""

    environment: dict[str, str]
    directory: Path

    def __call__(
        self, *arguments: str, stdin: bytes = b"", env: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run to the end and return exit code and output."""
        done = subprocess.run(
            [COMMAND, *arguments],
            input=stdin,
            capture_output=True,
            env=self._environment(env or {}),
            cwd=self.directory,
            timeout=120,
            check=False,
        )
        return subprocess.CompletedProcess(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())

    def start(self, *arguments: str, env: dict[str, str] | None = None) -> subprocess.Popen[bytes]:
        """Start and return the process; its log is in `log`."""
        with self.log.open("wb") as stderr:
            process = subprocess.Popen(
                [COMMAND, *arguments], env=self._environment(env or {}), cwd=self.directory, stderr=stderr
            )
        _started.append(process)
        return process

    @property
    def log(self) -> Path:
        """Return where a started worker writes."""
        return self.directory / "worker.log"

    def publish(self, *bodies: bytes | dict[str, Any]) -> None:
        """Put messages into the queue. The command that does so has tests of its own."""
        with closing(open_queue(self.environment["QUEUE_URL"])) as queue:
            assert isinstance(queue, SupportsPublish)
            queue.publish([body if isinstance(body, bytes) else json.dumps(body).encode() for body in bodies])

    def dead_letters(self) -> list[dict[str, Any]]:
        """Return what `dlq list --json` prints."""
        return [json.loads(line) for line in self("dlq", "list", "--json").stdout.splitlines()]

    def _environment(self, extra: dict[str, str]) -> dict[str, str]:
        path = {
            name: os.environ[name] for name in os.environ if name in {"PATH", "HOME"} or name.startswith("COVERAGE")
        }
        merged = path | self.environment | extra
        return {name: value for name, value in merged.items() if value}


@pytest.fixture(autouse=True)
def none_left_running() -> Iterator[None]:
    """A test that fails half-way must not disturb the next one."""
    yield
    while _started:
        process = _started.pop()
        process.kill()
        process.wait()


@pytest.fixture
def worker(sandbox: Sandbox, tmp_path: Path) -> Worker:
    return Worker(sandbox.environment | {"QUEUE_URL": f"embedded://{tmp_path}/queue.db"}, tmp_path)


def log_lines(stderr: str) -> list[dict[str, Any]]:
    """Return the canonical lines of a run."""
    return [line for line in json_lines(stderr) if line["event"] == "message_processed"]


def events_named(worker: Worker, name: str) -> list[dict[str, Any]]:
    """Return the lines of a started worker with this name."""
    return [line for line in json_lines(worker.log.read_text()) if line["event"] == name]


def settled(worker: Worker) -> set[str]:
    """Return the messages that a started worker has acknowledged."""
    lines = log_lines(worker.log.read_text())
    return {line["message_id"] for line in lines if line["outcome"] in {"sent", "ignored"}}


def json_lines(stderr: str) -> list[dict[str, Any]]:
    """Return all lines of a run that are JSON, except one that is still being written."""
    whole = stderr[: stderr.rfind("\n") + 1]
    return [orjson.loads(line) for line in whole.splitlines() if line.startswith("{")]
