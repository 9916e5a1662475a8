"""The command in a process of its own, with its own environment."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import orjson
import pytest

from adapters import SupportsPublish, open_queue
from tests.support import fork_server
from tests.support.installed import COMMAND

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from worker.sandbox import Sandbox

    Process = fork_server.Process | subprocess.Popen[bytes]

_started: list[Process] = []


@dataclass
class Worker:
    """`klaviyo-worker` with a sandbox and a queue of its own."""

    environment: dict[str, str]
    directory: Path
    is_forked: bool = True  # False: start the installed command itself

    def __call__(
        self, *arguments: str, stdin: bytes = b"", env: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run the command to its end, and return exit code and output."""
        with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
            given.write(stdin)
            given.seek(0)
            process = self._start(arguments, env, given, stdout, stderr)
            code = process.wait(240)
            stdout.seek(0)
            stderr.seek(0)
            return subprocess.CompletedProcess(arguments, code, stdout.read().decode(), stderr.read().decode())

    def start(self, *arguments: str, env: dict[str, str] | None = None) -> Process:
        """Start the command and return the process. Its log is in `log`."""
        with self.log.open("wb") as stderr, Path(os.devnull).open("r+b") as nothing:
            return self._start(arguments, env, nothing, nothing, stderr)

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

    def _start(self, arguments: Sequence[str], env: dict[str, str] | None, *files: IO[Any]) -> Process:
        environment = self._environment(env or {})
        if self.is_forked and "TESTED_WORKER" not in os.environ:
            process: Process = fork_server.Process(arguments, environment, self.directory, files)
        else:
            stdin, stdout, stderr = files
            process = subprocess.Popen(
                [COMMAND, *arguments], env=environment, cwd=self.directory, stdin=stdin, stdout=stdout, stderr=stderr
            )
        _started.append(process)
        return process

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
