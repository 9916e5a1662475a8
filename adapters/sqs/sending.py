"""Puts messages into SQS queues: what is published, and dead letters with their reason."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from adapters.base import QueueError
from adapters.shared.batches import batches
from adapters.sqs import client as aws

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from mypy_boto3_sqs import SQSClient
    from mypy_boto3_sqs.type_defs import MessageAttributeValueTypeDef

MAX_BATCH, MAX_BYTES = 10, 1_048_576  # messages and bytes in a call, and bytes of a message with its attributes
MAX_ATTRIBUTES = 10  # of a message
MAX_VALUE = 1024  # bytes of an attribute of ours
# https://docs.aws.amazon.com/AWSSimpleQueueService/latest/APIReference/API_SendMessage.html
_FORBIDDEN = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def publish(client: SQSClient, queue_url: str, bodies: Iterable[bytes]) -> int:
    """Send the messages in order and return how many. Raises QueueError, saying how many were taken before."""
    stored = 0
    for batch in batches(bodies, MAX_BATCH, MAX_BYTES):
        texts = [_text(body) for body in batch]
        if None in texts:
            which = f"message {stored + texts.index(None) + 1}"
            raise _ended(stored, f"{which} is not what SQS takes: UTF-8 text, not empty, without control characters")
        entries = [{"Id": str(index), "MessageBody": text or ""} for index, text in enumerate(texts)]
        try:
            answer = aws.insist(client.send_message_batch, QueueUrl=queue_url, Entries=entries)  # type: ignore[arg-type]
            taken = {int(each["Id"]) for each in answer.get("Successful", ())}
            why = next((f"{each['Code']}: {each.get('Message', '')}" for each in answer.get("Failed", ())), "no answer")
        except aws.ERRORS as error:
            raise _ended(stored, aws.reason(error)) from None
        if len(taken) < len(batch):
            numbers = ", ".join(str(stored + index + 1) for index in range(len(batch)) if index not in taken)
            raise _ended(stored + len(taken), f"SQS did not take message {numbers}: {why}")
        stored += len(batch)
    return stored


def bury(client: SQSClient, queue_url: str, body: bytes, ours: Mapping[str, str], theirs: Mapping[str, str]) -> None:
    """Send a dead letter with our attributes, and of its own as many as fit. Raises one of `aws.ERRORS`."""
    room = MAX_BYTES - len(body)
    attributes = dict(message_attributes(ours, theirs, room))
    text = body.decode("utf-8", "surrogatepass")
    aws.insist(client.send_message, QueueUrl=queue_url, MessageBody=text, MessageAttributes=attributes)


def message_attributes(
    ours: Mapping[str, str], theirs: Mapping[str, str], room: int
) -> Iterator[tuple[str, MessageAttributeValueTypeDef]]:
    """Yield at most ten attributes in `room` bytes: ours first, cut and mended, then theirs as they are.

    To SQS a value must not be empty, nor hold what a body must not.
    """
    number = 0
    mended = {name: _cut(_FORBIDDEN.sub("\N{REPLACEMENT CHARACTER}", value)) for name, value in ours.items()}
    for name, value in {**mended, **{name: value for name, value in theirs.items() if name not in ours}}.items():
        size = len(name) + len("String") + len(value.encode("utf-8", "surrogatepass"))
        if value and size <= room and number < MAX_ATTRIBUTES:
            number, room = number + 1, room - size
            yield name, {"DataType": "String", "StringValue": value}


def _cut(value: str) -> str:
    return value.encode()[:MAX_VALUE].decode(errors="ignore")


def _text(body: bytes) -> str | None:
    """Return the body as the text it is; None for what SQS does not take."""
    try:
        text = body.decode()
    except UnicodeDecodeError:
        return None
    return None if not text or _FORBIDDEN.search(text) else text


def _ended(stored: int, why: str) -> QueueError:
    return QueueError(f"QUEUE_URL: {stored} messages were published, then: {why}")
