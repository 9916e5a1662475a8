"""The queue adapters. `open_queue` opens a queue by its URL; base.py is the contract that adapters implement."""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, cast
from urllib.parse import urlsplit

from adapters.base import (
    Counts,
    DeadLetter,
    DeadLetterQueue,
    Delivery,
    Failure,
    InertQueue,
    QueueAdapter,
    QueueError,
    QueueOptions,
    QueueRefusedError,
    QueueURLError,
    QueueWarning,
    SupportsCounts,
    SupportsDeadLetters,
    SupportsDestination,
    SupportsPublish,
)

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = [
    "ENTRY_POINTS",
    "Counts",
    "DeadLetter",
    "DeadLetterQueue",
    "Delivery",
    "Failure",
    "InertQueue",
    "QueueAdapter",
    "QueueError",
    "QueueOptions",
    "QueueRefusedError",
    "QueueURLError",
    "QueueWarning",
    "SupportsCounts",
    "SupportsDeadLetters",
    "SupportsDestination",
    "SupportsPublish",
    "open_queue",
    "scheme_of",
]

ENTRY_POINTS = "klaviyo_worker.adapters"  # group in which other packages register: scheme = module:open_url
_BUILT_IN = {  # imported on demand: a worker does not load the clients of other queues
    "embedded": "adapters.embedded.queue:open_url",
    "pubsub": "adapters.pubsub.queue:open_url",
    "push": "adapters.push.queue:open_url",
    "servicebus": "adapters.servicebus.queue:open_url",
    "sqs": "adapters.sqs.queue:open_url",
}
_ALIASES = {"https": "sqs"}  # AWS names its queues by https URLs
_DEFAULTS = QueueOptions()


def open_queue(url: str, options: QueueOptions = _DEFAULTS) -> QueueAdapter:
    """Open the queue that `url` names. Raises QueueURLError, or QueueError if it cannot be opened."""
    return _opener(scheme_of(url))(url, options)


def scheme_of(url: str) -> str:
    """Return the scheme that names the adapter; "" if there is none. Raises QueueURLError."""
    try:
        scheme = urlsplit(url).scheme
    except ValueError:  # its text can quote the URL, which can hold a secret
        raise QueueURLError("QUEUE_URL is malformed", todo="expected a URL with a valid host") from None
    return _ALIASES.get(scheme, scheme)


def _opener(scheme: str) -> Callable[[str, QueueOptions], QueueAdapter]:
    """Import and return the function that opens queues of a scheme."""
    try:
        return cast("Callable[[str, QueueOptions], QueueAdapter]", _entry_point(scheme).load())
    except ModuleNotFoundError as error:
        todo = f"pip install 'klaviyo-worker[{scheme}]'" if scheme in _BUILT_IN else ""
        raise QueueError(f"QUEUE_URL: {scheme}:// needs {error.name}, which is not installed", todo=todo) from None
    except (ImportError, AttributeError, SyntaxError) as error:
        raise QueueError(f"QUEUE_URL: the adapter for {scheme}:// cannot be imported: {error}") from None


def _entry_point(scheme: str) -> EntryPoint:
    """Return the entry point of a scheme. Built-in adapters are found without reading other packages' metadata."""
    if scheme in _BUILT_IN:
        return EntryPoint(scheme, _BUILT_IN[scheme], ENTRY_POINTS)
    registered = {entry.name: entry for entry in entry_points(group=ENTRY_POINTS)}
    if scheme in registered:
        return registered[scheme]
    known = ", ".join(f"{name}://" for name in sorted({*_BUILT_IN, *registered}))
    raise QueueURLError("QUEUE_URL is malformed", todo=f"expected one of {known}; found {scheme or 'no scheme'}")
