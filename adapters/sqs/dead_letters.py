"""The dead letters of SQS: a queue like any other, looked through by long polls."""

from __future__ import annotations

import math
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from adapters.base import DeadLetter
from adapters.shared import dead_letter_attributes as buried
from adapters.shared.leased_dead_letters import LetterDelivery
from adapters.sqs import client as aws
from adapters.sqs.long_polling import MAX_MESSAGES, POLL_SECONDS, delivery
from adapters.sqs.settlement import MAX_ENTRIES, THREADS

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mypy_boto3_sqs import SQSClient
    from mypy_boto3_sqs.type_defs import MessageTypeDef

_SOURCE: Final = "DeadLetterQueueSourceArn"  # that a redrive policy moved it, SQS tells by this


class SQSLetters:
    """A queue of dead letters. Implements Source. `receives`: after how many the policy gives up, where known."""

    def __init__(self, client: SQSClient, url: str, receives: int | None) -> None:
        self._client = client
        self._url = url
        self._name = url.rpartition("/")[2]
        self._receives = receives
        self._pool = ThreadPoolExecutor(THREADS, "sqs-dead-letters")

    def lease(self, at_most: int, wait: float, seconds: int) -> list[tuple[str, DeadLetter]]:
        """Poll once, which brings ten at the most."""
        try:
            found = aws.insist(
                self._client.receive_message,
                QueueUrl=self._url,
                MaxNumberOfMessages=min(at_most, MAX_MESSAGES),
                WaitTimeSeconds=min(math.ceil(wait), POLL_SECONDS),
                VisibilityTimeout=seconds,
                MessageSystemAttributeNames=["ApproximateReceiveCount", "SentTimestamp", _SOURCE],
                MessageAttributeNames=["All"],
            ).get("Messages", ())
            return [(message["ReceiptHandle"], self._letter(message)) for message in found]
        except aws.ERRORS as error:
            raise aws.queue_error(error, self._name, "QUEUE_URL: its dead letters") from None

    def extend(self, handles: Sequence[str], seconds: int) -> dict[str, str]:
        """Change the visibility timeouts."""
        return self._tell(self._client.change_message_visibility_batch, handles, VisibilityTimeout=seconds)

    def remove(self, handles: Sequence[str]) -> dict[str, str]:
        """Delete."""
        return self._tell(self._client.delete_message_batch, handles)

    def close(self) -> None:
        """Close the connections."""
        self._pool.shutdown()
        self._client.close()

    def _tell(self, call: Callable[..., Any], handles: Sequence[str], **about: int) -> dict[str, str]:
        """Make calls of ten, side by side."""
        some = [handles[start : start + MAX_ENTRIES] for start in range(0, len(handles), MAX_ENTRIES)]
        failed: dict[str, str] = {}
        for each in self._pool.map(partial(self._tell_some, call, about, []), some):
            failed |= each
        return failed

    def _tell_some(
        self, call: Callable[..., Any], about: dict[str, int], trouble: list[str], handles: Sequence[str]
    ) -> dict[str, str]:
        """Make one call, unless another has just failed altogether."""
        if trouble:
            return dict.fromkeys(handles, trouble[0])
        entries = [{"Id": str(number), "ReceiptHandle": handle, **about} for number, handle in enumerate(handles)]
        try:
            answer = aws.insist(call, QueueUrl=self._url, Entries=entries)
            done = {int(each["Id"]) for each in answer.get("Successful", ())}
            why = {int(each["Id"]): f"{each['Code']}: {each.get('Message', '')}" for each in answer.get("Failed", ())}
        except aws.ERRORS as error:
            trouble.append(": ".join(filter(None, aws.explain(error, self._name))))
            return dict.fromkeys(handles, trouble[0])
        return {handle: why.get(number, "no answer") for number, handle in enumerate(handles) if number not in done}

    def _letter(self, message: MessageTypeDef) -> DeadLetter:
        """Tell what SQS does: it keeps the time of sending, but for a FIFO queue, which has that of burying instead."""
        ours = delivery(message, time.monotonic())
        told = None if _SOURCE in message["Attributes"] else buried.direct(ours.attributes)
        burial = told or buried.by_policy(self._receives, ours.attributes)
        is_original = told is None and not self._name.endswith(".fifo")
        published_at, dead_lettered_at = (ours.published_at, None) if is_original else (None, ours.published_at)
        letter = LetterDelivery(ours.id, ours.body, burial.attributes, burial.attempt, published_at)
        return DeadLetter(letter, burial.failure, dead_lettered_at)
