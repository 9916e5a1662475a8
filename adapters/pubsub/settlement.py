"""Tells Pub/Sub what became of messages: by ack id, in batches, whatever the stream they came by is doing.

`message.ack()` of the client is lost once its stream has ended, and tells nothing of its fate; these calls
hold, insist, and read the answer. What does not get through is logged: the messages come again.
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

LEASE_SECONDS = 60  # seconds, an int to the client; a crash costs this much before a message comes again
ACK_PATIENCE, NACK_PATIENCE = LEASE_SECONDS, 3.0  # seconds to reach Pub/Sub; a nack that is lost costs a lease at most
TIMEOUT = 3.0  # seconds for one call
MAX_IDS = 1000  # ack ids in a call, whose limit is 512 KiB
PASSING = (
    google.Aborted,
    google.DeadlineExceeded,
    google.InternalServerError,
    google.ServiceUnavailable,
    google.TooManyRequests,
    google.Unknown,
)
_AGAIN = "TRANSIENT_"  # begins the verdicts that are not final


class Settlement:
    """Settles and extends the messages of one subscription. Safe for many threads; never raises for a lost lease."""

    def __init__(self, client: SubscriberClient, path: str) -> None:
        self._client = client
        self._path = path

    def acknowledge(self, messages: Sequence[Message]) -> None:
        """Acknowledge, insisting for as long as the leases may hold."""
        self._tell("ack", self._client.acknowledge, messages, ACK_PATIENCE)

    def end_leases(self, messages: Sequence[Message], seconds: int) -> None:
        """Have the messages come again in `seconds`, at most 600."""
        self._tell("nack", self._client.modify_ack_deadline, messages, NACK_PATIENCE, ack_deadline_seconds=seconds)

    def extend(self, messages: Sequence[Message], seconds: int) -> bool:
        """Keep the leases for `seconds` from now, at most 600; return whether Pub/Sub was told of all.

        Tried once: it is done anew long before the leases end, and one that insists could undo a nack made meanwhile.
        """
        return self._tell("extend", self._client.modify_ack_deadline, messages, 0.0, ack_deadline_seconds=seconds)

    def _tell(
        self, action: str, call: Callable[..., object], messages: Sequence[Message], patience: float, **about: int
    ) -> bool:
        """Return whether Pub/Sub was told of all."""
        failed = 0
        for start in range(0, len(messages), MAX_IDS):
            ids = [message.ack_id for message in messages[start : start + MAX_IDS]]
            request: dict[str, Any] = {"subscription": self._path, "ack_ids": ids, **about}
            retrying = Retrying(
                stop=stop_after_delay(patience),
                wait=wait_random_exponential(multiplier=0.1, max=5),
                retry=retry_if_exception_type(PASSING) | retry_if_result(bool),
                retry_error_callback=lambda state: state.outcome and state.outcome.result(),
            )
            try:
                left, reason = len(retrying(_told, call, request)), "told to try again"
            except (google.GoogleAPIError, ValueError) as error:  # ValueError: the connection was closed
                left, reason = len(request["ack_ids"]), str(error)
            failed += left
            if left:
                log.warning("settling_failed", extra={"action": action, "messages": left, "reason": reason})
        return not failed


def _told(call: Callable[..., object], request: dict[str, Any]) -> list[str]:
    """Make the call; return the ids to tell again, to which the request is narrowed.

    Only subscriptions with exactly-once delivery tell the fate of each id, in the error's metadata. Ids it does
    not name went through, unless the error as a whole is a passing one:
    https://cloud.google.com/pubsub/docs/exactly-once-delivery
    """
    try:
        call(request=request, retry=None, timeout=TIMEOUT)
    except google.GoogleAPICallError as error:
        told = error.metadata or {}  # other errors have metadata too, about no id
        verdicts = {name: told[name] for name in request["ack_ids"] if name in told}
        if not verdicts:
            raise
        unnamed = _AGAIN if isinstance(error, PASSING) else ""
        request["ack_ids"] = [id_ for id_ in request["ack_ids"] if verdicts.get(id_, unnamed).startswith(_AGAIN)]
        if lost := len(verdicts.keys() - set(request["ack_ids"])):
            log.warning("lease_lost", extra={"messages": lost, "reason": "the lease ended before"})
        return list(request["ack_ids"])
    return []
