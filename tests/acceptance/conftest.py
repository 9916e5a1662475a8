"""The installed command in a subprocess, with its own environment."""

from __future__ import annotations

import json
import os
import subprocess
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import orjson
import pytest

from adapters import SupportsPublish, open_queue
from tests.support.installed import COMMAND

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from worker.sandbox import Sandbox

_started: list[subprocess.Popen[bytes]] = []


@dataclass
class Worker:
    """`klaviyo-worker` with a sandbox and a queue of its own."""

    environment: dict[str, str]
    directory: Path

    def __call__(
        self, *arguments: str, stdin: bytes = b"", env: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run the command to its end, and return exit code and output."""
        done = subprocess.run(
            [COMMAND, *arguments],
            input=stdin,
            capture_output=True,
            env=self._environment(env or {}),
            cwd=self.directory,
            timeout=240,
            check=False,
        )
        return subprocess.CompletedProcess(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())

    def start(self, *arguments: str, env: dict[str, str] | None = None) -> subprocess.Popen[bytes]:
        """Start the command and return the process. Its log is in `log`."""
        with self.log.open("wb") as stderr:
            process = subprocess.Popen(
                [COMMAND, *arguments], env=self._environment(env or {}), cwd=self.directory, stderr=stderr
            )
        _started.append(process)
        return process

    @property
    def log(self) -> Path:
        """Return the path of the log of a started worker."""
        return self.directory / "worker.log"

    def publish(self, *bodies: bytes | dict[str, Any]) -> None:
        """Publish messages directly to the queue."""
        with closing(open_queue(self.environment["QUEUE_URL"])) as queue:
            assert isinstance(queue, SupportsPublish)
            queue.publish([body if isinstance(body, bytes) else json.dumps(body).encode() for body in bodies])

    def dead_letters(self) -> list[dict[str, Any]]:
        """Return the output of `dlq list --json`."""
        return [json.loads(line) for line in self("dlq", "list", "--json").stdout.splitlines()]

    def _environment(self, extra: dict[str, str]) -> dict[str, str]:
        path = {name: os.environ[name] for name in ("PATH", "PYTHONPATH", "HOME") if name in os.environ}
        merged = path | self.environment | extra
        return {name: value for name, value in merged.items() if value}


@pytest.fixture(autouse=True)
def kill_remaining_processes() -> Iterator[None]:
    """Kill the processes of a failed test, so that they do not disturb the next one."""
    yield
    while _started:
        process = _started.pop()
        process.kill()
        process.wait()


@pytest.fixture
def worker(sandbox: Sandbox, tmp_path: Path) -> Worker:
    return Worker(sandbox.environment | {"QUEUE_URL": f"embedded://{tmp_path}/queue.db"}, tmp_path)


def log_lines(stderr: str) -> list[dict[str, Any]]:
    """Return the canonical log lines of a run."""
    return [line for line in json_lines(stderr) if line["event"] == "message_processed"]


def events_named(worker: Worker, name: str) -> list[dict[str, Any]]:
    """Return the log lines of a started worker with this event name."""
    return [line for line in json_lines(worker.log.read_text()) if line["event"] == name]


def settled(worker: Worker) -> set[str]:
    """Return the ids of the messages that a started worker has acknowledged."""
    lines = log_lines(worker.log.read_text())
    return {line["message_id"] for line in lines if line["outcome"] in {"sent", "ignored"}}


def json_lines(stderr: str) -> list[dict[str, Any]]:
    """Return all JSON lines of a run, except an incomplete last line."""
    complete = stderr[: stderr.rfind("\n") + 1]
    return [orjson.loads(line) for line in complete.splitlines() if line.startswith("{")]
