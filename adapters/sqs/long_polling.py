"""Receives from SQS by long polls: one at a time while nothing comes, up to ten while messages wait.

AWS charges for every poll and hands out ten messages in one at the most, so more than one at a time pays only while
they come back well filled.
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
from adapters.shared.inbox import Inbox
from adapters.sqs import client as aws

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mypy_boto3_sqs import SQSClient
    from mypy_boto3_sqs.type_defs import MessageTypeDef

log = logging.getLogger("klaviyo_worker.sqs")

# Seconds. A poll cannot be called off, and what it brings after SIGTERM has to go back: so it bounds the shutdown.
# SQS allows 20; the polls of an idle worker cost some 0.2 USD a month at 5, where they would cost 0.05.
POLL_SECONDS = 5
MAX_MESSAGES = 10  # in a poll, SQS's limit
MAX_RECEIVERS = 10  # polls under way at once
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 10.0  # seconds without polls after one that failed
REFUSED_FOR = 60.0  # seconds a refusal is taken for passing: permissions take a while to spread
STOP_SECONDS = 2.0  # that polls may take longer than asked before nobody waits for them


@dataclass(frozen=True, slots=True)
class SQSDelivery:
    """A leased message. `attempt` is approximate: two workers may have been given a message at the same moment."""

    id: str
    body: bytes = field(repr=False)
    attributes: Mapping[str, str]
    attempt: int
    published_at: datetime
    receipt: str = field(repr=False)
    received_at: float  # monotonic seconds


class LongPolling:
    """Messages of a queue as they arrive, whatever becomes of the connection.

    Polls start only while somebody waits in `take`, for the room there is then. How large messages are is known
    when they are there: what is taken may be larger than wanted by those of `MAX_RECEIVERS` polls.
    """

    def __init__(self, client: SQSClient, queue_url: str, *, lease_seconds: float, poll_seconds: int) -> None:
        self._client = client
        self._queue_url = queue_url
        self._lease_seconds = lease_seconds
        self._poll_seconds = poll_seconds
        self._inbox: Inbox[SQSDelivery] = Inbox()
        self._lock = Lock()  # guards all below
        self._polls: set[Thread] = set()
        self._receivers = 1  # polls that may be under way
        self._room = 0  # messages that who waits in `take` has room for
        self._coming = 0  # messages asked for or in the inbox
        self._pause = FIRST_PAUSE
        self._resume_at = 0.0  # monotonic seconds, as all times here
        self._extended_at = -math.inf  # the leases of what waited then
        self._refused_since: float | None = None
        self._refusal = ""
        self.trouble = ""  # why the last poll failed; "" when it did not
        self._stopped = False

    def take(self, max_messages: int, wait: float) -> list[SQSDelivery]:
        """Return up to `max_messages`, waiting at most `wait` seconds. Raises QueueRefusedError, and may go on."""
        with self._lock:
            refusal, self._refusal = self._refusal, ""
            if refusal:
                raise QueueRefusedError(f"QUEUE_URL: SQS refuses to hand out messages: {refusal}")
            self._drop_ended()
            self._room = max_messages
            self._poll_more()
        deliveries = self._inbox.take(max_messages, wait)
        with self._lock:
            self._room = 0
            self._coming -= len(deliveries)
        return deliveries

    def waiting(self) -> list[SQSDelivery]:
        """Return the messages that arrived and were not taken."""
        with self._lock:
            self._drop_ended()
        return self._inbox.waiting()

    def extended(self, since: float) -> None:
        """Note that the leases of all that waits were extended."""
        self._extended_at = since

    def stop(self) -> list[SQSDelivery]:
        """Wait for the polls under way. Returns what arrived and was not taken."""
        with self._lock:
            patience = 0.0 if self._stopped else self._poll_seconds + STOP_SECONDS
            self._stopped, polls = True, list(self._polls)
        deadline = time.monotonic() + patience
        for poll in polls:
            poll.join(max(deadline - time.monotonic(), 0.0))
        if patience and any(poll.is_alive() for poll in polls):  # what they bring comes again by itself
            log.warning("polls_not_ended", extra={"waited_s": patience})
        return self._inbox.clear()

    def _drop_ended(self) -> None:
        """Forget what waited longer than its lease: somebody else may have it by now. The lock is held."""
        began = time.monotonic() - self._lease_seconds
        self._coming -= self._inbox.drop(lambda delivery: max(delivery.received_at, self._extended_at) <= began)

    def _poll_more(self) -> None:
        """Start polls for the room there is. The lock is held."""
        while self._may_poll():
            asked = min(MAX_MESSAGES, self._room - self._coming)
            poll = Thread(target=self._poll, args=(asked,), daemon=True)
            poll.start()
            self._polls.add(poll)
            self._coming += asked

    def _may_poll(self) -> bool:
        return (
            not self._stopped
            and len(self._polls) < self._receivers
            and self._coming < self._room
            and time.monotonic() >= self._resume_at
        )

    def _poll(self, asked: int) -> None:
        """Receive once, and go on if there is room for more."""
        deliveries: list[SQSDelivery] = []
        failure: Exception | None = None
        began = time.monotonic()
        try:
            deliveries = self._receive(asked)
        except Exception as error:  # noqa: BLE001 - whatever it is, receiving must go on
            failure = error
        with self._lock:
            self._polls.discard(current_thread())
            self._coming += len(deliveries) - asked
            self._inbox.put(*deliveries)
            if failure is None:
                self._received(len(deliveries), asked)
                if not deliveries:  # a long poll takes its time; a proxy that answers for SQS does not
                    self._resume_at = max(began + FIRST_PAUSE, self._resume_at)
            else:
                self._failed(failure)
            self._poll_more()

    def _receive(self, at_most: int) -> list[SQSDelivery]:
        answer = self._client.receive_message(
            QueueUrl=self._queue_url,
            MaxNumberOfMessages=at_most,
            WaitTimeSeconds=self._poll_seconds,
            VisibilityTimeout=math.ceil(self._lease_seconds),
            MessageSystemAttributeNames=["ApproximateReceiveCount", "SentTimestamp"],
            MessageAttributeNames=["All"],
        )
        now = time.monotonic()
        return [delivery(message, now) for message in answer.get("Messages", ())]

    def _received(self, messages: int, asked: int) -> None:
        """Poll more at once while polls come back half full, one at a time again when one brings nothing.

        Half: SQS asks some of its machines, and brings less than asked for though more is waiting.
        """
        self._pause, self._refused_since, self._refusal, self.trouble = FIRST_PAUSE, None, "", ""
        if messages * 2 >= asked:
            self._receivers = min(self._receivers + 1, MAX_RECEIVERS)
        elif not messages:
            self._receivers = 1

    def _failed(self, error: Exception) -> None:
        """Plan the next try; note a refusal that has lasted `REFUSED_FOR` seconds."""
        now, reason = time.monotonic(), aws.reason(error)
        self._receivers, self.trouble = 1, reason
        if aws.is_refusal(error):
            self._refused_since = self._refused_since or now
            if now - self._refused_since > REFUSED_FOR:
                self._refusal = reason
        if now < self._resume_at:  # another poll of the same moment
            return
        self._resume_at = now + self._pause
        about = {"error": aws.code(error), "reason": reason, "retry_in_s": self._pause}
        log.warning("receive_failed", extra=about)
        self._pause = min(self._pause * 2, LONGEST_PAUSE)


def delivery(message: MessageTypeDef, received_at: float) -> SQSDelivery:
    """Return a message as it was received, with its attributes that are texts."""
    told = message["Attributes"]
    attributes = {name: value.get("StringValue") for name, value in message.get("MessageAttributes", {}).items()}
    return SQSDelivery(
        message["MessageId"],
        message["Body"].encode("utf-8", "surrogatepass"),
        {name: value for name, value in attributes.items() if value is not None},
        int(told["ApproximateReceiveCount"]),
        datetime.fromtimestamp(int(told["SentTimestamp"]) / 1000, UTC),
        message["ReceiptHandle"],
        received_at,
    )
