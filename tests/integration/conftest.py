"""Fixtures for the clients over real sockets against the sandbox, and for queues against their emulators."""

from __future__ import annotations

from threading import Event
from typing import TYPE_CHECKING, Any

import pytest

from adapters import Failure, QueueOptions, open_queue
from adapters.pubsub.queue import PubSubQueue
from worker.commercetools.client import Commercetools
from worker.klaviyo.client import Klaviyo
from worker.setting_sources import load
from worker.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from worker.sandbox import Sandbox

    Open = Callable[..., PubSubQueue]


def settings_for(sandbox: Sandbox, **values: Any) -> Settings:
    """Return settings with the addresses of a sandbox."""
    environment = {"CT_SCOPE": "", **sandbox.environment}
    flags = {name: environment.get(str(info.validation_alias)) for name, info in Settings.model_fields.items()}
    return load(Settings, flags | {"retry_timeout": 2} | values)


def commercetools_for(sandbox: Sandbox, **values: Any) -> Commercetools:
    """Return a commercetools client for a sandbox."""
    return Commercetools(settings_for(sandbox, **values), Event())


def klaviyo_for(sandbox: Sandbox, **values: Any) -> Klaviyo:
    """Return a Klaviyo client for a sandbox."""
    return Klaviyo(settings_for(sandbox, **values), Event())


FAILURE = Failure("Klaviyo refused the record: " + "é" * 2000, "send", "Rejected")


@pytest.fixture
def opened() -> Iterator[Open]:
    """Open queues, and close them after the test."""
    queues: list[PubSubQueue] = []

    def open_(url: str, **options: Any) -> PubSubQueue:
        queue = open_queue(url, QueueOptions(**options))
        assert isinstance(queue, PubSubQueue)
        queues.append(queue)
        return queue

    yield open_
    for queue in queues:
        queue.close()
