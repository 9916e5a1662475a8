"""The dead letters of SQS on moto, and behind a relay that answers as moto cannot."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from adapters import QueueError, QueueOptions, QueueURLError
from adapters.sqs import client as aws
from adapters.sqs import settlement as sqs_settlement
from adapters.sqs.dead_letters import SQSDeadLetters
from adapters.sqs.queue import SQSQueue
from tests.support import sqs_fakes as sqs
from tests.support.sqs_fakes import DENIED, Network, Queue, Response, Server

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Open = Callable[..., SQSQueue]

PAGE = Path(__file__).parents[3] / "docs" / "permissions.md"


@pytest.fixture
def network(moto: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Network]:
    """All calls go by a relay."""
    relay = Network(moto)
    for name, value in sqs.environment(relay.port).items():
        monkeypatch.setenv(name, value)
    yield relay
    relay.down()


@pytest.fixture
def opened(network: Network) -> Iterator[Open]:
    """Open queues that are closed in the end."""
    queues: list[SQSQueue] = []

    def open_(queue: Queue, **options: Any) -> SQSQueue:
        queues.append(SQSQueue(aws.connect(), queue.queue_url, QueueOptions(**options)))
        return queues[-1]

    yield open_
    for queue in queues:
        queue.close()


@pytest.fixture
def queue(moto: Server) -> Queue:
    return Queue(moto)


def bury(queue: Queue, *bodies: bytes, **attributes: str) -> None:
    """Put messages where dead letters are."""
    about: Any = {name: {"DataType": "String", "StringValue": value} for name, value in attributes.items()}
    for body in bodies:
        queue.client.send_message(QueueUrl=queue.dead_url, MessageBody=body.decode(), MessageAttributes=about)


def bodies(queue: SQSQueue) -> list[bytes]:
    """Look once, and leave all."""
    letters = queue.dead_letters()
    try:
        return [letter.delivery.body for letter in letters.receive(10, 1.0)]
    finally:
        letters.close()


def test_the_setting_names_the_queue_where_the_policy_may_not_be_read(
    queue: Queue, network: Network, opened: Open
) -> None:
    """All that an operator then needs are the rights on the dead letters that the page has."""
    bury(queue, b"x", b"y")
    network.always["GetQueueAttributes"] = DENIED
    with pytest.raises(QueueError, match=r"grant sqs:GetQueueAttributes on it, or set DEAD_LETTER_QUEUE_URL$"):
        opened(queue).dead_letters()
    network.requests.clear()
    letters = opened(queue, dead_letter_url=f"sqs://{queue.name}-dead").dead_letters()
    letters.remove([letter for letter in letters.receive(10, 1.0) if letter.delivery.body == b"x"])
    letters.close()
    assert queue.count(queue.dead_url) == 1
    (row,) = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| **An operator**")]
    assert {asked["VisibilityTimeout"] for asked in network.requests["ReceiveMessage"]} == {60}
    asked = {f"sqs:{operation.removesuffix('Batch')}" for operation in network.requests}
    assert asked == set(re.findall(r"sqs:\w+", row)) - {"sqs:GetQueueAttributes"}


def test_what_is_missing_is_named(queue: Queue, opened: Open, moto: Server) -> None:
    """With what to do: a policy, a queue, the right name."""
    with pytest.raises(QueueError, match="has no dead-letter queue: aws sqs set-queue-attributes"):
        opened(Queue(moto, receives=None)).dead_letters()
    with pytest.raises(QueueError, match=r"^DEAD_LETTER_QUEUE_URL: nowhere does not exist: create it"):
        opened(queue, dead_letter_url="sqs://nowhere").dead_letters()
    with pytest.raises(QueueURLError, match=r"^DEAD_LETTER_QUEUE_URL is malformed: expected sqs://NAME"):
        opened(queue, dead_letter_url="pubsub://demo/dead").dead_letters()
    with pytest.raises(QueueURLError, match=r"^DEAD_LETTER_QUEUE_URL is QUEUE_URL: "):  # else `drop` would empty it
        opened(queue, dead_letter_url=queue.url).dead_letters()
    queue.client.delete_queue(QueueUrl=queue.dead_url)
    with pytest.raises(QueueError, match=f"^QUEUE_URL: its dead letters: {queue.name}-dead does not exist"):
        bodies(opened(queue))


def test_the_policy_may_name_a_queue_of_another_account_or_region(queue: Queue, network: Network, opened: Open) -> None:
    """AWS advises against it, and lets it be."""
    policy = {"deadLetterTargetArn": "arn:aws:sqs:us-east-1:999999999999:theirs", "maxReceiveCount": "3"}
    told = Response(
        200, Attributes={"RedrivePolicy": json.dumps(policy), "QueueArn": "arn:aws:sqs:eu-central-1:1:ours"}
    )
    network.responses["GetQueueAttributes"].append(told)
    letters = opened(queue).dead_letters()
    assert isinstance(letters._source, SQSDeadLetters)
    assert letters._source._client.meta.region_name == "us-east-1"
    assert letters._source._url.endswith("/999999999999/theirs")
    letters.close()


def test_refusals_are_told(queue: Queue, network: Network, opened: Open) -> None:
    """To receive, to delete; what could not be deleted is there for who looks next."""
    bury(queue, *[b"%d" % number for number in range(12)])
    letters = opened(queue).dead_letters()
    network.responses["ReceiveMessage"].append(DENIED)
    with pytest.raises(QueueError, match=f"^QUEUE_URL: its dead letters: not permitted on {queue.name}-dead"):
        letters.receive(10, 1.0)
    found = [*letters.receive(10, 1.0), *letters.receive(10, 1.0)]
    network.always["DeleteMessageBatch"] = DENIED
    with pytest.raises(QueueError, match=r"^QUEUE_URL: 12 dead letters may not have been removed: not permitted on"):
        letters.remove(found)
    failed = [{"Id": "0", "Code": "InternalError", "Message": "because", "SenderFault": False}]
    del network.always["DeleteMessageBatch"]
    network.responses["DeleteMessageBatch"].append(Response(200, Successful=[{"Id": "1"}], Failed=failed))
    with pytest.raises(QueueError, match=r"^QUEUE_URL: 2 dead letters may not have been removed: InternalError"):
        letters.remove(found[:3])  # of the third nothing is said
    letters.close()
    assert len(bodies(opened(queue))) == 10


def test_a_refusal_is_not_asked_for_again_and_again(queue: Queue, network: Network, opened: Open) -> None:
    """Nor is a service that is out of reach: hundreds of calls would each take their time."""
    network.always["DeleteMessageBatch"] = DENIED
    letters = opened(queue).dead_letters()
    handles = [f"h{number}" for number in range(400)]
    assert letters._source.remove(handles).keys() == set(handles)
    assert len(network.requests["DeleteMessageBatch"]) <= sqs_settlement.THREADS
    letters.close()


def test_a_letter_whose_lease_was_lost_can_still_be_removed(queue: Queue, opened: Open) -> None:
    """It is leased anew by the look that goes on, and not handed out again."""
    bury(queue, b"x")
    letters = opened(queue).dead_letters()
    found = letters.receive(10, 1.0)
    letters._source.extend([lease.handle for lease in letters._leases.values()], 0)
    assert letters.receive(10, 1.0) == []
    letters.remove(found)
    letters.close()
    assert queue.count(queue.dead_url) == 0


def test_who_gave_up_is_told_as_far_as_sqs_does(queue: Queue, network: Network, opened: Open) -> None:
    """A message that was moved back with our attributes on it, and given up on by the policy, is the policy's."""
    ours = {"reason": "why", "stage": "send", "message_id": "7", "attempt": "2", "queue": "q", "colour": "blue"}
    values = {name: {"StringValue": value, "DataType": "String"} for name, value in ours.items()}
    told = {"ApproximateReceiveCount": "9", "SentTimestamp": "1000"}
    message = {"MessageId": "1", "ReceiptHandle": "r", "Body": "x", "MessageAttributes": values, "Attributes": told}
    moved = {**message, "MessageId": "2", "Attributes": {**told, "DeadLetterQueueSourceArn": "arn:aws:sqs:r:1:q"}}
    network.responses["ReceiveMessage"].append(Response(200, Messages=[message, moved]))
    letters = opened(queue).dead_letters()
    direct, policy = letters.receive(10, 1.0)
    letters.close()
    assert (direct.failure.reason, direct.delivery.attempt, direct.delivery.attributes) == (
        "why",
        2,
        {"colour": "blue"},
    )
    assert direct.delivery.published_at is None
    assert direct.dead_lettered_at is not None
    assert (policy.failure.stage, policy.delivery.attempt, policy.delivery.attributes) == ("queue", 5, ours)
    assert policy.delivery.published_at is not None
    assert policy.dead_lettered_at is None


def test_a_fifo_queue_tells_when_a_letter_was_buried(moto: Server, opened: Open) -> None:
    """It sets the time of sending anew, where a standard queue keeps it."""
    client = sqs.client(moto.port)
    url = client.create_queue(
        QueueName="dead.fifo", Attributes={"FifoQueue": "true", "ContentBasedDeduplication": "true"}
    )["QueueUrl"]
    client.send_message(QueueUrl=url, MessageBody="x", MessageGroupId="g")
    letters = opened(Queue(moto), dead_letter_url="sqs://dead.fifo").dead_letters()
    (letter,) = letters.receive(10, 1.0)
    letters.remove([letter])
    letters.close()
    assert letter.delivery.published_at is None
    assert letter.dead_lettered_at is not None
    assert letter.failure.reason == "dead-lettered by the queue: the worker's log has the reason"
