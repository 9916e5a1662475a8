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
    """What to do with one type of notification."""

    resource_type: str
    type: str
    effect: str  # for people: `klaviyo-worker handlers`, docs/mapping.md
    function: HandlerFunction
    precheck: Precheck | None = None
    once_per_resource: bool = False
    omissions: Omissions | None = None


HANDLERS: dict[tuple[str, str], Handler] = {}


def handles(
    *types: str,
    resource: str,
    effect: str,
    precheck: Precheck | None = None,
    once_per_resource: bool = False,
    omissions: Omissions | None = None,
) -> Callable[[HandlerFunction], HandlerFunction]:
    """Register a handler for message types (or ResourceCreated, ...) of a commercetools resource type.

    `precheck` raises Ignored when the notification alone shows that there is nothing to do, before
    anything is fetched for it. `once_per_resource`: a resource has one message of this type, and no message before it
    makes events with the same unique_id; its first delivery may go to Klaviyo in bulk. `omissions` tells a person
    what is not sent, and why: by names, never by values.
    """

    def register(function: HandlerFunction) -> HandlerFunction:
        for kind in types:
            HANDLERS[resource, kind] = Handler(resource, kind, effect, function, precheck, once_per_resource, omissions)
        return function

    return register
