"""Fixtures every test may use."""

from __future__ import annotations

import logging
import os
from collections import deque
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings

from adapters.embedded import EmbeddedQueue
from tests.rigs import RIGS, rig_type
from tests.support import sqs_fakes as sqs
from tests.support.pubsub_emulator import Emulator, missing
from tests.support.requirements import require
from worker.sandbox import Sandbox
from worker.telemetry.log import log

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from datetime import datetime
    from pathlib import Path

    from tests.rigs.base import Rig

settings.register_profile("default", deadline=None, max_examples=100)
settings.load_profile("default")

_OURS = ("CT_", "KLAVIYO_", "PREFERRED_", "QUEUE_URL", "PRODUCT_URL_TEMPLATE", "APP_TYPE", "PUB_SUB_PORT")
_QUEUES = ("DEAD_LETTER_", "PUBSUB_", "AWS_", "AZURE_", "SERVICEBUS_")
_SHARED = pytest.StashKey[Emulator]()
_SHARED_SQS = pytest.StashKey[dict[str, sqs.Server]]()
_FIXTURES = {"pubsub": "emulator", "sqs": "fauxqs"}  # servers that all tests share
_SLOWEST = {"acceptance": 0, "faults": 0, "integration": 1}  # 2: all others


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Let all of xdist's workers share one emulator."""
    stash = node.config.stash
    if _SHARED not in stash and not missing():
        stash[_SHARED] = Emulator()
    node.workerinput["emulator"] = stash[_SHARED].port if _SHARED in stash else 0
    if _SHARED_SQS not in stash:
        stash[_SHARED_SQS] = {kind: sqs.Server(kind) for kind in sqs.KINDS if not sqs.missing(kind)}
    node.workerinput["sqs"] = {kind: server.port for kind, server in stash[_SHARED_SQS].items()}


def pytest_unconfigure(config: pytest.Config) -> None:
    """End the shared servers."""
    if emulator := config.stash.get(_SHARED, None):
        emulator.kill()
    for server in config.stash.get(_SHARED_SQS, {}).values():
        server.kill()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with what takes longest, so that xdist's workers end together."""

    def place(item: pytest.Item) -> tuple[float, int]:
        own = item.get_closest_marker("timeout")
        return -own.args[0] if own else 0.0, _SLOWEST.get(item.path.parent.name, 2)

    items.sort(key=place)


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test depends on what the machine has set."""
    for name in [name for name in os.environ if name.startswith((*_OURS, *_QUEUES))]:
        monkeypatch.delenv(name)


@pytest.fixture(autouse=True)
def logger() -> Iterator[None]:
    """Leave the logger as it was: what a command sets up is not for the tests that follow in its process."""
    before = (log.handlers, log.propagate, log.level, logging.lastResort)
    yield
    log.handlers, log.propagate, log.level, logging.lastResort = before


@pytest.fixture
def caplog(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """Return what we log: threads that a library left over from an earlier test may still log."""
    ours = logging.Filter("klaviyo_worker")
    caplog.handler.addFilter(ours)
    yield caplog
    caplog.handler.removeFilter(ours)


@pytest.fixture
def queue(tmp_path: Path) -> Iterator[EmbeddedQueue]:
    """An empty embedded queue."""
    queue = EmbeddedQueue(tmp_path / "queue.db", lease_seconds=30, max_attempts=3)
    yield queue
    queue.close()


@pytest.fixture
def sandbox() -> Iterator[Sandbox]:
    """Both stand-ins, with the sample shop and an empty account."""
    with Sandbox() as running:
        yield running


@pytest.fixture(scope="session")
def emulator(pytestconfig: pytest.Config) -> Iterator[Emulator]:
    """Google's Pub/Sub emulator, one for all tests: each makes a subscription of its own."""
    if port := getattr(pytestconfig, "workerinput", {}).get("emulator"):
        yield Emulator(port)
        return
    running = Emulator()
    yield running
    running.kill()


@pytest.fixture(scope="session")
def servers(request: pytest.FixtureRequest) -> Iterator[Callable[[str], Any]]:
    """Return what stands in for a queue's service, by the queue's name; started once, when it is first wanted."""
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
    """Run what wants a `rig` on every queue."""
    if "rig" in metafunc.fixturenames:
        more = metafunc.definition.get_closest_marker("also_on")
        metafunc.parametrize("rig", [*RIGS, *(more.args if more else ())], indirect=True)


@pytest.fixture
def rig(
    request: pytest.FixtureRequest, tmp_path: Path, servers: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Rig]:
    """A queue, of each kind; its leases end late, unless the test is marked `short_leases`."""
    kills = request.node.get_closest_marker("short_leases") is not None
    running = rig_type(request.param)(servers(request.param), tmp_path, kills=kills)
    for variable, value in running.environment.items():
        monkeypatch.setenv(variable, value)
    yield running
    running.close()


@pytest.fixture(scope="session")
def moto(pytestconfig: pytest.Config) -> Iterator[sqs.Server]:
    """A stand-in for AWS SQS, one for all tests: each makes a queue of its own."""
    yield from _shared_sqs(pytestconfig, "moto")


@pytest.fixture(scope="session")
def fauxqs(pytestconfig: pytest.Config) -> Iterator[sqs.Server]:
    """Another one, for load."""
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
    """A delivery without a queue."""

    body: bytes
    id: str = "1"
    attempt: int | None = 1
    published_at: datetime | None = None
    attributes: Mapping[str, str] = field(default_factory=dict)


class Scripted:
    """A callable that answers with what it was given, in order, and notes its arguments."""

    def __init__(self, *answers: object) -> None:
        self.answers = deque(answers)
        self.calls: list[tuple[object, ...]] = []

    def __call__(self, *arguments: object) -> object:
        self.calls.append(arguments)
        answer = self.answers.popleft() if self.answers else {}
        if isinstance(answer, Exception):
            raise answer
        return answer
