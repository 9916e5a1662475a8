"""Sends messages to SQS queues: published messages, and dead letters with their reason."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from adapters.base import QueueError
from adapters.shared.chunks import chunked
from adapters.sqs import client as aws

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from mypy_boto3_sqs import SQSClient
    from mypy_boto3_sqs.type_defs import MessageAttributeValueTypeDef

MAX_BATCH = 10  # messages in a call, SQS's limit
MAX_BYTES = 1_048_576  # of a call, and of a message with its attributes, SQS's limit
MAX_ATTRIBUTES = 10  # of a message, SQS's limit
MAX_VALUE = 1024  # bytes of the value of an added attribute
# https://docs.aws.amazon.com/AWSSimpleQueueService/latest/APIReference/API_SendMessage.html
_FORBIDDEN = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def publish(client: SQSClient, queue_url: str, bodies: Iterable[bytes]) -> int:
    """Send the messages in order and return their number. A QueueError says how many were sent before it."""
    stored = 0
    for batch in chunked(bodies, len, MAX_BYTES, MAX_BATCH):
        texts = [_decode(body) for body in batch]
        if None in texts:
            number = stored + texts.index(None) + 1
            expected = "expected UTF-8 text, not empty, without control characters"
            raise _publish_error(stored, f"message {number} is invalid: {expected}")
        entries = [{"Id": str(index), "MessageBody": text or ""} for index, text in enumerate(texts)]
        try:
            response = aws.with_retries(client.send_message_batch, QueueUrl=queue_url, Entries=entries)  # type: ignore[arg-type]
            accepted = {int(each["Id"]) for each in response.get("Successful", ())}
            reasons = (f"{each['Code']}: {each.get('Message', '')}" for each in response.get("Failed", ()))
            reason = next(reasons, "no response")
        except aws.ERRORS as error:
            raise _publish_error(stored, aws.first_line(error)) from None
        if len(accepted) < len(batch):
            numbers = ", ".join(str(stored + index + 1) for index in range(len(batch)) if index not in accepted)
            raise _publish_error(stored + len(accepted), f"SQS did not accept message {numbers}: {reason}")
        stored += len(batch)
    return stored


def send_dead_letter(
    client: SQSClient, queue_url: str, body: bytes, added: Mapping[str, str], original: Mapping[str, str]
) -> None:
    """Send a dead letter with the added attributes, and with as many of its original attributes as fit.

    Raises one of `aws.ERRORS`.
    """
    attributes = dict(message_attributes(added, original, MAX_BYTES - len(body)))
    text = body.decode("utf-8", "surrogatepass")
    aws.with_retries(client.send_message, QueueUrl=queue_url, MessageBody=text, MessageAttributes=attributes)


def message_attributes(
    added: Mapping[str, str], original: Mapping[str, str], max_bytes: int
) -> Iterator[tuple[str, MessageAttributeValueTypeDef]]:
    """Yield up to ten attributes of `max_bytes` in total: the added ones, made valid, then the original ones.

    SQS rejects empty values, and values with characters that are forbidden in bodies.
    """
    number = 0
    valid = {name: _truncate(_FORBIDDEN.sub("\N{REPLACEMENT CHARACTER}", value)) for name, value in added.items()}
    for name, value in {**valid, **{name: value for name, value in original.items() if name not in added}}.items():
        size = len(name) + len("String") + len(value.encode("utf-8", "surrogatepass"))
        if value and size <= max_bytes and number < MAX_ATTRIBUTES:
            number, max_bytes = number + 1, max_bytes - size
            yield name, {"DataType": "String", "StringValue": value}


def _truncate(value: str) -> str:
    return value.encode()[:MAX_VALUE].decode(errors="ignore")


def _decode(body: bytes) -> str | None:
    """Return the body as text; None if SQS does not accept it."""
    try:
        text = body.decode()
    except UnicodeDecodeError:
        return None
    return None if not text or _FORBIDDEN.search(text) else text


def _publish_error(stored: int, reason: str) -> QueueError:
    return QueueError(f"QUEUE_URL: {stored} messages were published, then: {reason}")
