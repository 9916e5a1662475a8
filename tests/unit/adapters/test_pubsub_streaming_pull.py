"""The streaming pull, without a Pub/Sub service."""

from __future__ import annotations

import pytest
from google.auth.exceptions import DefaultCredentialsError
from google.cloud.pubsub_v1.types import FlowControl

from adapters import QueueError
from adapters.pubsub.streaming_pull import StreamClient, StreamingPull
from adapters.shared import reconnect

NO_SERVER = DefaultCredentialsError("no metadata server")  # type: ignore[no-untyped-call]


class MissingCredentials:
    """Credentials that are not available, for example because the host's metadata server does not respond."""

    def __init__(self, error: Exception = NO_SERVER) -> None:
        self.attempts = 0
        self._error = error

    def __call__(self) -> StreamClient:
        self.attempts += 1
        raise self._error


@pytest.fixture(autouse=True)
def short_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reconnect, "MIN_BACKOFF", 0.01)
    monkeypatch.setattr(reconnect, "MAX_BACKOFF", 0.04)


@pytest.mark.parametrize("error", [NO_SERVER, PermissionError("the file is being replaced")])
def test_unavailable_credentials_are_retried_with_backoff(error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    """Each failure is logged."""
    connect = MissingCredentials(error)
    pull = StreamingPull(connect, "projects/demo/subscriptions/s", FlowControl())
    for _ in range(20):
        assert pull.receive(1, 0.01) == []
    assert 3 <= connect.attempts <= 12
    assert [vars(record)["retry_in_s"] for record in caplog.records][:4] == [0.01, 0.02, 0.04, 0.04]
    assert pull.stop() == []


def test_permanently_unavailable_credentials_raise(monkeypatch: pytest.MonkeyPatch) -> None:
    """The supervisor restarts the worker, and reports the error."""
    monkeypatch.setattr(reconnect, "REFUSAL_TIMEOUT", 0.1)
    pull = StreamingPull(MissingCredentials(), "projects/demo/subscriptions/s", FlowControl())
    with pytest.raises(QueueError, match="no metadata server"):  # noqa: PT012 - eventually
        while True:
            pull.receive(1, 0.01)
