"""Queues the worker can read. `open_queue` is the only way in; one file per queue."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, cast
from urllib.parse import urlsplit

from adapters.base import (
    Countable,
    DeadLetter,
    DeadLetters,
    Delivery,
    Failure,
    Publisher,
    QueueAdapter,
    QueueError,
    QueueOptions,
    QueueRefusedError,
    QueueURLError,
)

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = [
    "Countable",
    "DeadLetter",
    "DeadLetters",
    "Delivery",
    "Failure",
    "Publisher",
    "QueueAdapter",
    "QueueError",
    "QueueOptions",
    "QueueRefusedError",
    "QueueURLError",
    "open_queue",
]

# Imported on use: a worker on one queue never pays for the client of another.
_SCHEMES = {
    "embedded": "adapters.embedded:open_url",
    "pubsub": "adapters.pubsub:open_url",
    "push": "adapters.push:open_url",
}
_DEFAULTS = QueueOptions()


def open_queue(url: str, options: QueueOptions = _DEFAULTS) -> QueueAdapter:
    """Open the queue that `url` names. Raises QueueURLError, or QueueError when it cannot be opened."""
    scheme = urlsplit(url).scheme
    if scheme not in _SCHEMES:
        known = ", ".join(f"{name}://" for name in sorted(_SCHEMES))
        raise QueueURLError(f"QUEUE_URL is malformed: expected one of {known}; found {scheme or 'no scheme'}")
    module, _, function = _SCHEMES[scheme].partition(":")
    try:
        opener = cast("Callable[[str, QueueOptions], QueueAdapter]", getattr(import_module(module), function))
    except ModuleNotFoundError as error:
        hint = f"pip install 'klaviyo-worker[{scheme}]'"
        raise QueueError(f"QUEUE_URL: {scheme}:// needs {error.name}, which is not installed: {hint}") from None
    return opener(url, options)
