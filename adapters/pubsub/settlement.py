"""Settles and extends messages by ack id, in batches, independently of the stream that delivered them.

The client's own `message.ack()` reports no result, and is lost if its stream has ended. The calls of this module wait
for the response and retry. Messages that cannot be settled are logged; Pub/Sub redelivers them.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from google.api_core import exceptions as google
from tenacity import Retrying, retry_if_exception_type, retry_if_result, stop_after_delay, wait_random_exponential

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from google.cloud.pubsub_v1 import SubscriberClient
    from google.cloud.pubsub_v1.subscriber.message import Message

log = logging.getLogger("klaviyo_worker.pubsub")

LEASE_SECONDS = 60  # an int for the client; messages of a crashed worker are redelivered after this time
ACK_TIMEOUT, NACK_TIMEOUT = LEASE_SECONDS, 3.0  # seconds of retries; after a lost nack, the lease must end first
CALL_TIMEOUT = 3.0  # seconds for one call
MAX_IDS = 1000  # ack ids in a call, whose limit is 512 KiB
TRANSIENT_ERRORS = (
    google.Aborted,
    google.DeadlineExceeded,
    google.InternalServerError,
    google.ServiceUnavailable,
    google.TooManyRequests,
    google.Unknown,
)
_TRANSIENT = "TRANSIENT_"  # prefix of the results that can be retried


class Settlement:
    """Settles and extends the messages of one subscription. Safe for many threads; ignores lost leases."""

    def __init__(self, client: SubscriberClient, path: str) -> None:
        self._client = client
        self._path = path

    def ack(self, messages: Sequence[Message]) -> None:
        """Acknowledge the messages. Retry for as long as the leases can last."""
        self._settle("ack", self._client.acknowledge, messages, ACK_TIMEOUT)

    def nack(self, messages: Sequence[Message], seconds: int) -> None:
        """Make the leases end in `seconds`, at most 600."""
        self._settle("nack", self._client.modify_ack_deadline, messages, NACK_TIMEOUT, ack_deadline_seconds=seconds)

    def extend(self, messages: Sequence[Message], seconds: int) -> bool:
        """Make the leases end `seconds` from now, at most 600. Return whether all calls succeeded.

        Not retried: the next extension comes long before the leases end, and a retry could undo a nack.
        """
        return self._settle("extend", self._client.modify_ack_deadline, messages, 0.0, ack_deadline_seconds=seconds)

    def _settle(
        self, action: str, call: Callable[..., object], messages: Sequence[Message], timeout: float, **fields: int
    ) -> bool:
        """Return whether all calls succeeded."""
        failed = 0
        for start in range(0, len(messages), MAX_IDS):
            ids = [message.ack_id for message in messages[start : start + MAX_IDS]]
            request: dict[str, Any] = {"subscription": self._path, "ack_ids": ids, **fields}
            retrying = Retrying(
                stop=stop_after_delay(timeout),
                wait=wait_random_exponential(multiplier=0.1, max=5),
                retry=retry_if_exception_type(TRANSIENT_ERRORS) | retry_if_result(bool),
                retry_error_callback=lambda state: state.outcome and state.outcome.result(),
            )
            try:
                unsettled, reason = len(retrying(_try_once, call, request)), "Pub/Sub reported transient failures"
            except (google.GoogleAPIError, ValueError) as error:  # ValueError: the connection was closed
                unsettled, reason = len(request["ack_ids"]), str(error)
            failed += unsettled
            if unsettled:
                log.warning("settlement_failed", extra={"action": action, "messages": unsettled, "reason": reason})
        return not failed


def _try_once(call: Callable[..., object], request: dict[str, Any]) -> list[str]:
    """Make the call. Reduce the ids of `request` to those that must be retried, and return them.

    Only subscriptions with exactly-once delivery report results for single ids, in the metadata of the error. Ids
    without a result succeeded, unless the error itself is transient:
    https://cloud.google.com/pubsub/docs/exactly-once-delivery
    """
    try:
        call(request=request, retry=None, timeout=CALL_TIMEOUT)
    except google.GoogleAPICallError as error:
        metadata = error.metadata or {}  # can also contain entries that are not ids
        results = {name: metadata[name] for name in request["ack_ids"] if name in metadata}
        if not results:
            raise
        default = _TRANSIENT if isinstance(error, TRANSIENT_ERRORS) else ""
        request["ack_ids"] = [id_ for id_ in request["ack_ids"] if results.get(id_, default).startswith(_TRANSIENT)]
        if lost := len(results.keys() - set(request["ack_ids"])):
            log.warning("lease_lost", extra={"messages": lost, "reason": "the lease had ended"})
        return list(request["ack_ids"])
    return []
