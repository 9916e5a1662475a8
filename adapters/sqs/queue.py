"""AWS SQS: what a queue of theirs has to do with a queue of ours.

Messages come by adapters/long_polling.py, and are settled by adapters/sqs_settlement.py.
"""

from __future__ import annotations

import json
import logging
import math
import re
import time
from dataclasses import asdict
from typing import TYPE_CHECKING

from adapters.base import Counts, QueueError, QueueURLError, QueueWarning
from adapters.shared.leased_dead_letters import LeasedLetters
from adapters.shared.redeliveries import Awaited
from adapters.sqs import client as aws
from adapters.sqs import sending as sqs_sending
from adapters.sqs.dead_letters import SQSLetters
from adapters.sqs.long_polling import POLL_SECONDS, LongPolling, SQSDelivery
from adapters.sqs.settlement import LEASE_SECONDS, Settlement

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from mypy_boto3_sqs import SQSClient

    from adapters.base import Delivery, Failure, QueueOptions

log = logging.getLogger("klaviyo_worker.sqs")

FEW_RECEIVES = 5  # a maxReceiveCount below is used up by a few restarts of the worker
SELDOM = 3600.0  # seconds until poison comes again that no redrive policy ends
_EXPECTED = "expected sqs://NAME[?region=REGION] or https://sqs.REGION.amazonaws.com/ACCOUNT/NAME"
_NAME = r"(?P<name>[A-Za-z0-9_-]{1,80}|[A-Za-z0-9_-]{1,75}\.fifo)"
_REGION = r"(?P<region>[a-z]{2,}(-[a-z]+)+-[0-9]+)"
_BY_NAME = re.compile(rf"sqs://{_NAME}/?(\?region={_REGION})?")
_BY_URL = re.compile(rf"https://sqs\.{_REGION}\.amazonaws\.(com|com\.cn|eu)/[0-9]{{12}}/{_NAME}")
_DEAD_LETTERS = "DEAD_LETTER_QUEUE_URL"
_DIRECT = "KLAVIYO_WORKER_DEAD_LETTER_MODE=direct"
_READ = "grant sqs:GetQueueAttributes on it"


def open_url(url: str, options: QueueOptions) -> SQSQueue:
    """Open `sqs://NAME[?region=REGION]`, or the URL by which AWS names the queue."""
    client, queue_url = _locate(url, "QUEUE_URL")
    return SQSQueue(client, queue_url, options)


def parse_url(url: str, setting: str = "QUEUE_URL") -> tuple[str, str]:
    """Return the queue's name and its region, "" where that is left to AWS's variables. Raises QueueURLError."""
    named = _BY_NAME.fullmatch(url) or _BY_URL.fullmatch(url)
    if named is None:
        raise QueueURLError(f"{setting} is malformed", todo=_EXPECTED)
    return named["name"], named["region"] or ""


def _locate(url: str, setting: str) -> tuple[SQSClient, str]:
    """Return a client for the queue, and the URL by which AWS names it."""
    name, region = parse_url(url, setting)
    client = aws.connect(region)
    if url.startswith("https:"):
        return client, url
    try:
        return client, aws.insist(client.get_queue_url, QueueName=name)["QueueUrl"]
    except aws.ERRORS as error:
        raise aws.queue_error(error, name, setting) from None


class SQSQueue:
    """A queue. Implements QueueAdapter, SupportsPublish, SupportsCounts and SupportsDeadLetters."""

    def __init__(
        self,
        client: SQSClient,
        url: str,
        options: QueueOptions,
        *,
        lease_seconds: float = LEASE_SECONDS,
        poll_seconds: int = POLL_SECONDS,
    ) -> None:
        """`lease_seconds`: seconds that messages are received for, whatever the queue's own visibility timeout is."""
        self._client = client
        self._url = url
        self._name = url.rpartition("/")[2]
        self._options = options
        self._lease_seconds = lease_seconds
        self._settlement = Settlement(client, url)
        self._polling = LongPolling(client, url, lease_seconds=lease_seconds, poll_seconds=poll_seconds)
        self._dead_letter_url: str | None = None  # "" when the queue has none, None when it is not known
        self._dead_letter_region = ""
        self._max_receives = math.inf
        self._awaited = Awaited()

    @property
    def lease_seconds(self) -> float:
        """Seconds."""
        return self._lease_seconds

    def receive(self, max_messages: int, wait: float) -> Sequence[SQSDelivery]:
        """Return what the polls brought."""
        deliveries = self._polling.take(max_messages, wait)
        self._awaited.came(delivery.id for delivery in deliveries)
        return deliveries

    def ack(self, deliveries: Sequence[Delivery]) -> None:
        """Delete, insisting for as long as the lease may hold."""
        self._awaited.came(delivery.id for delivery in deliveries)
        self._settlement.delete(_ours(deliveries))

    def nack(self, deliveries: Sequence[Delivery], delay: float = 0.0, failure: Failure | None = None) -> None:
        """End the leases after `delay`, twelve hours from the receipt at the latest.

        Every return costs a receive, handled or not: SQS cannot take one back.
        """
        self._awaited.note(delivery.id for delivery in deliveries if not self._is_last(delivery))
        for delivery in deliveries:
            if failure is not None and self._is_last(delivery):
                about = {"reason": failure.reason, "stage": failure.stage, "error": failure.error}
                log.error("queue_gave_up", extra={"message_id": delivery.id, **about})
        self._settlement.end_leases(_ours(deliveries), max(delay, 0.0))

    def dead_letter(self, delivery: Delivery, failure: Failure) -> bool:
        """Send to the dead-letter queue, if so asked; else let the redrive policy get there, at once.

        Without a policy nothing ever gives up, so the message comes seldom; where that is not known, ever more seldom.
        """
        if self._options.direct_dead_letter and self._bury(delivery, failure):
            self.ack([delivery])
            return True
        delay = {"": SELDOM, None: min(2.0 ** min(delivery.attempt or 1, 16), SELDOM)}.get(self._dead_letter_url, 0.0)
        self.nack([delivery], delay, failure)
        return self._is_last(delivery)

    def extend(self, deliveries: Sequence[Delivery], seconds: float) -> None:
        """Extend these and what waits to be received, as far as the twelve hours go that SQS keeps a message for us."""
        began = time.monotonic()
        if not self._settlement.extend([*_ours(deliveries), *self._polling.waiting()], seconds):
            raise QueueError("SQS was not told of all leases, or some are nearly twelve hours old, its limit")
        self._polling.extended(began)

    def backlog(self) -> int | None:
        """Count what is in the queue, which SQS does approximately: that nothing is left it never tells for sure."""
        try:
            counted = self._count(self._url) or 0
        except aws.ERRORS:
            counted = 0
        return max(counted, len(self._awaited)) or None

    def counts(self) -> Counts:
        """Count both queues, the dead letters once `check` has looked for them. Raises QueueError."""
        try:
            dead = self._count(self._dead_letter_url) if self._dead_letter_url else None
            return Counts(self._count(self._url), dead)
        except aws.ERRORS as error:
            raise aws.queue_error(error, self._name) from None

    def check(self) -> Sequence[QueueWarning]:
        """Look at the queue. Raises QueueError when it cannot be used as asked.

        Whether messages may be received, deleted and extended is not tested: AWS tells only who does it, and a
        message received for a test has one receive less. Only of a queue that was polled it is known.
        """
        if self._polling.trouble:
            raise QueueError(f"QUEUE_URL: SQS does not hand out messages: {self._polling.trouble}")
        if self._options.direct_dead_letter and self._is_fifo:
            raise QueueError(
                f"{_DIRECT} is not for FIFO queues, like {self._name}", todo="leave it to the redrive policy"
            )
        if not self._read_policy():
            if self._options.direct_dead_letter:
                raise QueueError(f"{_DIRECT}: {self._name} cannot be read to learn its dead-letter queue", todo=_READ)
            return [QueueWarning(f"{self._name} cannot be read to learn its redrive policy", _READ)]
        if self._options.direct_dead_letter and not self._dead_letter_url:
            raise QueueError(f"{_DIRECT}: {self._name} has no dead-letter queue", todo=self._set_policy)
        unusable = self._dead_letter_warning()
        if self._options.direct_dead_letter and unusable:
            raise QueueError(f"{_DIRECT}: {unusable.reason}", todo=unusable.todo)
        return list(self._warnings(unusable))

    def stop(self) -> None:
        """Wait for the polls under way and return what was not received."""
        self._settlement.end_leases(self._polling.stop(), 0.0)

    def close(self) -> None:
        """Stop, and close the connections."""
        self.stop()
        self._settlement.close()
        self._client.close()

    def publish(self, bodies: Iterable[bytes]) -> int:
        """Send to the queue, in order. A FIFO queue needs groups, which lines of a file do not have."""
        if self._is_fifo:
            raise QueueError(f"QUEUE_URL: {self._name} is a FIFO queue, which `publish` does not fill")
        return sqs_sending.publish(self._client, self._url, bodies)

    def dead_letters(self) -> LeasedLetters:
        """Open the dead-letter queue: the one that is set, else the redrive policy's."""
        if given := self._options.dead_letter_url:
            client, url = _locate(given, _DEAD_LETTERS)
            if url == self._url:
                raise QueueURLError(f"{_DEAD_LETTERS} is QUEUE_URL", todo="set it to the queue of the dead letters")
            return LeasedLetters(SQSLetters(client, url, None))
        if not self._read_policy():
            unknown = f"{self._name} cannot be read to learn its dead-letter queue"
            raise QueueError(f"QUEUE_URL: {unknown}", todo=f"{_READ}, or set {_DEAD_LETTERS}")
        if not self._dead_letter_url:
            raise QueueError(f"QUEUE_URL: {self._name} has no dead-letter queue", todo=self._set_policy)
        client = aws.connect(self._dead_letter_region)
        receives = None if math.isinf(self._max_receives) else int(self._max_receives)
        return LeasedLetters(SQSLetters(client, self._dead_letter_url, receives))

    @property
    def _is_fifo(self) -> bool:
        return self._name.endswith(".fifo")

    @property
    def _set_policy(self) -> str:
        arn = f"arn:aws:sqs:{self._client.meta.region_name}:ACCOUNT:{self._name}-dead"
        policy = json.dumps({"deadLetterTargetArn": arn, "maxReceiveCount": 10})
        attributes = json.dumps({"RedrivePolicy": policy})
        return f"aws sqs set-queue-attributes --queue-url {self._url} --attributes '{attributes}'"

    def _read_policy(self) -> bool:
        """Read the redrive policy and note it; return False when that is not permitted."""
        try:
            answer = aws.insist(
                self._client.get_queue_attributes,
                QueueUrl=self._url,
                AttributeNames=["RedrivePolicy", "QueueArn"],  # every queue has an ARN: no attributes are no answer
            )
            policy = json.loads(answer["Attributes"].get("RedrivePolicy") or "{}")
            self._max_receives = int(policy.get("maxReceiveCount", 0)) or math.inf
            self._note_dead_letters(policy.get("deadLetterTargetArn"))
        except aws.ERRORS as error:
            if aws.is_denied(error):
                return False
            raise aws.queue_error(error, self._name) from None
        return True

    def _note_dead_letters(self, arn: str | None) -> None:
        """Note the URL of the queue that the redrive policy names: of another account or region, if it says so."""
        if not arn:
            self._dead_letter_url = ""
            return
        ours = self._client.meta.region_name
        *_, self._dead_letter_region, account, name = arn.split(":")
        host = self._url.rsplit("/", 2)[0].replace(ours, self._dead_letter_region)
        self._dead_letter_url = f"{host}/{account}/{name}"

    def _dead_letter_warning(self) -> QueueWarning | None:
        """Return why the dead-letter queue cannot be used. None if it can, or if there is none."""
        try:
            if self._dead_letter_url:
                aws.insist(
                    self._client.get_queue_attributes, QueueUrl=self._dead_letter_url, AttributeNames=["QueueArn"]
                )
        except aws.ERRORS as error:
            reason, todo = aws.explain(error, (self._dead_letter_url or "").rpartition("/")[2])
            return QueueWarning(f"the dead-letter queue: {reason}", todo, is_missing_policy=aws.is_missing(error))
        return None

    def _warnings(self, unusable: QueueWarning | None) -> Iterator[QueueWarning]:
        """Name what the queue lacks, and the command that sets it."""
        if not self._dead_letter_url:
            why = f"{self._name} has no redrive policy, so what can never succeed comes for ever"
            yield QueueWarning(why, self._set_policy, is_missing_policy=True)
        if unusable:
            yield unusable
        if self._max_receives < FEW_RECEIVES:
            yield QueueWarning(
                f"{self._name} gives messages up after {self._max_receives} receives, and every restart of a worker "
                "costs some of them one",
                f"set maxReceiveCount to 10: {self._set_policy}",
            )

    def _is_last(self, delivery: Delivery) -> bool:
        """Tell whether the queue gives this message up when it is returned now."""
        return delivery.attempt is not None and delivery.attempt >= self._max_receives

    def _count(self, url: str) -> int | None:
        """Return the messages in a queue, ready, delayed and leased; None when that is not permitted."""
        try:
            answer = self._client.get_queue_attributes(
                QueueUrl=url,
                AttributeNames=[
                    "ApproximateNumberOfMessages",
                    "ApproximateNumberOfMessagesNotVisible",
                    "ApproximateNumberOfMessagesDelayed",
                ],
            )
            return sum(map(int, answer["Attributes"].values()))
        except aws.ERRORS as error:
            if aws.is_denied(error):
                return None
            raise

    def _bury(self, delivery: Delivery, failure: Failure) -> bool:
        """Send the message to the dead-letter queue, with its reason; tell whether it is there."""
        if not self._dead_letter_url:
            return False
        ours = {**asdict(failure), "queue": self._name, "message_id": delivery.id, "attempt": str(delivery.attempt)}
        try:
            sqs_sending.bury(self._client, self._dead_letter_url, delivery.body, ours, delivery.attributes)
        except aws.ERRORS as error:
            log.warning("not_buried", extra={"message_id": delivery.id, "reason": aws.reason(error)})
            return False
        return True


def _ours(deliveries: Iterable[Delivery]) -> list[SQSDelivery]:
    return [delivery for delivery in deliveries if isinstance(delivery, SQSDelivery)]
