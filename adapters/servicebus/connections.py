"""What goes wrong with the SDK's receivers and senders, and how they are opened and closed in bounded time."""

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

OPEN_SECONDS = 10.0
MOST_OPENING = 200  # connections that wait for an answer, each with a thread and a socket
FAILURES = (ServiceBusError, ClientAuthenticationError, OSError, ValueError, AttributeError)  # last two: it was closed
_REFUSALS = (
    ClientAuthenticationError,
    MessagingEntityDisabledError,
    MessagingEntityNotFoundError,
    ServiceBusAuthenticationError,
    ServiceBusAuthorizationError,
)
_opening = Semaphore(MOST_OPENING)


def is_refusal(error: BaseException) -> bool:
    """Tell whether the service said no, or whoever gives out credentials, whose error the SDK wraps."""
    return isinstance(error, _REFUSALS) or isinstance(getattr(error, "inner_exception", None), _REFUSALS)


def in_short(error: BaseException) -> str:
    """Return the first line of an error's text: the others are general advice."""
    return str(error).strip().partition("\n")[0][:300]


def opened(link: Link) -> Link:
    """Open a receiver or a sender and return it. Raises what is in FAILURES.

    On a thread of its own: the SDK waits for ever for a service that takes a connection and then says nothing.
    What is opened after all, when nobody waits for it any more, is closed.
    """
    if not _opening.acquire(blocking=False):
        raise ConnectionError(f"{MOST_OPENING} connections still wait for an answer")
    future: Future[None] = Future()
    Thread(target=_open, args=(link, future), daemon=True, name="servicebus-opening").start()
    try:
        future.result(OPEN_SECONDS)
    except TimeoutError:
        if future.cancel():
            raise TimeoutError(f"no answer within {OPEN_SECONDS:.0f} s") from None
        future.result()  # it was just then
    return link


def close_soon(link: ServiceBusReceiver | ServiceBusSender) -> None:
    """Close a receiver or a sender without waiting for it, which takes the SDK up to seconds."""
    Thread(target=close, args=(link,), daemon=True, name="servicebus-closing").start()


def close(link: ServiceBusReceiver | ServiceBusSender) -> None:
    """Close a receiver or a sender, whatever state it is in: not all that the SDK raises then is in FAILURES."""
    with suppress(Exception):
        link.close()


def _open(link: ServiceBusReceiver | ServiceBusSender, future: Future[None]) -> None:
    try:
        link.__enter__()
        future.set_result(None)
    except BaseException as error:  # noqa: BLE001 - it is raised where it was waited for, if it still is
        close(link)
        with suppress(InvalidStateError):
            future.set_exception(error)
    finally:
        _opening.release()
