"""A Sender for tests that look at errors alone."""

from __future__ import annotations

from threading import Event
from typing import TYPE_CHECKING, Any

from worker import send

if TYPE_CHECKING:
    from collections.abc import Sequence

    from worker.errors import WorkerError
    from worker.klaviyo.client import KlaviyoClient
    from worker.model import Operation


class Sender(send.Sender):
    """The worker's own."""

    def __init__(self, client: KlaviyoClient, concurrency: int, **more: Any) -> None:
        super().__init__(client, concurrency, Event(), **more)

    def send(self, operations: Sequence[Operation]) -> list[WorkerError | None]:  # type: ignore[override]
        """Return None or an error for each operation, whatever it cost."""
        return [sent.error for sent in super().send(operations)]
