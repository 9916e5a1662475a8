"""Queues the worker can read. `open_queue` is the only way in; one file per queue."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, cast
from urllib.parse import urlsplit

from adapters.base import DeadLetter, DeadLetters, Delivery, Failure, Publisher, QueueAdapter, QueueError, QueueURLError

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = [
    "DeadLetter",
    "DeadLetters",
    "Delivery",
    "Failure",
    "Publisher",
    "QueueAdapter",
    "QueueError",
    "QueueURLError",
    "open_queue",
]

# Imported on use: a worker on one queue never pays for the client of another.
_SCHEMES = {"embedded": "adapters.embedded:open_url"}


def open_queue(url: str) -> QueueAdapter:
    """Open the queue that `url` names. Raises QueueURLError, or QueueError when it cannot be opened."""
    scheme = urlsplit(url).scheme
    if scheme not in _SCHEMES:
        known = ", ".join(f"{name}://" for name in sorted(_SCHEMES))
        raise QueueURLError(f"QUEUE_URL is malformed: expected one of {known}; found {scheme or 'no scheme'}")
    module, _, function = _SCHEMES[scheme].partition(":")
    opener = cast("Callable[[str], QueueAdapter]", getattr(import_module(module), function))
    return opener(url)
