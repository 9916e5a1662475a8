"""Long polling of SQS: one poll at a time while the queue is empty, up to ten concurrent polls while it is not.

AWS charges for every poll, and a poll returns at most ten messages. Concurrent polls are therefore worth their price
only while polls return many messages.
"""

from __future__ import annotations

import logging
import math
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from threading import Lock, Thread, current_thread
from typing import TYPE_CHECKING

from adapters.base import QueueRefusedError
from adapters.shared import reconnect
from adapters.shared.inbox import Inbox
from adapters.shared.reconnect import ReceiveFailures
from adapters.sqs import client as aws

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mypy_boto3_sqs import SQSClient
    from mypy_boto3_sqs.type_defs import MessageTypeDef

log = logging.getLogger("klaviyo_worker.sqs")

# Seconds. A poll cannot be cancelled: it delays a shutdown, and messages that it receives after SIGTERM must be nacked.
# SQS allows 20. The polls of an idle worker cost about 0.20 USD a month with 5, and 0.05 USD with 20.
POLL_SECONDS = 5
MAX_MESSAGES = 10  # in a poll, SQS's limit
MAX_RECEIVERS = 10  # concurrent polls
STOP_TIMEOUT = 2.0  # seconds beyond `POLL_SECONDS` that `stop` waits for polls


@dataclass(frozen=True, slots=True)
class SQSDelivery:
    """A leased message. `attempt` is approximate: SQS can deliver a message to two workers at the same moment."""

    id: str
    body: bytes = field(repr=False)
    attributes: Mapping[str, str]
    attempt: int
    published_at: datetime
    receipt: str = field(repr=False)
    received_at: float  # monotonic seconds


class LongPolling:
    """The messages of a queue, received by polls that continue after every failure.

    Polls start only while `receive` is waiting, and request only as many messages as it can return. The size of
    messages is unknown until they arrive. Their total size can therefore exceed the worker's limit by the messages of
    `MAX_RECEIVERS` polls.
    """

    def __init__(self, client: SQSClient, queue_url: str, *, lease_seconds: float, poll_seconds: int) -> None:
        self._client = client
        self._queue_url = queue_url
        self._lease_seconds = lease_seconds
        self._poll_seconds = poll_seconds
        self._inbox: Inbox[SQSDelivery] = Inbox()
        self._lock = Lock()  # guards the attributes below
        self._polls: set[Thread] = set()
        self._receivers = 1  # limit of concurrent polls
        self._room = 0  # messages that the waiting `receive` can return
        self._expected = 0  # messages requested by polls, or in the inbox
        self._failures = ReceiveFailures("sqs")
        self._resume_at = 0.0  # monotonic seconds
        self._extended_at = -math.inf  # monotonic seconds: the last extension of the inbox's leases
        self._refusal = ""  # for the next `receive` to raise
        self.last_error = ""  # why the last poll failed; "" if it succeeded
        self._stopped = False

    def receive(self, max_messages: int, wait: float) -> list[SQSDelivery]:
        """Return up to `max_messages`, waiting at most `wait` seconds for the first.

        Raises QueueRefusedError after a lasting refusal; the next call tries again.
        """
        with self._lock:
            refusal, self._refusal = self._refusal, ""
            if refusal:
                raise QueueRefusedError(f"QUEUE_URL: SQS refuses to deliver messages: {refusal}")
            self._drop_expired()
            self._room = max_messages
            self._start_polls()
        deliveries = self._inbox.get(max_messages, wait)
        with self._lock:
            self._room = 0
            self._expected -= len(deliveries)
        return deliveries

    def pending(self) -> list[SQSDelivery]:
        """Return the messages that arrived and that `receive` did not return yet."""
        with self._lock:
            self._drop_expired()
        return self._inbox.items()

    def set_extended(self, since: float) -> None:
        """Record that the leases of all pending messages were extended at `since`."""
        self._extended_at = since

    def stop(self) -> list[SQSDelivery]:
        """Wait for the running polls; return the messages that arrived and that `receive` did not return."""
        with self._lock:
            timeout = 0.0 if self._stopped else self._poll_seconds + STOP_TIMEOUT
            self._stopped, polls = True, list(self._polls)
        deadline = time.monotonic() + timeout
        for poll in polls:
            poll.join(max(deadline - time.monotonic(), 0.0))
        if timeout and any(poll.is_alive() for poll in polls):  # their messages are redelivered
            log.warning("polls_not_ended", extra={"waited_s": timeout})
        return self._inbox.clear()

    def _drop_expired(self) -> None:
        """Drop pending messages whose lease has ended, because SQS redelivers them. The caller holds the lock."""
        started_at = time.monotonic() - self._lease_seconds
        self._expected -= self._inbox.drop(lambda message: max(message.received_at, self._extended_at) <= started_at)

    def _start_polls(self) -> None:
        """Start polls for the available room. The caller holds the lock."""
        while self._can_poll():
            requested = min(MAX_MESSAGES, self._room - self._expected)
            poll = Thread(target=self._poll, args=(requested,), daemon=True)
            poll.start()
            self._polls.add(poll)
            self._expected += requested

    def _can_poll(self) -> bool:
        return (
            not self._stopped
            and len(self._polls) < self._receivers
            and self._expected < self._room
            and time.monotonic() >= self._resume_at
        )

    def _poll(self, requested: int) -> None:
        """Receive once, then start further polls if there is room."""
        deliveries: list[SQSDelivery] = []
        failure: Exception | None = None
        started_at = time.monotonic()
        try:
            deliveries = self._receive(requested)
        except Exception as error:  # noqa: BLE001 - receiving must continue after any error
            failure = error
        with self._lock:
            self._polls.discard(current_thread())
            self._expected += len(deliveries) - requested
            self._inbox.put(*deliveries)
            if failure is None:
                self._on_success(len(deliveries), requested)
                if not deliveries:  # SQS answers an empty poll late, but a proxy can answer immediately
                    self._resume_at = max(started_at + reconnect.MIN_BACKOFF, self._resume_at)
            else:
                self._on_failure(failure)
            self._start_polls()

    def _receive(self, max_messages: int) -> list[SQSDelivery]:
        response = self._client.receive_message(
            QueueUrl=self._queue_url,
            MaxNumberOfMessages=max_messages,
            WaitTimeSeconds=self._poll_seconds,
            VisibilityTimeout=math.ceil(self._lease_seconds),
            MessageSystemAttributeNames=["ApproximateReceiveCount", "SentTimestamp"],
            MessageAttributeNames=["All"],
        )
        now = time.monotonic()
        return [delivery_of(message, now) for message in response.get("Messages", ())]

    def _on_success(self, messages: int, requested: int) -> None:
        """Allow one more concurrent poll after a poll that is at least half full, and only one poll after an empty one.

        Half is enough because SQS samples its servers: it can return fewer messages than are ready.
        """
        self._failures.reset()
        self._refusal = self.last_error = ""
        if messages * 2 >= requested:
            self._receivers = min(self._receivers + 1, MAX_RECEIVERS)
        elif not messages:
            self._receivers = 1

    def _on_failure(self, error: Exception) -> None:
        """Schedule the next poll; make `receive` raise after a lasting refusal."""
        now, reason = time.monotonic(), aws.first_line(error)
        self._receivers, self.last_error = 1, reason
        if aws.is_refusal(error):
            self._failures.add_refusal(reason)
            self._refusal = self._failures.lasting_refusal()
        if now >= self._resume_at:  # not if a concurrent poll has just failed
            self._resume_at = now + self._failures.back_off(aws.error_code(error), reason)


def delivery_of(message: MessageTypeDef, received_at: float) -> SQSDelivery:
    """Return a message as a delivery, without the attributes that are not text."""
    system = message["Attributes"]
    attributes = {name: value.get("StringValue") for name, value in message.get("MessageAttributes", {}).items()}
    return SQSDelivery(
        message["MessageId"],
        message["Body"].encode("utf-8", "surrogatepass"),
        {name: value for name, value in attributes.items() if value is not None},
        int(system["ApproximateReceiveCount"]),
        datetime.fromtimestamp(int(system["SentTimestamp"]) / 1000, UTC),
        message["ReceiptHandle"],
        received_at,
    )
