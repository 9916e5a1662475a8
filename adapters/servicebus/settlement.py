"""Tells Service Bus what became of messages: by lock token, whichever receiver they came by.

A receiver of the SDK is for one thread, and each message costs a round trip. So several receivers that receive
nothing do this, each on a thread of its own. docs/decisions/0015-service-bus-receivers.md tells why.
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

from adapters.servicebus.connections import close, close_soon, in_short
from adapters.servicebus.lock_duration import let_service_judge

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from azure.servicebus import ServiceBusReceivedMessage

    Call = Callable[[ServiceBusReceiver], object]
    Tell = Callable[[ServiceBusReceiver, ServiceBusReceivedMessage], object]

log = logging.getLogger("klaviyo_worker.servicebus")

THREADS = 16  # at most: 1,000 messages a second where a round trip takes 10 ms
RENEWED_AT_ONCE = 10 * THREADS  # what is to be settled waits for no more of them
NACK_PATIENCE = 3.0  # seconds to reach Service Bus; a nack that is lost costs a lease at most
SECONDS, SECONDS_EACH = 10.0, 0.01  # for calls made side by side: for all of them, and for each
CLOSE_SECONDS = 0.5  # the SDK has this long to say goodbye; it then waits for a thread of its own, in vain
_LOST = (MessageLockLostError, MessageNotFoundError)
_IS_OVER = (*_LOST, MessageAlreadySettled)


class Settlement:
    """Settles and extends the messages of one queue. Safe for many threads; never raises for a lock that is lost."""

    def __init__(self, connect: Callable[[], ServiceBusReceiver]) -> None:
        self._threads = Threads(connect)
        self._settling: set[int] = set()  # ids of messages whose settlement is under way

    def complete(self, messages: Sequence[ServiceBusReceivedMessage], patience: float) -> None:
        """Remove messages, insisting for `patience` seconds: as long as the locks may hold."""
        self._settle("ack", ServiceBusReceiver.complete_message, messages, patience)

    def abandon(self, messages: Sequence[ServiceBusReceivedMessage]) -> None:
        """Have the messages come again, now."""
        self._settle("nack", ServiceBusReceiver.abandon_message, messages, NACK_PATIENCE)

    def bury(self, message: ServiceBusReceivedMessage, reason: str, description: str) -> bool:
        """Make a message a dead letter; return whether it is one."""
        bury = partial(ServiceBusReceiver.dead_letter_message, reason=reason, error_description=description)
        self._settle("dead_letter", bury, [message], NACK_PATIENCE)
        return is_settled(message)

    def extend(self, messages: Sequence[ServiceBusReceivedMessage]) -> bool:
        """Renew the locks; return whether Service Bus was told of all.

        Tried once, as it is done anew long before the locks end, and not for the rest when none of some came through.
        """
        untold = 0
        for start in range(0, len(messages), RENEWED_AT_ONCE):
            some = messages[start : start + RENEWED_AT_ONCE]
            failed = self._tell("extend", ServiceBusReceiver.renew_message_lock, some, 0.0)
            if failed == len(some):
                return False
            untold += failed
        return untold == 0

    def close(self) -> None:
        """Let go of the connections."""
        self._threads.close(CLOSE_SECONDS)

    def _settle(self, action: str, tell: Tell, messages: Sequence[ServiceBusReceivedMessage], patience: float) -> None:
        ids = {id(message) for message in messages}
        self._settling |= ids
        self._tell(action, partial(_settled, tell), messages, patience)
        self._settling -= ids

    def _tell(self, action: str, tell: Tell, messages: Sequence[ServiceBusReceivedMessage], patience: float) -> int:
        """Return of how many Service Bus was not told."""
        left = list(messages)
        retrying = Retrying(
            stop=stop_after_delay(patience),
            wait=wait_random_exponential(multiplier=0.1, max=5),
            retry=retry_if_result(bool),
            retry_error_callback=lambda state: state.outcome and state.outcome.result(),
        )
        reason = retrying(self._attempt, action, tell, left)
        if left:
            log.warning("settling_failed", extra={"action": action, "messages": len(left), "reason": reason})
        return len(left)

    def _attempt(self, action: str, tell: Tell, messages: list[ServiceBusReceivedMessage]) -> str:
        """Tell of each once. Narrows `messages` to those to tell again, and returns why."""
        errors = self._threads.run([partial(_told, tell, message) for message in messages])
        failed = [(message, error) for message, error in zip(messages, errors, strict=True) if error is not None]
        lost = [message for message, error in failed if isinstance(error, _LOST)]
        if action == "extend":  # what was settled meanwhile, or is just now, is not lost
            lost = [message for message in lost if id(message) not in self._settling and not is_settled(message)]
        if lost:
            about = {"action": action, "messages": len(lost), "reason": "the lock ended before"}
            log.warning("lease_lost", extra=about)
        again = [(message, error) for message, error in failed if not isinstance(error, _IS_OVER)]
        messages[:] = [message for message, _ in again]
        return in_short(again[0][1]) or "no reason was given" if again else ""


class Threads:
    """Threads with a receiver each, started as they are needed; a call goes to whichever is free."""

    def __init__(self, connect: Callable[[], ServiceBusReceiver]) -> None:
        self._connect = connect
        self._calls: SimpleQueue[tuple[Call, Future[None]] | None] = SimpleQueue()
        self._threads: list[Thread] = []
        self._lock = Lock()
        self._unfinished = 0
        self._is_closed = False

    def run(self, calls: Sequence[Call]) -> list[BaseException | None]:
        """Make the calls, side by side; return the error of each, if any."""
        seconds = SECONDS + len(calls) * SECONDS_EACH
        futures: list[Future[None]] = [Future() for _ in calls]
        with self._lock:
            if self._is_closed:
                return [ConnectionError("the connection was closed")] * len(calls)
            self._unfinished += len(calls)
            for _ in range(min(self._unfinished, THREADS) - len(self._threads)):
                thread = Thread(target=self._work, daemon=True, name="servicebus-settling")
                self._threads.append(thread)
                thread.start()
        for call, future in zip(calls, futures, strict=True):
            self._calls.put((call, future))
        wait_for(futures, seconds)
        unanswered = TimeoutError(f"no answer within {seconds:.0f} s")
        return [unanswered if future.cancel() or not future.done() else future.exception() for future in futures]

    def close(self, seconds: float) -> None:
        """End the threads, and wait so long for their connections to be closed. Idempotent."""
        with self._lock:
            self._is_closed = True
        for _ in self._threads:
            self._calls.put(None)
        deadline = time.monotonic() + seconds
        for thread in self._threads:
            thread.join(max(deadline - time.monotonic(), 0.0))

    def _work(self) -> None:
        receiver: ServiceBusReceiver | None = None
        while (next_call := self._calls.get()) is not None:
            call, future = next_call
            if future.set_running_or_notify_cancel():
                receiver, error = self._make(call, receiver)
                if error is None:
                    future.set_result(None)
                else:
                    future.set_exception(error)
            with self._lock:
                self._unfinished -= 1
        if receiver is not None:
            close(receiver)

    def _make(
        self, call: Call, receiver: ServiceBusReceiver | None
    ) -> tuple[ServiceBusReceiver | None, Exception | None]:
        """Make a call; anew when it fails on a receiver that was open: its connection may have ended long ago."""
        is_fresh = receiver is None
        try:
            receiver = receiver or self._connect()
            call(receiver)
        except (*_IS_OVER, ServiceBusServerBusyError) as error:
            return receiver, error
        except Exception as error:  # noqa: BLE001 - who waits for the answer must have one
            if receiver is not None:
                close_soon(receiver)
            return (None, error) if is_fresh else self._make(call, None)
        return receiver, None


def is_settled(message: ServiceBusReceivedMessage) -> bool:
    """Tell whether a message was settled: then it has no lock any more."""
    return message.lock_token is None


def _told(tell: Tell, message: ServiceBusReceivedMessage, receiver: ServiceBusReceiver) -> None:
    tell(receiver, message)


def _settled(tell: Tell, receiver: ServiceBusReceiver, message: ServiceBusReceivedMessage) -> None:
    let_service_judge(message)
    tell(receiver, message)
