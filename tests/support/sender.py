"""A Sender for tests that check errors only."""

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
    """A Sender that returns errors instead of results."""

    def __init__(
        self,
        client: KlaviyoClient,
        max_requests: int,
        *,
        stopping: Event | None = None,
        bulk_events: bool = True,
        **options: Any,
    ) -> None:
        defaults = {"bulk_threshold": 10, "job_timeout": 600.0, "stop_wait": 0.0}
        defaults |= {"merges_guests": True, "resubscribes": False}
        super().__init__(
            client,
            max_requests,
            stopping or Event(),
            send.SendOptions(**(defaults | options)),
            allows_bulk_events=lambda: bulk_events,
        )

    def send(self, operations: Sequence[Operation]) -> list[WorkerError | None]:  # type: ignore[override]
        """Return the error of each operation, None for success."""
        return [sent.error for sent in super().send(operations)]
