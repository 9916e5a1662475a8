"""The subscription in the documentation."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from worker.commands.subscriptions.destination import parse
from worker.commands.subscriptions.plan import KEY, DesiredSubscription
from worker.commands.subscriptions.spec import CHANGE_TYPES, required_spec
from worker.mapping import MappingConfig

if TYPE_CHECKING:
    from collections.abc import Iterator


def draft() -> dict[str, Any]:
    """Return the body that creates the subscription, for the topic of docs/pubsub.md."""
    destination = parse("pubsub://my-project/klaviyo-worker", "")
    return DesiredSubscription(KEY, destination, required_spec(MappingConfig())).draft()


def lines() -> Iterator[str]:
    """Yield the lines of `draft` for docs/subscriptions.md, with one line per resource type."""
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
    """Return the notifications of a subscription, as keys of HANDLERS."""
    return {(resource, kind) for resource, kinds in messages.items() for kind in kinds} | {
        (resource, kind) for resource in changes for kind in CHANGE_TYPES
    }
