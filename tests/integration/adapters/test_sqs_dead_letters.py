"""The dead letters of SQS on moto, and behind a relay that sends responses that moto cannot."""

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
    """A relay for all calls."""
    relay = Network(moto)
    for name, value in sqs.environment(relay.port).items():
        monkeypatch.setenv(name, value)
    yield relay
    relay.down()


@pytest.fixture
def open_queues(network: Network) -> Iterator[Open]:
    """Open queues; close them at the end."""
    queues: list[SQSQueue] = []

    def open_one(queue: Queue, **options: Any) -> SQSQueue:
        queues.append(SQSQueue(aws.connect(), queue.queue_url, QueueOptions(**options)))
        return queues[-1]

    yield open_one
    for queue in queues:
        queue.close()


@pytest.fixture
def queue(moto: Server) -> Queue:
    return Queue(moto)


def send_dead_letters(queue: Queue, *bodies: bytes, **attributes: str) -> None:
    """Send messages to the dead-letter queue."""
    values: Any = {name: {"DataType": "String", "StringValue": value} for name, value in attributes.items()}
    for body in bodies:
        queue.client.send_message(QueueUrl=queue.dead_url, MessageBody=body.decode(), MessageAttributes=values)


def bodies(queue: SQSQueue) -> list[bytes]:
    """Receive dead letters and release them."""
    dead_letters = queue.dead_letters()
    try:
        return [dead_letter.delivery.body for dead_letter in dead_letters.receive(10, 1.0)]
    finally:
        dead_letters.close()


def test_setting_replaces_unreadable_policy(queue: Queue, network: Network, open_queues: Open) -> None:
    """Operators then need only the permissions on the dead-letter queue that docs/permissions.md lists."""
    send_dead_letters(queue, b"x", b"y")
    network.always["GetQueueAttributes"] = DENIED
    with pytest.raises(
        QueueError, match=f"grant sqs:GetQueueAttributes on {queue.name}, or set DEAD_LETTER_QUEUE_URL$"
    ):
        open_queues(queue).dead_letters()
    network.requests.clear()
    dead_letters = open_queues(queue, dead_letter_url=f"sqs://{queue.name}-dead").dead_letters()
    dead_letters.remove(
        [dead_letter for dead_letter in dead_letters.receive(10, 1.0) if dead_letter.delivery.body == b"x"]
    )
    dead_letters.close()
    assert queue.count(queue.dead_url) == 1
    (row,) = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| **An operator**")]
    assert {request["VisibilityTimeout"] for request in network.requests["ReceiveMessage"]} == {60}
    actions = {f"sqs:{operation.removesuffix('Batch')}" for operation in network.requests}
    assert actions == set(re.findall(r"sqs:\w+", row)) - {"sqs:GetQueueAttributes"}


def test_missing_queue_or_policy_is_reported(queue: Queue, open_queues: Open, moto: Server) -> None:
    """The advice is to add a policy, create a queue, or correct the name."""
    with pytest.raises(QueueError, match="has no dead-letter queue: aws sqs set-queue-attributes"):
        open_queues(Queue(moto, receives=None)).dead_letters()
    with pytest.raises(QueueError, match=r"^DEAD_LETTER_QUEUE_URL: nowhere in eu-central-1 does not exist: create it"):
        open_queues(queue, dead_letter_url="sqs://nowhere").dead_letters()
    with pytest.raises(QueueURLError, match=r"^DEAD_LETTER_QUEUE_URL is malformed: expected sqs://NAME"):
        open_queues(queue, dead_letter_url="pubsub://demo/dead").dead_letters()
    with pytest.raises(
        QueueURLError, match=r"^DEAD_LETTER_QUEUE_URL names the same queue as QUEUE_URL: "
    ):  # otherwise `drop` would empty it
        open_queues(queue, dead_letter_url=queue.url).dead_letters()
    queue.client.delete_queue(QueueUrl=queue.dead_url)
    with pytest.raises(
        QueueError, match=f"^QUEUE_URL: its dead letters: {queue.name}-dead in eu-central-1 does not exist"
    ):
        bodies(open_queues(queue))


def test_policy_can_name_a_queue_of_another_account_or_region(
    queue: Queue, network: Network, open_queues: Open
) -> None:
    """AWS advises against it, but allows it."""
    policy = {"deadLetterTargetArn": "arn:aws:sqs:us-east-1:999999999999:other", "maxReceiveCount": "3"}
    policy_response = Response(
        200, Attributes={"RedrivePolicy": json.dumps(policy), "QueueArn": "arn:aws:sqs:eu-central-1:1:ours"}
    )
    network.responses["GetQueueAttributes"].append(policy_response)
    dead_letters = open_queues(queue).dead_letters()
    assert isinstance(dead_letters._source, SQSDeadLetters)
    assert dead_letters._source._client.meta.region_name == "us-east-1"
    assert dead_letters._source._url.endswith("/999999999999/other")
    dead_letters.close()


def test_refusals_are_reported(queue: Queue, network: Network, open_queues: Open) -> None:
    """Both receiving and deletion can be refused. Messages that could not be deleted still exist."""
    send_dead_letters(queue, *[b"%d" % number for number in range(12)])
    dead_letters = open_queues(queue).dead_letters()
    network.responses["ReceiveMessage"].append(DENIED)
    with pytest.raises(QueueError, match=f"^QUEUE_URL: its dead letters: not permitted to use {queue.name}-dead"):
        dead_letters.receive(10, 1.0)
    found = [*dead_letters.receive(10, 1.0), *dead_letters.receive(10, 1.0)]
    network.always["DeleteMessageBatch"] = DENIED
    with pytest.raises(
        QueueError, match=r"^QUEUE_URL: 12 dead letters were possibly not removed: not permitted to use"
    ):
        dead_letters.remove(found)
    failed = [{"Id": "0", "Code": "InternalError", "Message": "because", "SenderFault": False}]
    del network.always["DeleteMessageBatch"]
    network.responses["DeleteMessageBatch"].append(Response(200, Successful=[{"Id": "1"}], Failed=failed))
    with pytest.raises(QueueError, match=r"^QUEUE_URL: 2 dead letters were possibly not removed: InternalError"):
        dead_letters.remove(found[:3])  # the response does not mention the third
    dead_letters.close()
    assert len(bodies(open_queues(queue))) == 10


def test_refused_call_is_not_repeated_for_all_batches(queue: Queue, network: Network, open_queues: Open) -> None:
    """The same applies to an unreachable service: hundreds of batches would take long."""
    network.always["DeleteMessageBatch"] = DENIED
    dead_letters = open_queues(queue).dead_letters()
    handles = [f"h{number}" for number in range(400)]
    assert dead_letters._source.remove(handles).keys() == set(handles)
    assert len(network.requests["DeleteMessageBatch"]) <= sqs_settlement.THREADS
    dead_letters.close()


def test_dead_letter_with_lost_lease_can_be_removed(queue: Queue, open_queues: Open) -> None:
    """The next poll leases it again. It is not returned twice."""
    send_dead_letters(queue, b"x")
    dead_letters = open_queues(queue).dead_letters()
    found = dead_letters.receive(10, 1.0)
    dead_letters._source.extend([lease.handle for lease in dead_letters._leases.values()], 0)
    assert dead_letters.receive(10, 1.0) == []
    dead_letters.remove(found)
    dead_letters.close()
    assert queue.count(queue.dead_url) == 0


def test_dead_letter_of_the_policy_is_distinguished(queue: Queue, network: Network, open_queues: Open) -> None:
    """If a message with the worker's attributes was moved back to the queue, the policy can dead-letter it."""
    added = {"reason": "why", "stage": "send", "message_id": "7", "attempt": "2", "queue": "q", "colour": "blue"}
    values = {name: {"StringValue": value, "DataType": "String"} for name, value in added.items()}
    system = {"ApproximateReceiveCount": "9", "SentTimestamp": "1000"}
    message = {"MessageId": "1", "ReceiptHandle": "r", "Body": "x", "MessageAttributes": values, "Attributes": system}
    moved = {**message, "MessageId": "2", "Attributes": {**system, "DeadLetterQueueSourceArn": "arn:aws:sqs:r:1:q"}}
    network.responses["ReceiveMessage"].append(Response(200, Messages=[message, moved]))
    dead_letters = open_queues(queue).dead_letters()
    direct, policy = dead_letters.receive(10, 1.0)
    dead_letters.close()
    assert (direct.failure.reason, direct.delivery.attempt, direct.delivery.attributes) == (
        "why",
        2,
        {"colour": "blue"},
    )
    assert direct.delivery.published_at is None
    assert direct.dead_lettered_at is not None
    assert (policy.failure.stage, policy.delivery.attempt, policy.delivery.attributes) == ("queue", 5, added)
    assert policy.delivery.published_at is not None
    assert policy.dead_lettered_at is None


def test_fifo_queue_has_the_time_of_dead_lettering(moto: Server, open_queues: Open) -> None:
    """A FIFO queue sets SentTimestamp when the message is moved. A standard queue keeps it."""
    client = sqs.client(moto.port)
    url = client.create_queue(
        QueueName="dead.fifo", Attributes={"FifoQueue": "true", "ContentBasedDeduplication": "true"}
    )["QueueUrl"]
    client.send_message(QueueUrl=url, MessageBody="x", MessageGroupId="g")
    dead_letters = open_queues(Queue(moto), dead_letter_url="sqs://dead.fifo").dead_letters()
    (dead_letter,) = dead_letters.receive(10, 1.0)
    dead_letters.remove([dead_letter])
    dead_letters.close()
    assert dead_letter.delivery.published_at is None
    assert dead_letter.dead_lettered_at is not None
    assert dead_letter.failure.reason == "dead-lettered by the queue: the worker's log has the reason"
