"""Reads the dead-letter queue of an SQS queue by long polls."""

from __future__ import annotations

import math
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from adapters.base import DeadLetter
from adapters.shared import dead_letter_attributes
from adapters.shared.leased_dead_letters import DeadLetterDelivery
from adapters.sqs import client as aws
from adapters.sqs.long_polling import MAX_MESSAGES, POLL_SECONDS, delivery_of
from adapters.sqs.settlement import MAX_ENTRIES, THREADS

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mypy_boto3_sqs import SQSClient
    from mypy_boto3_sqs.type_defs import MessageTypeDef

_SOURCE: Final = "DeadLetterQueueSourceArn"  # an attribute of messages that a redrive policy moved


class SQSDeadLetters:
    """A dead-letter queue. Implements DeadLetterSource.

    `receives`: the number of receives after which the redrive policy moves a message; None if unknown.
    """

    def __init__(self, client: SQSClient, url: str, receives: int | None) -> None:
        self._client = client
        self._url = url
        self._name = url.rpartition("/")[2]
        self._receives = receives
        self._pool = ThreadPoolExecutor(THREADS, "sqs-dead-letters")

    def lease(self, max_messages: int, wait: float, seconds: int) -> list[tuple[str, DeadLetter]]:
        """Poll once for up to ten dead letters."""
        try:
            found = aws.with_retries(
                self._client.receive_message,
                QueueUrl=self._url,
                MaxNumberOfMessages=min(max_messages, MAX_MESSAGES),
                WaitTimeSeconds=min(math.ceil(wait), POLL_SECONDS),
                VisibilityTimeout=seconds,
                MessageSystemAttributeNames=["ApproximateReceiveCount", "SentTimestamp", _SOURCE],
                MessageAttributeNames=["All"],
            ).get("Messages", ())
            return [(message["ReceiptHandle"], self._dead_letter(message)) for message in found]
        except aws.ERRORS as error:
            raise aws.queue_error(error, aws.label(self._client, self._name), "QUEUE_URL: its dead letters") from None

    def extend(self, handles: Sequence[str], seconds: int) -> dict[str, str]:
        """Change the visibility timeouts."""
        return self._call_batches(self._client.change_message_visibility_batch, handles, VisibilityTimeout=seconds)

    def remove(self, handles: Sequence[str]) -> dict[str, str]:
        """Delete the messages."""
        return self._call_batches(self._client.delete_message_batch, handles)

    def close(self) -> None:
        """Close the connections."""
        self._pool.shutdown()
        self._client.close()

    def _call_batches(self, call: Callable[..., Any], handles: Sequence[str], **fields: int) -> dict[str, str]:
        """Make concurrent calls with up to ten handles each. Return the error text of each handle that failed."""
        batches = [handles[start : start + MAX_ENTRIES] for start in range(0, len(handles), MAX_ENTRIES)]
        errors: dict[str, str] = {}
        for failed in self._pool.map(partial(self._call_batch, call, fields, []), batches):
            errors |= failed
        return errors

    def _call_batch(
        self, call: Callable[..., Any], fields: dict[str, int], errors: list[str], handles: Sequence[str]
    ) -> dict[str, str]:
        """Make one call. Skip it if a call has failed for all its handles: the calls share `errors`, its error text."""
        if errors:
            return dict.fromkeys(handles, errors[0])
        entries = [{"Id": str(number), "ReceiptHandle": handle, **fields} for number, handle in enumerate(handles)]
        try:
            response = aws.with_retries(call, QueueUrl=self._url, Entries=entries)
            done = {int(each["Id"]) for each in response.get("Successful", ())}
            reasons = {
                int(each["Id"]): f"{each['Code']}: {each.get('Message', '')}" for each in response.get("Failed", ())
            }
        except aws.ERRORS as error:
            errors.append(": ".join(filter(None, aws.explain(error, aws.label(self._client, self._name)))))
            return dict.fromkeys(handles, errors[0])
        return {handle: reasons.get(i, "no response") for i, handle in enumerate(handles) if i not in done}

    def _dead_letter(self, message: MessageTypeDef) -> DeadLetter:
        """Return a message as a dead letter.

        If the redrive policy of a standard queue moved the message, SentTimestamp is the time of publication.
        Otherwise it is the time at which the message was dead-lettered.
        """
        delivery = delivery_of(message, time.monotonic())
        by_worker = None
        if _SOURCE not in message["Attributes"]:
            by_worker = dead_letter_attributes.from_worker(delivery.attributes)
        info = by_worker or dead_letter_attributes.from_policy(self._receives, delivery.attributes)
        keeps_time = by_worker is None and not self._name.endswith(".fifo")
        published_at, dead_lettered_at = (delivery.published_at, None) if keeps_time else (None, delivery.published_at)
        original = DeadLetterDelivery(delivery.id, delivery.body, info.attributes, info.attempt, published_at)
        return DeadLetter(original, info.failure, dead_lettered_at)
