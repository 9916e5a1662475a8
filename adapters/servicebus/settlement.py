"""Settles and renews messages by lock token, over connections that receive no messages.

A receiver of the SDK must be used by one thread only, and each message costs a round trip. Several receivers therefore
settle messages concurrently. See docs/decisions/0015-service-bus-receivers.md.
"""

from __future__ import annotations

import logging
import time
from concurrent.futures import Future
from concurrent.futures import wait as wait_for
from functools import partial
from queue import SimpleQueue
from threading import Lock, Thread
from typing import TYPE_CHECKING

from azure.servicebus import ServiceBusReceiver
from azure.servicebus.exceptions import (
    MessageAlreadySettled,
    MessageLockLostError,
    MessageNotFoundError,
    ServiceBusServerBusyError,
)
from tenacity import Retrying, retry_if_result, stop_after_delay, wait_random_exponential

from adapters.servicebus.connections import close, close_in_background, first_line
from adapters.servicebus.lock_duration import ignore_local_expiry

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from azure.servicebus import ServiceBusReceivedMessage

    Call = Callable[[ServiceBusReceiver], object]
    MessageCall = Callable[[ServiceBusReceiver, ServiceBusReceivedMessage], object]

log = logging.getLogger("klaviyo_worker.servicebus")

THREADS = 16  # maximum; enough for 1,000 messages a second if a round trip takes 10 ms
MAX_RENEWALS = 10 * THREADS  # queued at a time; limits how long a settlement waits behind renewals
NACK_TIMEOUT = 3.0  # seconds of retries; after a lost nack, the lock must end first
RUN_TIMEOUT, RUN_TIMEOUT_EACH = 10.0, 0.01  # seconds for concurrent calls: for all of them, and for each
CLOSE_TIMEOUT = 0.5  # seconds for the SDK to close its links; afterwards it only waits for its own thread
_LOST = (MessageLockLostError, MessageNotFoundError)
_FINAL = (*_LOST, MessageAlreadySettled)


class Settlement:
    """Settles and renews the messages of one queue. Safe for many threads; ignores lost locks."""

    def __init__(self, connect: Callable[[], ServiceBusReceiver]) -> None:
        self._pool = ReceiverPool(connect)
        self._settling: set[int] = set()  # id() of messages that are being settled

    def ack(self, messages: Sequence[ServiceBusReceivedMessage], timeout: float) -> None:
        """Complete messages. Retry for `timeout` seconds, which should be as long as the locks can last."""
        self._settle("ack", ServiceBusReceiver.complete_message, messages, timeout)

    def nack(self, messages: Sequence[ServiceBusReceivedMessage]) -> None:
        """Abandon messages: Service Bus redelivers them immediately."""
        self._settle("nack", ServiceBusReceiver.abandon_message, messages, NACK_TIMEOUT)

    def dead_letter(self, message: ServiceBusReceivedMessage, reason: str, description: str) -> bool:
        """Dead-letter a message; return whether that succeeded."""
        call = partial(ServiceBusReceiver.dead_letter_message, reason=reason, error_description=description)
        self._settle("dead_letter", call, [message], NACK_TIMEOUT)
        return is_settled(message)

    def extend(self, messages: Sequence[ServiceBusReceivedMessage]) -> bool:
        """Renew the locks; return whether all calls succeeded.

        Not retried: the next renewal comes long before the locks end. Stops if all calls of a group fail.
        """
        failures = 0
        for start in range(0, len(messages), MAX_RENEWALS):
            group = messages[start : start + MAX_RENEWALS]
            failed = self._call_for_each("extend", ServiceBusReceiver.renew_message_lock, group, 0.0)
            if failed == len(group):
                return False
            failures += failed
        return failures == 0

    def close(self) -> None:
        """Close the connections."""
        self._pool.close(CLOSE_TIMEOUT)

    def _settle(
        self, action: str, call: MessageCall, messages: Sequence[ServiceBusReceivedMessage], timeout: float
    ) -> None:
        ids = {id(message) for message in messages}
        self._settling |= ids
        self._call_for_each(action, partial(_call_ignoring_expiry, call), messages, timeout)
        self._settling -= ids

    def _call_for_each(
        self, action: str, call: MessageCall, messages: Sequence[ServiceBusReceivedMessage], timeout: float
    ) -> int:
        """Return the number of messages for which the call failed."""
        pending = list(messages)
        retrying = Retrying(
            stop=stop_after_delay(timeout),
            wait=wait_random_exponential(multiplier=0.1, max=5),
            retry=retry_if_result(bool),
            retry_error_callback=lambda state: state.outcome and state.outcome.result(),
        )
        reason = retrying(self._try_once, action, call, pending)
        if pending:
            log.warning("settlement_failed", extra={"action": action, "messages": len(pending), "reason": reason})
        return len(pending)

    def _try_once(self, action: str, call: MessageCall, pending: list[ServiceBusReceivedMessage]) -> str:
        """Make the call once for each message. Reduce `pending` to those to retry, and return an error text."""
        errors = self._pool.run([partial(_call_for, call, message) for message in pending])
        failed = [(message, error) for message, error in zip(pending, errors, strict=True) if error is not None]
        lost = [message for message, error in failed if isinstance(error, _LOST)]
        if action == "extend":  # a message that was settled in the meantime is not lost
            lost = [message for message in lost if id(message) not in self._settling and not is_settled(message)]
        if lost:
            fields = {"action": action, "messages": len(lost), "reason": "the lock had ended"}
            log.warning("lease_lost", extra=fields)
        retryable = [(message, error) for message, error in failed if not isinstance(error, _FINAL)]
        pending[:] = [message for message, _ in retryable]
        return first_line(retryable[0][1]) or "no reason was given" if retryable else ""


class ReceiverPool:
    """Threads with a receiver each, started on demand; a call runs on any free one."""

    def __init__(self, connect: Callable[[], ServiceBusReceiver]) -> None:
        self._connect = connect
        self._calls: SimpleQueue[tuple[Call, Future[None]] | None] = SimpleQueue()
        self._threads: list[Thread] = []
        self._lock = Lock()
        self._unfinished = 0
        self._is_closed = False

    def run(self, calls: Sequence[Call]) -> list[BaseException | None]:
        """Make the calls concurrently. Return for each call its error, or None."""
        timeout = RUN_TIMEOUT + len(calls) * RUN_TIMEOUT_EACH
        futures: list[Future[None]] = [Future() for _ in calls]
        with self._lock:
            if self._is_closed:
                return [ConnectionError("the connection was closed")] * len(calls)
            self._unfinished += len(calls)
            for _ in range(min(self._unfinished, THREADS) - len(self._threads)):
                thread = Thread(target=self._work, daemon=True, name="servicebus-settlement")
                self._threads.append(thread)
                thread.start()
        for call, future in zip(calls, futures, strict=True):
            self._calls.put((call, future))
        wait_for(futures, timeout)
        timed_out = TimeoutError(f"no response within {timeout:.0f} s")
        return [timed_out if future.cancel() or not future.done() else future.exception() for future in futures]

    def close(self, timeout: float) -> None:
        """Stop the threads, and wait up to `timeout` seconds for their connections to be closed. Idempotent."""
        with self._lock:
            self._is_closed = True
        for _ in self._threads:
            self._calls.put(None)
        deadline = time.monotonic() + timeout
        for thread in self._threads:
            thread.join(max(deadline - time.monotonic(), 0.0))

    def _work(self) -> None:
        receiver: ServiceBusReceiver | None = None
        while (next_call := self._calls.get()) is not None:
            call, future = next_call
            if future.set_running_or_notify_cancel():
                receiver, error = self._run_call(call, receiver)
                if error is None:
                    future.set_result(None)
                else:
                    future.set_exception(error)
            with self._lock:
                self._unfinished -= 1
        if receiver is not None:
            close(receiver)

    def _run_call(
        self, call: Call, receiver: ServiceBusReceiver | None
    ) -> tuple[ServiceBusReceiver | None, Exception | None]:
        """Make a call. If it fails on an open receiver, whose connection has possibly ended, retry it on a new one."""
        is_new = receiver is None
        try:
            receiver = receiver or self._connect()
            call(receiver)
        except (*_FINAL, ServiceBusServerBusyError) as error:
            return receiver, error
        except Exception as error:  # noqa: BLE001 - `run` waits for a result of each call
            if receiver is not None:
                close_in_background(receiver)
            return (None, error) if is_new else self._run_call(call, None)
        return receiver, None


def is_settled(message: ServiceBusReceivedMessage) -> bool:
    """Return whether a message was settled. A settled message has no lock token."""
    return message.lock_token is None


def _call_for(call: MessageCall, message: ServiceBusReceivedMessage, receiver: ServiceBusReceiver) -> None:
    call(receiver, message)


def _call_ignoring_expiry(call: MessageCall, receiver: ServiceBusReceiver, message: ServiceBusReceivedMessage) -> None:
    ignore_local_expiry(message)
    call(receiver, message)
