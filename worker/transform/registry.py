"""The table of handlers, and the decorator that fills it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from operator import attrgetter

from worker.mapping import MappingConfig
from worker.model import Enriched, Notification, Operation

HandlerFunction = Callable[[Enriched, MappingConfig], Iterable[Operation]]
Precheck = Callable[[Notification, MappingConfig], None]
Omissions = Callable[[Enriched, MappingConfig], Iterable[str]]


@dataclass(frozen=True, slots=True)
class Handler:
    """A function that handles one type of notification, with its description.

    `switches` are keys of the mapping, like `order.fulfilled_by_delivery`. If there are any, the handler is off until
    one of them has a value.
    """

    resource_type: str
    type: str
    effect: str  # shown by `klaviyo-worker handlers` and docs/mapping.md
    function: HandlerFunction
    precheck: Precheck | None = None
    omissions: Omissions | None = None
    switches: tuple[str, ...] = ()

    @property
    def summary(self) -> str:
        """Return the effect, and what switches the handler on."""
        return f"{self.effect}; off until {' or '.join(self.switches)} is set" if self.switches else self.effect

    def is_on(self, mapping: MappingConfig) -> bool:
        """Return whether the mapping switches the handler on. `disabled_types` does not matter here."""
        return not self.switches or any(attrgetter(switch)(mapping) for switch in self.switches)


HANDLERS: dict[tuple[str, str], Handler] = {}


def handles(
    *types: str,
    resource: str,
    effect: str,
    precheck: Precheck | None = None,
    omissions: Omissions | None = None,
    switches: tuple[str, ...] = (),
) -> Callable[[HandlerFunction], HandlerFunction]:
    """Register a handler for types of messages or changes (ResourceCreated, ...) of a commercetools resource type.

    `effect` describes for readers what the handler sends. `precheck` raises Ignored if the notification alone shows
    that there is nothing to send. It runs before any data is fetched. `omissions` describes which data the handler
    leaves out and why. It contains names but no values. Change it whenever you change the handler. `switches` are those
    of Handler.
    """

    def register(function: HandlerFunction) -> HandlerFunction:
        for kind in types:
            HANDLERS[resource, kind] = Handler(resource, kind, effect, function, precheck, omissions, switches)
        return function

    return register


def enabled_handlers(mapping: MappingConfig) -> list[Handler]:
    """Return the handlers that the mapping switches on and does not disable."""
    return [each for each in HANDLERS.values() if each.type not in mapping.disabled_types and each.is_on(mapping)]
