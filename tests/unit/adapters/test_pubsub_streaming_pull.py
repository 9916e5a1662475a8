"""The streaming pull, as far as it does without Pub/Sub."""

from __future__ import annotations

import pytest
from google.auth.exceptions import DefaultCredentialsError
from google.cloud.pubsub_v1.types import FlowControl

from adapters import QueueError
from adapters.pubsub.streaming_pull import StreamClient, StreamingPull
from adapters.shared import reconnect

NO_SERVER = DefaultCredentialsError("no metadata server")  # type: ignore[no-untyped-call]


class Nobody:
    """Credentials that cannot be had, as when the host's metadata server does not answer."""

    def __init__(self, error: Exception = NO_SERVER) -> None:
        self.tries = 0
        self._error = error

    def __call__(self) -> StreamClient:
        self.tries += 1
        raise self._error


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reconnect, "MIN_BACKOFF", 0.01)
    monkeypatch.setattr(reconnect, "MAX_BACKOFF", 0.04)


@pytest.mark.parametrize("error", [NO_SERVER, PermissionError("the file is being replaced")])
def test_credentials_that_cannot_be_had_now_are_asked_for_again(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    """With growing pauses; each is told."""
    connect = Nobody(error)
    pull = StreamingPull(connect, "projects/demo/subscriptions/s", FlowControl())
    for _ in range(20):
        assert pull.receive(1, 0.01) == []
    assert 3 <= connect.tries <= 12
    assert [vars(record)["retry_in_s"] for record in caplog.records][:4] == [0.01, 0.02, 0.04, 0.04]
    assert pull.stop() == []


def test_credentials_that_stay_away_end_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """The supervisor starts it again, and says so."""
    monkeypatch.setattr(reconnect, "REFUSAL_TIMEOUT", 0.1)
    pull = StreamingPull(Nobody(), "projects/demo/subscriptions/s", FlowControl())
    with pytest.raises(QueueError, match="no metadata server"):  # noqa: PT012 - in the end
        while True:
            pull.receive(1, 0.01)
