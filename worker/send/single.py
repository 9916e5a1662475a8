"""The sender for individual operations on events and profiles."""

from __future__ import annotations

from typing import TYPE_CHECKING

from worker.errors import WorkerError
from worker.model import Operation, OperationKind, SendResult
from worker.send.erasure import Eraser
from worker.send.identifiers import write_record
from worker.telemetry.defects import describe_defect, report_defect

if TYPE_CHECKING:
    from worker.klaviyo.client import KlaviyoClient
    from worker.send.profiles import Profiles


class SingleSender:
    """A sender for individual operations on events and profiles. Safe for many threads."""

    def __init__(self, client: KlaviyoClient, profiles: Profiles) -> None:
        self._client = client
        self._eraser = Eraser(client)
        self._profiles = profiles

    def send(self, operation: Operation) -> SendResult:
        """Send an operation and return its result."""
        before = self._client.requests_sent()
        try:
            return self._send(operation)
        except WorkerError as failure:
            error = failure
        except Exception as defect:  # noqa: BLE001 - a defect must not affect the other operations
            error = report_defect("send", describe_defect(defect))
        return SendResult(error, self._client.requests_sent() - before)

    def _send(self, operation: Operation) -> SendResult:
        """Send an operation and return its result. Raises WorkerError."""
        if operation.kind is OperationKind.DELETE_PROFILE:
            return self._eraser.erase(operation)
        if operation.kind is not OperationKind.CREATE_EVENT:
            return self._profiles.send([operation])[0]
        before = self._client.requests_sent()
        write_record(self._client, "POST", "/api/events", operation.resource or {})
        return SendResult(None, self._client.requests_sent() - before)
