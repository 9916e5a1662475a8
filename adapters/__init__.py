"""Queues the worker can read. `open_queue` is the only way in; one file per queue, here or in another package."""

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
    "SupportsPublish",
    "open_queue",
    "scheme_of",
]

ENTRY_POINTS = "klaviyo_worker.adapters"  # where other packages offer queues: scheme = module:open_url
_HERE = {  # imported on use: a worker on one queue never pays for the client of another
    "embedded": "adapters.embedded:open_url",
    "pubsub": "adapters.pubsub.queue:open_url",
    "push": "adapters.push.queue:open_url",
    "servicebus": "adapters.servicebus.queue:open_url",
    "sqs": "adapters.sqs.queue:open_url",
}
_ALIASES = {"https": "sqs"}  # the URL by which AWS itself names a queue
_DEFAULTS = QueueOptions()


def open_queue(url: str, options: QueueOptions = _DEFAULTS) -> QueueAdapter:
    """Open the queue that `url` names. Raises QueueURLError, or QueueError when it cannot be opened."""
    return _opener(scheme_of(url))(url, options)


def scheme_of(url: str) -> str:
    """Return the scheme that names the adapter; "" when there is none. Raises QueueURLError."""
    try:
        scheme = urlsplit(url).scheme
    except ValueError:  # its text may quote what the URL holds
        raise QueueURLError("QUEUE_URL is malformed", todo="expected a URL with a valid host") from None
    return _ALIASES.get(scheme, scheme)


def _opener(scheme: str) -> Callable[[str, QueueOptions], QueueAdapter]:
    """Import what opens such a queue: ours, else another package's."""
    try:
        return cast("Callable[[str, QueueOptions], QueueAdapter]", _offered(scheme).load())
    except ModuleNotFoundError as error:
        todo = f"pip install 'klaviyo-worker[{scheme}]'" if scheme in _HERE else ""
        raise QueueError(f"QUEUE_URL: {scheme}:// needs {error.name}, which is not installed", todo=todo) from None
    except (ImportError, AttributeError, SyntaxError) as error:
        raise QueueError(f"QUEUE_URL: what offers {scheme}:// is broken: {error}") from None


def _offered(scheme: str) -> EntryPoint:
    """Return who opens such a queue. For ours nobody else is asked, whose metadata may be broken."""
    if scheme in _HERE:
        return EntryPoint(scheme, _HERE[scheme], ENTRY_POINTS)
    offered = {entry.name: entry for entry in entry_points(group=ENTRY_POINTS)}
    if scheme in offered:
        return offered[scheme]
    known = ", ".join(f"{name}://" for name in sorted({*_HERE, *offered}))
    raise QueueURLError("QUEUE_URL is malformed", todo=f"expected one of {known}; found {scheme or 'no scheme'}")
