"""The sandbox and the installed worker as processes."""

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
from urllib.parse import urlencode

import orjson
import urllib3

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

COMMAND = str(Path(sys.executable).with_name("klaviyo-worker"))
STALL_TIMEOUT = 120.0  # seconds without a settled message after which a row fails
START_TIMEOUT = 30.0  # seconds within which a worker must start
SERVICES = {"klaviyo": "KLAVIYO_API_URL", "commercetools": "CT_API_URL"}
_HTTP = urllib3.PoolManager()
_VARIABLES = 7  # printed by the sandbox


class BenchmarkError(Exception):
    """A row failed. The text says why."""


class Sandbox:
    """A sandbox in another process. `environment` makes a worker use it."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self.environment = environment
        self._before = {service: Counts({}) for service in SERVICES}
        self._counting_since = 0.0  # seconds since the epoch

    def start_counting(self) -> None:
        """Start the counts of `added` and `calls` at zero, and `log` without lines."""
        self._before = {service: self._counts(service) for service in SERVICES}
        self._counting_since = time.time()

    def probe(self) -> None:
        """Ask the account what it does with repeated events, as an operator does. Raises BenchmarkError."""
        environment = {"PATH": os.environ["PATH"], **self.environment}
        command = [COMMAND, "check", "--probe-bulk", "--probe-wait", "1"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode or ": Klaviyo ignores a repeated event" not in done.stdout:
            raise BenchmarkError(f"the probe of bulk events failed: {done.stdout[-200:]}")

    def added(self) -> dict[str, int]:
        """Return the number of objects added to the account since `start_counting`, by kind."""
        now, before = self._counts("klaviyo").document, self._before["klaviyo"].document
        return {name: count - before.get(name, 0) for name, count in now.items() if isinstance(count, int)}

    def calls(self, service: str, status: str = "") -> int:
        """Return the number of requests since `start_counting`, optionally only those answered with `status`."""
        return self._counts(service).requests(status) - self._before[service].requests(status)

    def log(self, service: str) -> list[dict[str, Any]]:
        """Return the request log: method, path, status, and `at` (time of the response, in seconds since the epoch)."""
        lines: list[dict[str, Any]] = self._get(service, "requests")
        return [line for line in lines if line["at"] >= self._counting_since]

    def fill_catalog(self, numbers: Sequence[int]) -> None:
        """Create products and their first variants in Klaviyo."""
        content = {"title": "Slim Jeans", "description": "Blue", "url": "https://shop.example"}
        stock = {"inventory_quantity": 0, "price": 89.0}
        for start in range(0, len(numbers), 100):
            batch = numbers[start : start + 100]
            items = [{"attributes": content | {"external_id": f"product-{n}"}} for n in batch]
            variants = [
                {
                    "attributes": content | stock | {"external_id": f"sku-{n}-1", "sku": f"sku-{n}-1"},
                    "relationships": {"item": {"data": {"type": "catalog-item", "id": _catalog_id(f"product-{n}")}}},
                }
                for n in batch
            ]
            self._create("item", items)
            self._create("variant", variants)

    def import_customers(self, attributes: Sequence[dict[str, Any]]) -> None:
        """Write attributes to the profiles of the customers 1, 2, ..."""
        profiles = [
            {"type": "profile", "attributes": {"external_id": f"customer-{number}"} | each}
            for number, each in enumerate(attributes, 1)
        ]
        self._run_job("profile-bulk-import-job", "profiles", profiles)

    def count_customers(self, first_name: str) -> int:
        """Count the profiles of the customers 1 to 100 with a first name."""
        ids = ",".join(f'"customer-{number}"' for number in range(1, 101))
        query = urlencode({"filter": f"any(external_id,[{ids}])", "page[size]": 100})
        response = _HTTP.request("GET", f"{self._klaviyo}/api/profiles?{query}", headers=self._headers)
        return sum(profile["attributes"]["first_name"] == first_name for profile in response.json()["data"])

    def _create(self, kind: str, entries: list[dict[str, Any]]) -> None:
        data = [{"type": f"catalog-{kind}", **entry} for entry in entries]
        self._run_job(f"catalog-{kind}-bulk-create-job", f"{kind}s", data)

    def _run_job(self, job: str, name: str, data: list[dict[str, Any]]) -> None:
        """Run a bulk job, which the sandbox ends before it answers. Raises BenchmarkError."""
        body = {"data": {"type": job, "attributes": {name: {"data": data}}}}
        response = _HTTP.request("POST", f"{self._klaviyo}/api/{job}s", body=orjson.dumps(body), headers=self._headers)
        if response.status != 202:  # noqa: PLR2004
            raise BenchmarkError(f"the sandbox rejected the {name}: {response.data.decode()[:200]}")

    @property
    def _klaviyo(self) -> str:
        return self.environment["KLAVIYO_API_URL"]

    @property
    def _headers(self) -> dict[str, str]:
        return {
            "Authorization": f"Klaviyo-API-Key {self.environment['KLAVIYO_AUTH_KEY']}",
            "Content-Type": "application/vnd.api+json",
            "revision": "2026-07-15",
        }

    def _counts(self, service: str) -> Counts:
        return Counts(self._get(service, "counts"))

    def _get(self, service: str, name: str) -> Any:
        return _HTTP.request("GET", f"{self.environment[SERVICES[service]]}/_sandbox/{name}").json()


@dataclass(frozen=True, slots=True)
class Counts:
    """The response of `/_sandbox/counts`."""

    document: dict[str, Any]

    def requests(self, status: str = "") -> int:
        """Return the number of requests, optionally only those answered with `status`."""
        endpoints = self.document.get("requests", {}).values()
        return sum(n for statuses in endpoints for key, n in statuses.items() if status in {"", key})


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
    """When a message was settled, in seconds since the epoch, and its age in seconds."""

    at: float
    age: float


@dataclass(frozen=True, slots=True)
class Usage:
    """The resources of a worker process: seconds of user and system time, and peak megabytes."""

    cpu: float
    peak_rss: float


class Worker:
    """The installed worker with default settings. Its log reports its progress."""

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
        """Kill the worker if it still runs."""
        self._lines.close()
        if self._process.returncode is None:
            self._process.kill()
            self._process.wait()

    def wait_until_started(self) -> None:
        """Wait until the log says that the worker started. Raises BenchmarkError."""
        deadline = time.monotonic() + START_TIMEOUT
        while not self.started:
            if time.monotonic() > deadline:
                raise BenchmarkError(f"the worker did not start in {START_TIMEOUT:.0f} s: {self._log_tail()}")
            time.sleep(0.005)
            self.read_log()

    def read_log(self) -> None:
        """Read new log lines. Raises BenchmarkError if a message failed or the worker exited."""
        *lines, self._rest = (self._rest + self._lines.read()).split(b"\n")
        for line in lines:
            if line.startswith(b"{"):
                self._record(orjson.loads(line))
        if self._process.poll() is not None:
            raise BenchmarkError(f"the worker exited with {self._process.returncode}: {self._log_tail()}")

    def _record(self, line: dict[str, Any]) -> None:
        if line["event"] == "started":
            self.started = _parse_time(line["time"])
        elif line["event"] == "message_processed" and line["outcome"] == "sent":
            self.settled.append(Settled(_parse_time(line["time"]), line["age_s"]))
        elif line["event"] == "message_processed" and line["outcome"] == "retried":
            self.retried += 1
        elif line["event"] == "message_processed":
            raise BenchmarkError(f"a message was {line['outcome']}: {line['reason']}")

    def stop(self) -> Usage:
        """Send SIGTERM, wait for the exit and return the resources used. Raises BenchmarkError."""
        self._process.terminate()
        _, status, usage = os.wait4(self._process.pid, 0)
        self._process.returncode = os.waitstatus_to_exitcode(status)
        if self._process.returncode:
            raise BenchmarkError(f"the worker exited with {self._process.returncode}: {self._log_tail()}")
        unit = 1_000_000 if sys.platform == "darwin" else 1_000  # ru_maxrss is in bytes on macOS, else in kilobytes
        return Usage(usage.ru_utime + usage.ru_stime, usage.ru_maxrss / unit)

    def _log_tail(self) -> str:
        return self._log.read_text(encoding="utf-8")[-500:].strip()


def wait_until_settled(workers: Sequence[Worker], messages: int, *, poll: float = 0.05) -> None:
    """Wait until workers have settled a total of `messages`. Raises BenchmarkError if they stall."""
    before, deadline = 0, time.monotonic() + STALL_TIMEOUT
    while (settled := sum(len(worker.settled) for worker in workers)) < messages:
        if settled > before:
            before, deadline = settled, time.monotonic() + STALL_TIMEOUT
        if time.monotonic() > deadline:
            raise BenchmarkError(f"{settled} of {messages} messages were settled, then none for {STALL_TIMEOUT:.0f} s")
        time.sleep(poll)
        for worker in workers:
            worker.read_log()


def _parse_time(stamp: str) -> float:
    return datetime.fromisoformat(stamp).timestamp()
