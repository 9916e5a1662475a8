"""Opens and closes receivers and senders of the SDK in bounded time, and classifies their errors."""

from __future__ import annotations

from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from threading import Semaphore, Thread
from typing import TypeVar

from azure.core.exceptions import ClientAuthenticationError
from azure.servicebus import ServiceBusReceiver, ServiceBusSender
from azure.servicebus.exceptions import (
    MessagingEntityDisabledError,
    MessagingEntityNotFoundError,
    ServiceBusAuthenticationError,
    ServiceBusAuthorizationError,
    ServiceBusError,
)

Link = TypeVar("Link", ServiceBusReceiver, ServiceBusSender)

OPEN_TIMEOUT = 10.0  # seconds
MAX_OPENING = 200  # connections that wait for a response, each with a thread and a socket
# The SDK raises ValueError and AttributeError if the link was closed.
FAILURES = (ServiceBusError, ClientAuthenticationError, OSError, ValueError, AttributeError)
_REFUSALS = (
    ClientAuthenticationError,
    MessagingEntityDisabledError,
    MessagingEntityNotFoundError,
    ServiceBusAuthenticationError,
    ServiceBusAuthorizationError,
)
_opening = Semaphore(MAX_OPENING)


def is_refusal(error: BaseException) -> bool:
    """Return whether Service Bus or the credential provider, whose error the SDK wraps, refused access."""
    return isinstance(error, _REFUSALS) or isinstance(getattr(error, "inner_exception", None), _REFUSALS)


def first_line(error: BaseException) -> str:
    """Return the first line of the error text. The other lines are general advice."""
    return str(error).strip().partition("\n")[0][:300]


def open_with_timeout(link: Link) -> Link:
    """Open a receiver or a sender and return it. Raises one of FAILURES.

    Uses a thread, because the SDK waits indefinitely if the service accepts the connection and then sends nothing. A
    link that opens after the timeout is closed.
    """
    if not _opening.acquire(blocking=False):
        raise ConnectionError(f"{MAX_OPENING} connections still wait for a response")
    future: Future[None] = Future()
    Thread(target=_open, args=(link, future), daemon=True, name="servicebus-opening").start()
    try:
        future.result(OPEN_TIMEOUT)
    except TimeoutError:
        if future.cancel():
            raise TimeoutError(f"no response within {OPEN_TIMEOUT:.0f} s") from None
        future.result()  # it has just finished
    return link


def close_in_background(link: ServiceBusReceiver | ServiceBusSender) -> None:
    """Close a receiver or a sender without waiting; the SDK can take seconds."""
    Thread(target=close, args=(link,), daemon=True, name="servicebus-closing").start()


def close(link: ServiceBusReceiver | ServiceBusSender) -> None:
    """Close a receiver or a sender in any state, ignoring all errors of the SDK."""
    with suppress(Exception):
        link.close()


def _open(link: ServiceBusReceiver | ServiceBusSender, future: Future[None]) -> None:
    try:
        link.__enter__()
        future.set_result(None)
    except BaseException as error:  # noqa: BLE001 - raised by `future.result`, or the timeout was reported before
        close(link)
        with suppress(InvalidStateError):
            future.set_exception(error)
    finally:
        _opening.release()
