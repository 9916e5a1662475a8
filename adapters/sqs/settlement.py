"""Tells SQS what became of messages: in calls of ten, side by side, each entry's answer read.

What does not get through is logged: the messages come again.
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

LEASE_SECONDS = 60.0  # seconds; a crash costs this much before a message comes again
ACK_PATIENCE, NACK_PATIENCE = LEASE_SECONDS, 3.0  # seconds to reach SQS; a nack that is lost costs a lease at most
LONGEST_HOLD = 12 * 3600 - 60  # seconds from receiving a message to the end of its lease: SQS's limit less a minute
MAX_ENTRIES = 10  # in a call, SQS's limit
THREADS = 16  # calls under way at once
_LOST = ("ReceiptHandleIsInvalid", "MessageNotInflight", "InvalidParameterValue")  # these end the codes


@dataclass
class _Telling:
    """What is still to be told of some messages, and what became of the others that SQS did not take."""

    left: list[Entry]
    lost: int = 0
    refused: int = 0
    reason: str = ""


@dataclass(frozen=True, slots=True)
class _Fate:
    """Why an entry did not go through: its lease is `lost`, or it can be told `again`, or neither."""

    entry: Entry
    reason: str
    lost: bool = False
    again: bool = False


class Settlement:
    """Settles and extends the messages of one queue. Safe for many threads; never raises for a lost lease."""

    def __init__(self, client: SQSClient, queue_url: str) -> None:
        self._client = client
        self._queue_url = queue_url
        self._pool = ThreadPoolExecutor(THREADS, "sqs-settlement")
        self._closing = Event()
        self._settled: set[str] = set()  # receipts, since the last extension began

    def delete(self, deliveries: Sequence[SQSDelivery]) -> None:
        """Delete, insisting for as long as the leases may hold."""
        self._settled.update(delivery.receipt for delivery in deliveries)
        self._tell("ack", self._client.delete_message_batch, [_entry(d) for d in deliveries], ACK_PATIENCE)

    def end_leases(self, deliveries: Sequence[SQSDelivery], seconds: float) -> None:
        """Have the messages come again in `seconds`, or as late as SQS can."""
        self._settled.update(delivery.receipt for delivery in deliveries)
        entries = [_entry(d) | {"VisibilityTimeout": _at_most(d, seconds)} for d in deliveries]
        self._tell("nack", self._client.change_message_visibility_batch, entries, NACK_PATIENCE)

    def extend(self, deliveries: Sequence[SQSDelivery], seconds: float) -> bool:
        """Keep the leases for `seconds` from now, as far as SQS can; return whether it was told of all, and can.

        Tried once: it is done anew long before the leases end, and one that insists could undo a nack made meanwhile.
        """
        self._settled = set()
        entries = [_entry(d) | {"VisibilityTimeout": left} for d in deliveries if (left := _at_most(d, seconds))]
        was_told = self._tell("extend", self._extend_held, entries, 0.0)
        return was_told and all(_at_most(d, seconds) >= seconds for d in deliveries)

    def close(self) -> None:
        """End all insisting."""
        self._closing.set()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _extend_held(self, **asked: Any) -> dict[str, Any]:
        """Make a call for the entries that were not settled meanwhile; the others are done, whatever SQS says."""
        entries: list[Entry] = asked.pop("Entries")
        held: Any = [entry for entry in entries if entry["ReceiptHandle"] not in self._settled]
        answer: Any = self._client.change_message_visibility_batch(**asked, Entries=held) if held else {}
        settled = [{"Id": entry["Id"]} for entry in entries if entry["ReceiptHandle"] in self._settled]
        return {**answer, "Successful": [*answer.get("Successful", ()), *settled]}

    def _tell(self, action: str, call: Call, entries: Sequence[Entry], patience: float) -> bool:
        """Return whether SQS was told of all."""
        telling = _Telling([entry | {"Id": str(number)} for number, entry in enumerate(entries)])
        retrying = Retrying(
            stop=stop_after_delay(patience) | stop_when_event_set(self._closing),
            sleep=sleep_using_event(self._closing),
            wait=wait_random_exponential(multiplier=0.1, max=5),
            retry=retry_if_result(bool),
            retry_error_callback=lambda state: state.outcome and state.outcome.result(),
        )
        retrying(self._told, call, telling)
        if telling.lost:
            log.warning("lease_lost", extra={"messages": telling.lost, "reason": "the lease ended before"})
        if failed := telling.refused + len(telling.left):
            log.warning("settling_failed", extra={"action": action, "messages": failed, "reason": telling.reason})
        return not failed

    def _told(self, call: Call, telling: _Telling) -> list[Entry]:
        """Make the calls; return the entries to tell again, to which `telling` is narrowed."""
        chunks = [telling.left[start : start + MAX_ENTRIES] for start in range(0, len(telling.left), MAX_ENTRIES)]
        tell = partial(self._tell_some, call, Event())
        try:
            answers = list(map(tell, chunks) if len(chunks) == 1 else self._pool.map(tell, chunks))
        except (RuntimeError, CancelledError):
            telling.reason = "the queue was closed"
            return telling.left
        fates = [fate for answer in answers for fate in answer]
        refused = [fate for fate in fates if not (fate.lost or fate.again)]
        telling.left = [fate.entry for fate in fates if fate.again]
        telling.lost += sum(fate.lost for fate in fates)
        telling.refused += len(refused)
        telling.reason = next((fate.reason for fate in (*refused, *fates) if not fate.lost), telling.reason)
        return telling.left

    def _tell_some(self, call: Call, unreachable: Event, entries: list[Entry]) -> list[_Fate]:
        """Make one call, unless another has just found SQS out of reach; return what did not go through."""
        if unreachable.is_set():
            return [_Fate(entry, "SQS is out of reach", again=True) for entry in entries]
        try:
            answer = call(QueueUrl=self._queue_url, Entries=entries)
            done = {each["Id"] for each in answer.get("Successful", ())}
            errors = {each["Id"]: each for each in answer.get("Failed", ())}
        except aws.ERRORS as error:
            again = not aws.is_refusal(error)
            if again:
                unreachable.set()
            return [_Fate(entry, aws.reason(error), again=again) for entry in entries]
        return [_fate(entry, errors.get(entry["Id"], {})) for entry in entries if entry["Id"] not in done]


def _fate(entry: Entry, error: dict[str, Any]) -> _Fate:
    """Return the fate of an entry that is not said to be done; `error` is empty when nothing is said of it."""
    code = error.get("Code", "NoAnswer")
    reason = f"{code}: {error.get('Message', '')}"
    lost = code.endswith(_LOST)
    again = aws.is_throttling(code) or not error.get("SenderFault", False)
    return _Fate(entry, reason, lost=lost, again=again and not lost)


def _entry(delivery: SQSDelivery) -> Entry:
    return {"ReceiptHandle": delivery.receipt}


def _at_most(delivery: SQSDelivery, seconds: float) -> int:
    """Return `seconds`, or what is left of the twelve hours that SQS keeps a message for whoever received it."""
    left = LONGEST_HOLD - (time.monotonic() - delivery.received_at)
    return max(math.ceil(min(seconds, left)), 0)
