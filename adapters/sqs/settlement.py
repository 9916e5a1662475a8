"""Settles and extends messages of SQS, in concurrent calls of ten entries, and reads the result of each entry.

Messages that cannot be settled are logged; SQS redelivers them.
"""

from __future__ import annotations

import logging
import math
import time
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from threading import Event
from typing import TYPE_CHECKING, Any

from tenacity import (
    Retrying,
    retry_if_result,
    sleep_using_event,
    stop_after_delay,
    stop_when_event_set,
    wait_random_exponential,
)

from adapters.sqs import client as aws

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mypy_boto3_sqs import SQSClient

    from adapters.sqs.long_polling import SQSDelivery

    Entry = dict[str, Any]
    Call = Callable[..., Any]

log = logging.getLogger("klaviyo_worker.sqs")

LEASE_SECONDS = 60.0  # messages of a crashed worker are redelivered after this time
ACK_TIMEOUT, NACK_TIMEOUT = LEASE_SECONDS, 3.0  # seconds of retries; after a lost nack, the lease must end first
MAX_HOLD = 12 * 3600 - 60  # seconds that a message can stay leased after its receipt: SQS's limit minus a minute
MAX_ENTRIES = 10  # in a call, SQS's limit
THREADS = 16  # concurrent calls
_LOST = ("ReceiptHandleIsInvalid", "MessageNotInflight", "InvalidParameterValue")  # suffixes of error codes


@dataclass
class _PendingSettlement:
    """Entries that are not settled yet, and the number of those that cannot be settled."""

    entries: list[Entry]
    lost: int = 0  # whose lease has ended
    failed: int = 0  # for another reason
    reason: str = ""


@dataclass(frozen=True, slots=True)
class _EntryResult:
    """Why an entry failed. At most one of `is_lost` (its lease has ended) and `is_retryable` is True."""

    entry: Entry
    reason: str
    is_lost: bool = False
    is_retryable: bool = False


class Settlement:
    """Settles and extends the messages of one queue. Safe for many threads; ignores lost leases."""

    def __init__(self, client: SQSClient, queue_url: str) -> None:
        self._client = client
        self._queue_url = queue_url
        self._pool = ThreadPoolExecutor(THREADS, "sqs-settlement")
        self._closing = Event()
        self._settled: set[str] = set()  # receipts of messages settled since the last extension started

    def ack(self, deliveries: Sequence[SQSDelivery]) -> None:
        """Delete the messages. Retry for as long as the leases can last."""
        self._settled.update(delivery.receipt for delivery in deliveries)
        self._settle("ack", self._client.delete_message_batch, [_entry(d) for d in deliveries], ACK_TIMEOUT)

    def nack(self, deliveries: Sequence[SQSDelivery], seconds: float) -> None:
        """Make the leases end in `seconds`, or as late as SQS allows."""
        self._settled.update(delivery.receipt for delivery in deliveries)
        entries = [_entry(d) | {"VisibilityTimeout": _visibility_timeout(d, seconds)} for d in deliveries]
        self._settle("nack", self._client.change_message_visibility_batch, entries, NACK_TIMEOUT)

    def extend(self, deliveries: Sequence[SQSDelivery], seconds: float) -> bool:
        """Make the leases end `seconds` from now, or as late as SQS allows. Return whether all end in `seconds`.

        Not retried: the next extension comes long before the leases end, and a retry could undo a nack.
        """
        self._settled = set()
        entries = [
            _entry(d) | {"VisibilityTimeout": limit} for d in deliveries if (limit := _visibility_timeout(d, seconds))
        ]
        succeeded = self._settle("extend", self._extend_unsettled, entries, 0.0)
        return succeeded and all(_visibility_timeout(d, seconds) >= seconds for d in deliveries)

    def close(self) -> None:
        """Stop all retries."""
        self._closing.set()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _extend_unsettled(self, **request: Any) -> dict[str, Any]:
        """Make the call for entries that were not settled in the meantime; report the others as successful."""
        entries: list[Entry] = request.pop("Entries")
        held: Any = [entry for entry in entries if entry["ReceiptHandle"] not in self._settled]
        response: Any = self._client.change_message_visibility_batch(**request, Entries=held) if held else {}
        settled = [{"Id": entry["Id"]} for entry in entries if entry["ReceiptHandle"] in self._settled]
        return {**response, "Successful": [*response.get("Successful", ()), *settled]}

    def _settle(self, action: str, call: Call, entries: Sequence[Entry], timeout: float) -> bool:
        """Return whether SQS accepted all entries, except those whose lease was lost."""
        pending = _PendingSettlement([entry | {"Id": str(number)} for number, entry in enumerate(entries)])
        retrying = Retrying(
            stop=stop_after_delay(timeout) | stop_when_event_set(self._closing),
            sleep=sleep_using_event(self._closing),
            wait=wait_random_exponential(multiplier=0.1, max=5),
            retry=retry_if_result(bool),
            retry_error_callback=lambda state: state.outcome and state.outcome.result(),
        )
        retrying(self._try_once, call, pending)
        if pending.lost:
            log.warning("lease_lost", extra={"messages": pending.lost, "reason": "the lease had ended"})
        if failed := pending.failed + len(pending.entries):
            log.warning("settlement_failed", extra={"action": action, "messages": failed, "reason": pending.reason})
        return not failed

    def _try_once(self, call: Call, pending: _PendingSettlement) -> list[Entry]:
        """Make the calls. Reduce the entries of `pending` to those that must be retried, and return them."""
        entries = pending.entries
        chunks = [entries[start : start + MAX_ENTRIES] for start in range(0, len(entries), MAX_ENTRIES)]
        call_chunk = partial(self._call_chunk, call, Event())
        try:
            results = list(map(call_chunk, chunks) if len(chunks) == 1 else self._pool.map(call_chunk, chunks))
        except (RuntimeError, CancelledError):
            pending.reason = "the queue was closed"
            return pending.entries
        failures = [failure for result in results for failure in result]
        permanent = [failure for failure in failures if not (failure.is_lost or failure.is_retryable)]
        pending.entries = [failure.entry for failure in failures if failure.is_retryable]
        pending.lost += sum(failure.is_lost for failure in failures)
        pending.failed += len(permanent)
        reasons = (failure.reason for failure in (*permanent, *failures) if not failure.is_lost)
        pending.reason = next(reasons, pending.reason)
        return pending.entries

    def _call_chunk(self, call: Call, unreachable: Event, entries: list[Entry]) -> list[_EntryResult]:
        """Make one call, unless SQS was unreachable for another call. Return the entries that failed."""
        if unreachable.is_set():
            return [_EntryResult(entry, "SQS is unreachable", is_retryable=True) for entry in entries]
        try:
            response = call(QueueUrl=self._queue_url, Entries=entries)
            successful = {each["Id"] for each in response.get("Successful", ())}
            errors = {each["Id"]: each for each in response.get("Failed", ())}
        except aws.ERRORS as error:
            is_retryable = not aws.is_refusal(error)
            if is_retryable:
                unreachable.set()
            return [_EntryResult(entry, aws.first_line(error), is_retryable=is_retryable) for entry in entries]
        return [_failure_of(entry, errors.get(entry["Id"], {})) for entry in entries if entry["Id"] not in successful]


def _failure_of(entry: Entry, error: dict[str, Any]) -> _EntryResult:
    """Return the result of an entry that failed; `error` is empty if the response does not mention the entry."""
    code = error.get("Code", "NoResponse")
    reason = f"{code}: {error.get('Message', '')}"
    is_lost = code.endswith(_LOST)
    is_retryable = aws.is_throttling(code) or not error.get("SenderFault", False)
    return _EntryResult(entry, reason, is_lost=is_lost, is_retryable=is_retryable and not is_lost)


def _entry(delivery: SQSDelivery) -> Entry:
    return {"ReceiptHandle": delivery.receipt}


def _visibility_timeout(delivery: SQSDelivery, seconds: float) -> int:
    """Return `seconds`, limited to the rest of the twelve hours for which SQS leases a message."""
    remaining = MAX_HOLD - (time.monotonic() - delivery.received_at)
    return max(math.ceil(min(seconds, remaining)), 0)
