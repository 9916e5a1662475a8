"""The table of handlers, and the decorator that fills it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from worker.mapping import MappingConfig
from worker.model import Enriched, Notification, Operation

HandlerFunction = Callable[[Enriched, MappingConfig], Iterable[Operation]]
Precheck = Callable[[Notification, MappingConfig], None]
Omissions = Callable[[Enriched, MappingConfig], Iterable[str]]


@dataclass(frozen=True, slots=True)
class Handler:
    """A function that handles one type of notification, with its description."""

    resource_type: str
    type: str
    effect: str  # shown by `klaviyo-worker handlers` and docs/mapping.md
    function: HandlerFunction
    precheck: Precheck | None = None
    omissions: Omissions | None = None


HANDLERS: dict[tuple[str, str], Handler] = {}


def handles(
    *types: str,
    resource: str,
    effect: str,
    precheck: Precheck | None = None,
    omissions: Omissions | None = None,
) -> Callable[[HandlerFunction], HandlerFunction]:
    """Register a handler for types of messages or changes (ResourceCreated, ...) of a commercetools resource type.

    `effect` describes for readers what the handler sends. `precheck` raises Ignored if the notification alone shows
    that there is nothing to send. It runs before any data is fetched. `omissions` describes which data the handler
    leaves out and why. It contains names but no values. Change it whenever you change the handler.
    """

    def register(function: HandlerFunction) -> HandlerFunction:
        for kind in types:
            HANDLERS[resource, kind] = Handler(resource, kind, effect, function, precheck, omissions)
        return function

    return register
