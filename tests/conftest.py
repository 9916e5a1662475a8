"""Fixtures for all tests."""

from __future__ import annotations

import logging
import os
from collections import Counter, deque
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings

from adapters.embedded.queue import EmbeddedQueue
from tests.rigs import RIGS, rig_type
from tests.support import fork_server
from tests.support import sqs_fakes as sqs
from tests.support.fork_server import ForkServer
from tests.support.pubsub_emulator import Emulator, missing
from tests.support.requirements import require
from worker import network
from worker.sandbox import Sandbox
from worker.telemetry.log import log

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from datetime import datetime
    from pathlib import Path

    from tests.rigs.base import Rig

# CI tries the same examples in each run, so that no run depends on chance. `make test` tries others each time.
settings.register_profile("tests", deadline=None, max_examples=40, derandomize=os.environ.get("CI") == "true")
settings.load_profile("tests")

_SETTINGS = ("CT_", "KLAVIYO_", "PREFERRED_", "QUEUE_URL", "PRODUCT_URL_TEMPLATE", "APP_TYPE", "PUB_SUB_PORT")
_QUEUES = ("DEAD_LETTER_", "PUBSUB_", "AWS_", "AZURE_", "SERVICEBUS_")
_SHARED = pytest.StashKey[Emulator]()
_SHARED_SQS = pytest.StashKey[dict[str, sqs.Server]]()
_SHARED_FORKS = pytest.StashKey[ForkServer]()
_FIXTURES = {"pubsub": "emulator", "sqs": "fauxqs"}  # servers that all tests share
_NOT_MEASURED = frozenset({"acceptance", "faults", "deploy", "model"})
_SLOWEST_FIRST = {"acceptance": 0, "faults": 0, "model": 0, "integration": 1}  # 2: all others


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Share the emulators and the fork server between all workers of xdist."""
    stash = node.config.stash
    if _SHARED_FORKS not in stash:
        stash[_SHARED_FORKS] = ForkServer()
    node.workerinput["fork_server"] = stash[_SHARED_FORKS].path
    if _SHARED not in stash and not missing():
        stash[_SHARED] = Emulator()
    node.workerinput["emulator"] = stash[_SHARED].port if _SHARED in stash else 0
    if _SHARED_SQS not in stash:
        stash[_SHARED_SQS] = {kind: sqs.Server(kind) for kind in sqs.KINDS if not sqs.missing(kind)}
    node.workerinput["sqs"] = {kind: server.port for kind, server in stash[_SHARED_SQS].items()}


def pytest_configure(config: pytest.Config) -> None:
    """Use the fork server that all workers of xdist share."""
    if path := getattr(config, "workerinput", {}).get("fork_server"):
        fork_server.share(path)


def pytest_unconfigure(config: pytest.Config) -> None:
    """End the shared servers."""
    if forks := config.stash.get(_SHARED_FORKS, None):
        forks.kill()
    if emulator := config.stash.get(_SHARED, None):
        emulator.kill()
    for server in config.stash.get(_SHARED_SQS, {}).values():
        server.kill()


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the slowest tests first, so that the workers of xdist end together.

    Coverage measures this process only. Tests in a folder of _NOT_MEASURED start processes; in this one they run only
    the sandbox, which other tests cover, and measuring that takes longer than running it. Those that run commands in
    this process are measured. Property-based tests run the same lines many times, after other tests.
    """

    def sort_key(item: pytest.Item) -> tuple[float, int]:
        timeout = item.get_closest_marker("timeout")
        return -timeout.args[0] if timeout else 0.0, _SLOWEST_FIRST.get(item.path.parent.name, 2)

    items.sort(key=sort_key)
    for item in items:
        if item.path.parent.name == "deploy":  # the tests of a module share what takes seconds to read
            item.add_marker(pytest.mark.xdist_group(item.path.stem))
        if _is_not_measured(item):
            item.add_marker(pytest.mark.no_cover)


def _is_not_measured(item: Any) -> bool:
    if getattr(item.obj, "is_hypothesis_test", False):
        return True
    return item.path.parent.name in _NOT_MEASURED and not hasattr(item.module, "CliRunner")


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove the settings of the machine from the environment."""
    for name in [name for name in os.environ if name.startswith((*_SETTINGS, *_QUEUES))]:
        monkeypatch.delenv(name)
    for name in network.VARIABLES:  # `load` sets them
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


@pytest.fixture(autouse=True)
def logger() -> Iterator[None]:
    """Restore the logger after each test: a command that runs in this process configures it."""
    before = (log.handlers, log.propagate, log.level, logging.lastResort)
    yield
    log.handlers, log.propagate, log.level, logging.lastResort = before


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print one line for all skipped tests: how many need what."""
    reasons = Counter(
        str(report.longrepr[2]).removeprefix("Skipped: ") for report in terminalreporter.getreports("skipped")
    )
    if reasons:
        counted = "; ".join(f"{number} x {reason}" for reason, number in reasons.most_common())
        terminalreporter.write_line(f"Skipped {reasons.total()} tests: {counted}")


@pytest.fixture
def caplog(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """Capture only the worker's log: a library's threads from an earlier test can still log."""
    own = logging.Filter("klaviyo_worker")
    caplog.handler.addFilter(own)
    yield caplog
    caplog.handler.removeFilter(own)


@pytest.fixture(autouse=True)
def close_embedded_queues(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Close the embedded queues that a test leaves open: from Python 3.13 on, a connection without an owner warns."""
    opened: list[EmbeddedQueue] = []
    open_file = EmbeddedQueue.__init__

    def open_and_remember(self: EmbeddedQueue, *arguments: Any, **options: Any) -> None:
        open_file(self, *arguments, **options)
        opened.append(self)

    monkeypatch.setattr(EmbeddedQueue, "__init__", open_and_remember)
    yield
    for queue in opened:
        queue.close()


@pytest.fixture
def queue(tmp_path: Path) -> EmbeddedQueue:
    """An empty embedded queue."""
    return EmbeddedQueue(tmp_path / "queue.db", lease_seconds=30, max_attempts=3)


@pytest.fixture
def sandbox() -> Iterator[Sandbox]:
    """The sandbox with the sample shop and an empty Klaviyo account."""
    with Sandbox() as running:
        yield running


@pytest.fixture(scope="session")
def emulator(pytestconfig: pytest.Config) -> Iterator[Emulator]:
    """Google's Pub/Sub emulator, shared by all tests. Each test creates its own subscription."""
    if port := getattr(pytestconfig, "workerinput", {}).get("emulator"):
        yield Emulator(port)
        return
    running = Emulator()
    yield running
    running.kill()


@pytest.fixture(scope="session")
def servers(request: pytest.FixtureRequest) -> Iterator[Callable[[str], Any]]:
    """Return a function that returns the emulator of a queue by name, and starts it at the first call."""
    running: dict[str, Any] = {}
    with ExitStack() as stack:

        def server(name: str) -> Any:
            if name in _FIXTURES:
                return request.getfixturevalue(_FIXTURES[name])
            if name not in running:
                require(rig_type(name).missing())
                running[name] = stack.enter_context(rig_type(name).server())
            return running[name]

        yield server


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run tests with a `rig` on every queue."""
    if "rig" in metafunc.fixturenames:
        also_on = metafunc.definition.get_closest_marker("also_on")
        metafunc.parametrize("rig", [*RIGS, *(also_on.args if also_on else ())], indirect=True)


@pytest.fixture
def rig(
    request: pytest.FixtureRequest, tmp_path: Path, servers: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Rig]:
    """A queue of each kind. Its leases are long, unless the test is marked `short_leases`."""
    kills = request.node.get_closest_marker("short_leases") is not None
    running = rig_type(request.param)(servers(request.param), tmp_path, kills=kills)
    for variable, value in running.environment.items():
        monkeypatch.setenv(variable, value)
    yield running
    running.close()


@pytest.fixture(scope="session")
def moto(pytestconfig: pytest.Config) -> Iterator[sqs.Server]:
    """The moto emulator of AWS SQS, shared by all tests. Each test creates its own queue."""
    yield from _shared_sqs(pytestconfig, "moto")


@pytest.fixture(scope="session")
def fauxqs(pytestconfig: pytest.Config) -> Iterator[sqs.Server]:
    """The fauxqs emulator of AWS SQS, faster and used for load tests, shared by all tests."""
    yield from _shared_sqs(pytestconfig, "fauxqs")


def _shared_sqs(config: pytest.Config, kind: str) -> Iterator[sqs.Server]:
    require(sqs.missing(kind))
    if port := getattr(config, "workerinput", {}).get("sqs", {}).get(kind):
        yield sqs.Server(kind, port)
        return
    running = sqs.Server(kind)
    yield running
    running.kill()


@dataclass(frozen=True, slots=True)
class FakeDelivery:
    """A fake delivery that belongs to no queue."""

    body: bytes
    id: str = "1"
    attempt: int | None = 1
    published_at: datetime | None = None
    attributes: Mapping[str, str] = field(default_factory=dict)


class Scripted:
    """A callable that returns or raises the given results in order, and records its arguments."""

    def __init__(self, *results: object) -> None:
        self.results = deque(results)
        self.calls: list[tuple[object, ...]] = []

    def __call__(self, *arguments: object) -> object:
        self.calls.append(arguments)
        result = self.results.popleft() if self.results else {}
        if isinstance(result, Exception):
            raise result
        return result
