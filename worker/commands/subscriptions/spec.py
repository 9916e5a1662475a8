"""What a subscription asks commercetools for, and what the worker's handlers need of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from worker.json_access import as_dicts, as_text, unique
from worker.transform import HANDLERS

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from worker.model import Json

CHANGES = ("ResourceCreated", "ResourceUpdated", "ResourceDeleted")  # a change subscription cannot choose among them
TOLD_BY_MESSAGES = frozenset({"product"})  # docs/decisions/0020-one-commercetools-subscription.md


@dataclass(frozen=True, slots=True)
class Needs:
    """Messages by resource type, none of a type: all; and the resource types whose changes are told."""

    messages: Mapping[str, tuple[str, ...]]
    changes: tuple[str, ...]

    def without(self, other: Needs) -> Needs:
        """Return what is here and not in `other`; a resource type with no message types stands for all others."""
        messages = {}
        for resource, types in self.messages.items():
            theirs = other.messages.get(resource)
            left = tuple(kind for kind in types if kind not in (theirs or ()))
            if theirs is None or (theirs and (left or not types)):
                messages[resource] = left
        return Needs(messages, tuple(resource for resource in self.changes if resource not in other.changes))

    def fields(self) -> Json:
        """Return it as a subscription has it."""
        messages = [
            {"resourceTypeId": resource, "types": list(types)} if types else {"resourceTypeId": resource}
            for resource, types in self.messages.items()
        ]
        return {"messages": messages, "changes": [{"resourceTypeId": resource} for resource in self.changes]}

    def __bool__(self) -> bool:
        """Tell whether it asks for anything."""
        return bool(self.messages or self.changes)


def needs(disabled: Collection[str] = ()) -> Needs:
    """Return what the handlers need, without those of the types that the mapping has disabled."""
    enabled = [(resource, kind) for resource, kind in HANDLERS if kind not in disabled]
    messages: dict[str, tuple[str, ...]] = {}
    for resource, kind in enabled:
        if kind not in CHANGES:
            messages[resource] = (*messages.get(resource, ()), kind)
    changed = (resource for resource, kind in enabled if kind in CHANGES and resource not in TOLD_BY_MESSAGES)
    return Needs(messages, tuple(unique(changed)))


def asked_for(subscription: Json) -> Needs:
    """Return what a subscription asks for; what has no shape is left out."""
    messages: dict[str, tuple[str, ...]] = {}
    for entry in as_dicts(subscription.get("messages")):
        resource = as_text(entry.get("resourceTypeId"))
        given = entry.get("types")
        types = unique(map(as_text, given)) if isinstance(given, list) else []
        known = messages.get(resource)
        messages[resource] = () if not types or known == () else tuple(unique([*(known or ()), *types]))
    messages.pop("", None)
    changes = (as_text(entry.get("resourceTypeId")) for entry in as_dicts(subscription.get("changes")))
    return Needs(messages, tuple(unique(changes)))
