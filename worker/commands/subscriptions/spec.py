"""The messages and changes that a subscription requests, and those that the worker's handlers need."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from worker.json_access import as_dicts, as_text, unique
from worker.transform import enabled_handlers

if TYPE_CHECKING:
    from collections.abc import Mapping

    from worker.mapping import MappingConfig
    from worker.model import Json

CHANGE_TYPES = ("ResourceCreated", "ResourceUpdated", "ResourceDeleted")  # a change subscription brings all three
COVERED_BY_MESSAGES = frozenset({"product"})  # docs/decisions/0020-one-commercetools-subscription.md


@dataclass(frozen=True, slots=True)
class SubscriptionSpec:
    """The content of a subscription.

    `messages`: message types by resource type; an empty tuple means all types. `changes`: resource types whose
    creations, updates and deletions are requested.
    """

    messages: Mapping[str, tuple[str, ...]]
    changes: tuple[str, ...]

    def minus(self, other: SubscriptionSpec) -> SubscriptionSpec:
        """Return what this spec requests and `other` does not. An empty tuple of types then means "all others"."""
        messages = {}
        for resource, types in self.messages.items():
            known = other.messages.get(resource)
            missing = tuple(kind for kind in types if kind not in (known or ()))
            if known is None or (known and (missing or not types)):
                messages[resource] = missing
        changes = tuple(resource for resource in self.changes if resource not in other.changes)
        return SubscriptionSpec(messages, changes)

    def fields(self) -> Json:
        """Return the spec in the form of commercetools' API."""
        messages = [
            {"resourceTypeId": resource, "types": list(types)} if types else {"resourceTypeId": resource}
            for resource, types in self.messages.items()
        ]
        return {"messages": messages, "changes": [{"resourceTypeId": resource} for resource in self.changes]}

    def __bool__(self) -> bool:
        """Return True if the spec requests anything."""
        return bool(self.messages or self.changes)


def required_spec(mapping: MappingConfig) -> SubscriptionSpec:
    """Return what the handlers need that the mapping enables."""
    enabled = [(handler.resource_type, handler.type) for handler in enabled_handlers(mapping)]
    messages: dict[str, tuple[str, ...]] = {}
    for resource, kind in enabled:
        if kind not in CHANGE_TYPES:
            messages[resource] = (*messages.get(resource, ()), kind)
    changed = (resource for resource, kind in enabled if kind in CHANGE_TYPES and resource not in COVERED_BY_MESSAGES)
    return SubscriptionSpec(messages, tuple(unique(changed)))


def spec_of(subscription: Json) -> SubscriptionSpec:
    """Return what a subscription requests, without malformed entries."""
    messages: dict[str, tuple[str, ...]] = {}
    for entry in as_dicts(subscription.get("messages")):
        resource = as_text(entry.get("resourceTypeId"))
        listed = entry.get("types")
        types = unique(map(as_text, listed)) if isinstance(listed, list) else []
        known = messages.get(resource)
        messages[resource] = () if not types or known == () else tuple(unique([*(known or ()), *types]))
    messages.pop("", None)
    changes = (as_text(entry.get("resourceTypeId")) for entry in as_dicts(subscription.get("changes")))
    return SubscriptionSpec(messages, tuple(unique(changes)))
