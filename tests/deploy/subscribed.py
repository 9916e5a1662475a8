"""What a commercetools subscription must ask for so that every handler gets its notifications.

https://docs.commercetools.com/api/projects/subscriptions
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from worker.transform import HANDLERS

if TYPE_CHECKING:
    from collections.abc import Iterator

CHANGES = ("ResourceCreated", "ResourceUpdated", "ResourceDeleted")  # a change subscription cannot choose among them


def messages() -> dict[str, list[str]]:
    """Return the message types with a handler, by resource type."""
    wanted: dict[str, list[str]] = {}
    for resource, kind in HANDLERS:
        if kind not in CHANGES:
            wanted.setdefault(resource, []).append(kind)
    return wanted


def changes() -> list[str]:
    """Return the resource types whose updates have a handler.

    Not products: of their changes only the deletion has one, and `ProductDeleted` tells that without all the rest.
    """
    return [resource for resource, kind in HANDLERS if kind == "ResourceUpdated"]


def draft() -> dict[str, Any]:
    """Return the body that creates the subscription, for the topic of docs/pubsub.md."""
    return {
        "key": "klaviyo-worker",
        "destination": {"type": "GoogleCloudPubSub", "projectId": "my-project", "topic": "klaviyo-worker"},
        "messages": [{"resourceTypeId": resource, "types": types} for resource, types in messages().items()],
        "changes": [{"resourceTypeId": resource} for resource in changes()],
        "format": {"type": "Platform"},
    }


def lines() -> Iterator[str]:
    """Yield `draft` as docs/subscriptions.md shows it: a line for each message subscription."""
    yield "```json"
    yield "{"
    *fields, last = draft().items()
    for name, value in fields:
        if name == "messages":
            rows = ",\n".join(f"    {json.dumps(entry)}" for entry in value)
            yield f'  "messages": [\n{rows}\n  ],'
        else:
            yield f"  {json.dumps(name)}: {json.dumps(value)},"
    yield f"  {json.dumps(last[0])}: {json.dumps(last[1])}"
    yield "}"
    yield "```"


def delivered(messages: dict[str, list[str]], changes: list[str]) -> set[tuple[str, str]]:
    """Return the kinds of notification that come of a subscription, as HANDLERS names them."""
    return {(resource, kind) for resource, kinds in messages.items() for kind in kinds} | {
        (resource, kind) for resource in changes for kind in CHANGES
    }
