"""The emulators of Pub/Sub and Service Bus."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.support.pubsub_emulator import Emulator, Subscription
from tests.support.requirements import require
from tests.support.servicebus_broker.broker import Broker, missing

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def emulated(emulator: Emulator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PUBSUB_EMULATOR_HOST", emulator.host)


@pytest.fixture
def subscription(emulator: Emulator) -> Subscription:
    return Subscription(emulator)


@pytest.fixture(scope="module")
def broker() -> Iterator[Broker]:
    require(missing())
    running = Broker()
    yield running
    running.kill()


@pytest.fixture
def own_broker() -> Iterator[Broker]:
    """A broker that a test can take down."""
    require(missing())
    running = Broker()
    yield running
    running.kill()
