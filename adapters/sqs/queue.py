"""AWS SQS adapter. long_polling.py receives messages, settlement.py settles them."""

from __future__ import annotations

import json
import logging
import math
import re
import time
from dataclasses import asdict
from typing import TYPE_CHECKING

from adapters.base import Counts, QueueError, QueueURLError, QueueWarning
from adapters.shared.leased_dead_letters import LeasedDeadLetters
from adapters.shared.redeliveries import ExpectedRedeliveries
from adapters.sqs import client as aws
from adapters.sqs import sending
from adapters.sqs.dead_letters import SQSDeadLetters
from adapters.sqs.long_polling import POLL_SECONDS, LongPolling, SQSDelivery
from adapters.sqs.settlement import LEASE_SECONDS, Settlement

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from mypy_boto3_sqs import SQSClient

    from adapters.base import Delivery, Failure, QueueOptions

log = logging.getLogger("klaviyo_worker.sqs")

MIN_RECEIVES = 5  # a smaller maxReceiveCount is used up by a few restarts of the worker
POISON_DELAY = 3600.0  # seconds before the redelivery of a message that can never succeed, without a redrive policy
_EXPECTED = "expected sqs://NAME[?region=REGION] or https://sqs.REGION.amazonaws.com/ACCOUNT/NAME"
_NAME = r"(?P<name>[A-Za-z0-9_-]{1,80}|[A-Za-z0-9_-]{1,75}\.fifo)"
_REGION = r"(?P<region>[a-z]{2,}(-[a-z]+)+-[0-9]+)"
_BY_NAME = re.compile(rf"sqs://{_NAME}/?(\?region={_REGION})?")
_BY_URL = re.compile(rf"https://sqs\.{_REGION}\.amazonaws\.(com|com\.cn|eu)/[0-9]{{12}}/{_NAME}")
_DEAD_LETTER_SETTING = "DEAD_LETTER_QUEUE_URL"
_DIRECT_MODE = "KLAVIYO_WORKER_DEAD_LETTER_MODE=direct"


def open_url(url: str, options: QueueOptions) -> SQSQueue:
    """Open `sqs://NAME[?region=REGION]`, or the https URL that AWS gives the queue."""
    client, queue_url = _locate(url, "QUEUE_URL")
    return SQSQueue(client, queue_url, options)


def parse_url(url: str, setting: str = "QUEUE_URL") -> tuple[str, str]:
    """Return the queue's name and its region, which is "" if the URL does not name it. Raises QueueURLError."""
    named = _BY_NAME.fullmatch(url) or _BY_URL.fullmatch(url)
    if named is None:
        raise QueueURLError(f"{setting} is malformed", todo=_EXPECTED)
    return named["name"], named["region"] or ""


def _locate(url: str, setting: str) -> tuple[SQSClient, str]:
    """Return a client for the queue, and the queue's https URL."""
    name, region = parse_url(url, setting)
    client = aws.connect(region)
    if url.startswith("https:"):
        return client, url
    try:
        return client, aws.with_retries(client.get_queue_url, QueueName=name)["QueueUrl"]
    except aws.ERRORS as error:
        raise aws.queue_error(error, aws.label(client, name), setting) from None


class SQSQueue:
    """A queue. Implements QueueAdapter and every optional protocol."""

    def __init__(
        self,
        client: SQSClient,
        url: str,
        options: QueueOptions,
        *,
        lease_seconds: float = LEASE_SECONDS,
        poll_seconds: int = POLL_SECONDS,
    ) -> None:
        """`lease_seconds`: the visibility timeout of received messages, which replaces the queue's own."""
        self._client = client
        self._url = url
        self._name = url.rpartition("/")[2]
        self._options = options
        self._lease_seconds = lease_seconds
        self._settlement = Settlement(client, url)
        self._polling = LongPolling(client, url, lease_seconds=lease_seconds, poll_seconds=poll_seconds)
        self._dead_letter_url: str | None = None  # "" if the queue has none, None if unknown
        self._dead_letter_region = ""
        self._max_receives = math.inf
        self._expected_redeliveries = ExpectedRedeliveries()

    @property
    def lease_seconds(self) -> float:
        """The visibility timeout of received messages."""
        return self._lease_seconds

    def receive(self, max_messages: int, wait: float) -> Sequence[SQSDelivery]:
        """Return messages that the polls have received."""
        deliveries = self._polling.receive(max_messages, wait)
        self._expected_redeliveries.remove(delivery.id for delivery in deliveries)
        return deliveries

    def ack(self, deliveries: Sequence[Delivery]) -> None:
        """Delete the messages. Retry for as long as the leases can last."""
        self._expected_redeliveries.remove(delivery.id for delivery in deliveries)
        self._settlement.ack(_sqs_deliveries(deliveries))

    def nack(self, deliveries: Sequence[Delivery], delay: float = 0.0, failure: Failure | None = None) -> None:
        """Make the leases end after `delay`, at most twelve hours after the messages were received.

        Every delivery counts as a receive, even if the worker did not process the message: SQS cannot undo the count.
        """
        self._expected_redeliveries.add(delivery.id for delivery in deliveries if not self._is_last(delivery))
        for delivery in deliveries:
            if failure is not None and self._is_last(delivery):
                fields = {"reason": failure.reason, "stage": failure.stage, "error": failure.error}
                log.error("attempts_exhausted", extra={"message_id": delivery.id, **fields})
        self._settlement.nack(_sqs_deliveries(deliveries), max(delay, 0.0))

    def dead_letter(self, delivery: Delivery, failure: Failure) -> bool:
        """In direct mode, send the message to the dead-letter queue. Otherwise, or if that fails, nack it.

        Return True if the message was sent, or if the redrive policy moves it because it was received often enough.

        Without a redrive policy, SQS redelivers indefinitely, so the message is delayed by an hour. If the policy is
        unknown, the delay grows exponentially.
        """
        if self._options.direct_dead_letter and self._send_dead_letter(delivery, failure):
            self.ack([delivery])
            return True
        self.nack([delivery], self._poison_delay(delivery), failure)
        return self._is_last(delivery)

    def extend(self, deliveries: Sequence[Delivery], seconds: float) -> None:
        """Extend the leases, including those of pending messages. A lease can last twelve hours from the receipt."""
        started_at = time.monotonic()
        if not self._settlement.extend([*_sqs_deliveries(deliveries), *self._polling.pending()], seconds):
            raise QueueError("some leases could not be extended, or have nearly reached SQS's limit of twelve hours")
        self._polling.set_extended(started_at)

    def backlog(self) -> int | None:
        """Return SQS's approximate count, or the number of expected redeliveries if that is larger.

        Return None instead of 0, because SQS never reports reliably that a queue is empty.
        """
        try:
            counted = self._count(self._url) or 0
        except aws.ERRORS:
            counted = 0
        return max(counted, len(self._expected_redeliveries)) or None

    def destination(self) -> str:
        """Return the queue's https URL."""
        return self._url

    def counts(self) -> Counts:
        """Count the messages, and the dead letters if `check` has found their queue. Raises QueueError."""
        try:
            dead = self._count(self._dead_letter_url) if self._dead_letter_url else None
            return Counts(self._count(self._url), dead)
        except aws.ERRORS as error:
            raise aws.queue_error(error, aws.label(self._client, self._name)) from None

    def check(self) -> Sequence[QueueWarning]:
        """Read the queue and its redrive policy. Raises QueueError if the queue cannot be used in the configured mode.

        The permissions to receive, delete and extend are not tested: AWS reports them only when they are used, and a
        test would use up a receive of a message. If the queue was polled and the last poll failed, the error names the
        reason.
        """
        if self._polling.last_error:
            raise QueueError(f"QUEUE_URL: cannot receive from SQS: {self._polling.last_error}")
        if self._options.direct_dead_letter and self._is_fifo:
            raise QueueError(
                f"{_DIRECT_MODE} does not support FIFO queues, such as {self._name}", todo="use the redrive policy"
            )
        if not self._read_policy():
            unreadable = f"cannot read the redrive policy of {self._name}"
            if self._options.direct_dead_letter:
                raise QueueError(f"{_DIRECT_MODE}: {unreadable}", todo=self._grant_read)
            return [QueueWarning(unreadable, self._grant_read)]
        if self._options.direct_dead_letter and not self._dead_letter_url:
            raise QueueError(f"{_DIRECT_MODE}: {self._name} has no dead-letter queue", todo=self._policy_command)
        unusable = self._dead_letter_warning()
        if self._options.direct_dead_letter and unusable:
            raise QueueError(f"{_DIRECT_MODE}: {unusable.reason}", todo=unusable.todo)
        return list(self._warnings(unusable))

    def stop(self) -> None:
        """Wait for the running polls, and nack pending messages."""
        self._settlement.nack(self._polling.stop(), 0.0)

    def close(self) -> None:
        """Stop, and close the connections."""
        self.stop()
        self._settlement.close()
        self._client.close()

    def publish(self, bodies: Iterable[bytes]) -> int:
        """Send the messages to the queue, in order. FIFO queues are not supported: their messages need a group."""
        if self._is_fifo:
            raise QueueError(f"QUEUE_URL: {self._name} is a FIFO queue, which `publish` does not support")
        return sending.publish(self._client, self._url, bodies)

    def dead_letters(self) -> LeasedDeadLetters:
        """Open the configured dead-letter queue, or that of the redrive policy if none is configured."""
        if given := self._options.dead_letter_url:
            client, url = _locate(given, _DEAD_LETTER_SETTING)
            if url == self._url:
                raise QueueURLError(
                    f"{_DEAD_LETTER_SETTING} names the same queue as QUEUE_URL", todo="set it to the dead-letter queue"
                )
            return LeasedDeadLetters(SQSDeadLetters(client, url, None))
        if not self._read_policy():
            unreadable = f"cannot read the redrive policy of {self._name}"
            raise QueueError(f"QUEUE_URL: {unreadable}", todo=f"{self._grant_read}, or set {_DEAD_LETTER_SETTING}")
        if not self._dead_letter_url:
            raise QueueError(f"QUEUE_URL: {self._name} has no dead-letter queue", todo=self._policy_command)
        client = aws.connect(self._dead_letter_region)
        receives = None if math.isinf(self._max_receives) else int(self._max_receives)
        return LeasedDeadLetters(SQSDeadLetters(client, self._dead_letter_url, receives))

    def _poison_delay(self, delivery: Delivery) -> float:
        """Return the seconds before the redelivery of a message that can never succeed."""
        if self._dead_letter_url is None:  # the redrive policy is unknown
            return min(2.0 ** min(delivery.attempt or 1, 16), POISON_DELAY)
        return 0.0 if self._dead_letter_url else POISON_DELAY

    @property
    def _is_fifo(self) -> bool:
        return self._name.endswith(".fifo")

    @property
    def _grant_read(self) -> str:
        return f"grant sqs:GetQueueAttributes on {self._name}"

    @property
    def _policy_command(self) -> str:
        arn = f"arn:aws:sqs:{self._client.meta.region_name}:ACCOUNT:{self._name}-dead"
        policy = json.dumps({"deadLetterTargetArn": arn, "maxReceiveCount": 10})
        attributes = json.dumps({"RedrivePolicy": policy})
        return f"aws sqs set-queue-attributes --queue-url {self._url} --attributes '{attributes}'"

    def _read_policy(self) -> bool:
        """Read and store the redrive policy; return False if that is not permitted."""
        try:
            response = aws.with_retries(
                self._client.get_queue_attributes,
                QueueUrl=self._url,
                AttributeNames=["RedrivePolicy", "QueueArn"],  # a response without the ARN is not from SQS
            )
            policy = json.loads(response["Attributes"].get("RedrivePolicy") or "{}")
            self._max_receives = int(policy.get("maxReceiveCount", 0)) or math.inf
            self._set_dead_letter_queue(policy.get("deadLetterTargetArn"))
        except aws.ERRORS as error:
            if aws.is_denied(error):
                return False
            raise aws.queue_error(error, aws.label(self._client, self._name)) from None
        return True

    def _set_dead_letter_queue(self, arn: str | None) -> None:
        """Store the URL of the dead-letter queue, which can belong to another account or region."""
        if not arn:
            self._dead_letter_url = ""
            return
        region = self._client.meta.region_name
        *_, self._dead_letter_region, account, name = arn.split(":")
        host = self._url.rsplit("/", 2)[0].replace(region, self._dead_letter_region)
        self._dead_letter_url = f"{host}/{account}/{name}"

    def _dead_letter_warning(self) -> QueueWarning | None:
        """Return why the dead-letter queue cannot be used. None if it can, or if there is none."""
        try:
            if self._dead_letter_url:
                aws.with_retries(
                    self._client.get_queue_attributes, QueueUrl=self._dead_letter_url, AttributeNames=["QueueArn"]
                )
        except aws.ERRORS as error:
            reason, todo = aws.explain(
                error, f"{(self._dead_letter_url or '').rpartition('/')[2]} in {self._dead_letter_region}"
            )
            return QueueWarning(f"the dead-letter queue: {reason}", todo, is_missing_policy=aws.is_missing(error))
        return None

    def _warnings(self, unusable: QueueWarning | None) -> Iterator[QueueWarning]:
        """Yield a warning for each deficiency of the queue, with the command that fixes it."""
        if not self._dead_letter_url:
            reason = f"{self._name} has no redrive policy, so SQS redelivers failed messages indefinitely"
            yield QueueWarning(reason, self._policy_command, is_missing_policy=True)
        if unusable:
            yield unusable
        if self._max_receives < MIN_RECEIVES:
            yield QueueWarning(
                f"{self._name} dead-letters messages after {self._max_receives} receives, and every restart of a "
                "worker uses up a receive of some messages",
                f"set maxReceiveCount to 10: {self._policy_command}",
            )

    def _is_last(self, delivery: Delivery) -> bool:
        """Return whether the redrive policy dead-letters this message if it is nacked now."""
        return delivery.attempt is not None and delivery.attempt >= self._max_receives

    def _count(self, url: str) -> int | None:
        """Count the ready, delayed and leased messages of a queue; None if that is not permitted."""
        try:
            response = self._client.get_queue_attributes(
                QueueUrl=url,
                AttributeNames=[
                    "ApproximateNumberOfMessages",
                    "ApproximateNumberOfMessagesNotVisible",
                    "ApproximateNumberOfMessagesDelayed",
                ],
            )
            return sum(map(int, response["Attributes"].values()))
        except aws.ERRORS as error:
            if aws.is_denied(error):
                return None
            raise

    def _send_dead_letter(self, delivery: Delivery, failure: Failure) -> bool:
        """Send the message to the dead-letter queue with its reason; return whether that succeeded."""
        if not self._dead_letter_url:
            return False
        added = {**asdict(failure), "queue": self._name, "message_id": delivery.id, "attempt": str(delivery.attempt)}
        try:
            sending.send_dead_letter(self._client, self._dead_letter_url, delivery.body, added, delivery.attributes)
        except aws.ERRORS as error:
            log.warning("dead_letter_failed", extra={"message_id": delivery.id, "reason": aws.first_line(error)})
            return False
        return True


def _sqs_deliveries(deliveries: Iterable[Delivery]) -> list[SQSDelivery]:
    return [delivery for delivery in deliveries if isinstance(delivery, SQSDelivery)]
