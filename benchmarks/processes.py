"""The sandbox and the installed worker, each in a process of its own."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import orjson
import urllib3

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

COMMAND = str(Path(sys.executable).with_name("klaviyo-worker"))
STALL = 120.0  # seconds without a settled message after which a row has failed
START = 30.0  # seconds in which a worker must have started
SERVICES = {"klaviyo": "KLAVIYO_API_URL", "commercetools": "CT_API_URL"}
_HTTP = urllib3.PoolManager()
_VARIABLES = 7  # that the sandbox prints


class BenchmarkError(Exception):
    """A row that measured nothing, and why."""


class Sandbox:
    """A sandbox elsewhere: `environment` points a worker at it."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self.environment = environment
        self._before = {service: Counts({}) for service in SERVICES}

    def begin(self) -> None:
        """Count from here."""
        self._before = {service: self._counts(service) for service in SERVICES}

    def added(self) -> dict[str, int]:
        """Return what the account has more than at the beginning."""
        now, before = self._counts("klaviyo").document, self._before["klaviyo"].document
        return {name: count - before.get(name, 0) for name, count in now.items() if isinstance(count, int)}

    def calls(self, service: str, status: str = "") -> int:
        """Return the requests since the beginning; those answered with `status`, if given."""
        return self._counts(service).requests(status) - self._before[service].requests(status)

    def log(self, service: str) -> list[dict[str, Any]]:
        """Return the request log: method, path, status, at (when it was answered, seconds since the epoch)."""
        lines: list[dict[str, Any]] = self._get(service, "requests")
        return lines

    def fill_catalog(self, numbers: Sequence[int]) -> None:
        """Put products and their first variants into Klaviyo."""
        texts = {"title": "Slim Jeans", "description": "Blue", "url": "https://shop.example"}
        stock = {"inventory_quantity": 0, "price": 89.0}
        for start in range(0, len(numbers), 100):
            some = numbers[start : start + 100]
            items = [{"attributes": texts | {"external_id": f"product-{n}"}} for n in some]
            variants = [
                {
                    "attributes": texts | stock | {"external_id": f"sku-{n}-1", "sku": f"sku-{n}-1"},
                    "relationships": {"item": {"data": {"type": "catalog-item", "id": _catalog_id(f"product-{n}")}}},
                }
                for n in some
            ]
            self._create("item", items)
            self._create("variant", variants)

    def _create(self, kind: str, entries: list[dict[str, Any]]) -> None:
        job = f"catalog-{kind}-bulk-create-job"
        data = [{"type": f"catalog-{kind}", **entry} for entry in entries]
        body = {"data": {"type": job, "attributes": {f"{kind}s": {"data": data}}}}
        headers = {
            "Authorization": f"Klaviyo-API-Key {self.environment['KLAVIYO_AUTH_KEY']}",
            "Content-Type": "application/vnd.api+json",
            "revision": "2026-07-15",
        }
        url = f"{self.environment['KLAVIYO_API_URL']}/api/{job}s"
        answer = _HTTP.request("POST", url, body=orjson.dumps(body), headers=headers)
        if answer.status != 202:  # noqa: PLR2004
            raise BenchmarkError(f"the sandbox took no catalog: {answer.data.decode()[:200]}")

    def _counts(self, service: str) -> Counts:
        return Counts(self._get(service, "counts"))

    def _get(self, service: str, what: str) -> Any:
        return _HTTP.request("GET", f"{self.environment[SERVICES[service]]}/_sandbox/{what}").json()


@dataclass(frozen=True, slots=True)
class Counts:
    """What `/_sandbox/counts` answers."""

    document: dict[str, Any]

    def requests(self, status: str = "") -> int:
        """Return the requests; those answered with `status`, if given."""
        endpoints = self.document.get("requests", {}).values()
        return sum(n for statuses in endpoints for each, n in statuses.items() if status in {"", each})


def _catalog_id(external_id: str) -> str:
    return f"$custom:::$default:::{external_id}"


@contextmanager
def sandbox(*options: str) -> Iterator[Sandbox]:
    """Run a sandbox with these options."""
    command = [sys.executable, "-m", "worker.sandbox", "--commercetools-port", "0", "--klaviyo-port", "0", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            words = [shlex.split(process.stdout.readline()) for _ in range(_VARIABLES)]
            yield Sandbox(dict(word[1].split("=", 1) for word in words))
        finally:
            process.terminate()


@dataclass(frozen=True, slots=True)
class Settled:
    """When a message was settled (seconds since the epoch), and how old it was (seconds)."""

    at: float
    age: float


@dataclass(frozen=True, slots=True)
class Usage:
    """What a worker's whole process took: seconds of user and system time, and megabytes at most."""

    cpu: float
    peak_rss: float


class Worker:
    """The installed command with its default settings, followed by its log."""

    def __init__(self, environment: Mapping[str, str], log: Path) -> None:
        self.settled: list[Settled] = []
        self.retried = 0
        self.started = 0.0  # seconds since the epoch
        self._log = log
        self._path = {"PATH": os.environ["PATH"]}
        self.spawned = time.time()
        with log.open("wb") as stderr:
            self._process = subprocess.Popen(
                [COMMAND, "run", "--log-format", "json"], env=self._path | {**environment}, stderr=stderr
            )
        self._lines = log.open("rb")
        self._rest = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """End it, however the row ended."""
        self._lines.close()
        if self._process.returncode is None:
            self._process.kill()
            self._process.wait()

    def wait_started(self) -> None:
        """Wait until it says so. Raises BenchmarkError."""
        deadline = time.monotonic() + START
        while not self.started:
            if time.monotonic() > deadline:
                raise BenchmarkError(f"the worker did not start in {START:.0f} s: {self._last_words()}")
            time.sleep(0.005)
            self.follow()

    def follow(self) -> None:
        """Read what is new in the log. Raises BenchmarkError when a message or the worker came to a bad end."""
        *lines, self._rest = (self._rest + self._lines.read()).split(b"\n")
        for line in lines:
            if line.startswith(b"{"):
                self._note(orjson.loads(line))
        if self._process.poll() is not None:
            raise BenchmarkError(f"the worker ended with {self._process.returncode}: {self._last_words()}")

    def _note(self, line: dict[str, Any]) -> None:
        if line["event"] == "started":
            self.started = _seconds(line["time"])
        elif line["event"] == "message_processed" and line["outcome"] == "sent":
            self.settled.append(Settled(_seconds(line["time"]), line["age_s"]))
        elif line["event"] == "message_processed" and line["outcome"] == "retried":
            self.retried += 1
        elif line["event"] == "message_processed":
            raise BenchmarkError(f"a message was {line['outcome']}: {line['reason']}")

    def stop(self) -> Usage:
        """Send SIGTERM, wait for the end and return what it took. Raises BenchmarkError."""
        self._process.terminate()
        _, status, usage = os.wait4(self._process.pid, 0)
        self._process.returncode = os.waitstatus_to_exitcode(status)
        if self._process.returncode:
            raise BenchmarkError(f"the worker ended with {self._process.returncode}: {self._last_words()}")
        unit = 1_000_000 if sys.platform == "darwin" else 1_000  # of ru_maxrss: bytes, kilobytes
        return Usage(usage.ru_utime + usage.ru_stime, usage.ru_maxrss / unit)

    def _last_words(self) -> str:
        return self._log.read_text(encoding="utf-8")[-500:].strip()


def wait_settled(workers: Sequence[Worker], messages: int, *, poll: float = 0.05) -> None:
    """Wait until workers have settled so many messages together. Raises BenchmarkError when nothing moves on."""
    before, deadline = 0, time.monotonic() + STALL
    while (settled := sum(len(worker.settled) for worker in workers)) < messages:
        if settled > before:
            before, deadline = settled, time.monotonic() + STALL
        if time.monotonic() > deadline:
            raise BenchmarkError(f"{settled} of {messages} messages were settled, then none for {STALL:.0f} s")
        time.sleep(poll)
        for worker in workers:
            worker.follow()


def _seconds(stamp: str) -> float:
    return datetime.fromisoformat(stamp).timestamp()
