"""The transform stage: turn an enriched notification into operations, without I/O and without a clock.

There is one handler per type of notification and one file per resource type. To add a message type, write a function
with `@handles` in the file of its resource and add a folder to tests/golden.
"""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from typing import TYPE_CHECKING

from worker.errors import Ignored
from worker.transform.registry import HANDLERS, Handler, handles

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from worker.mapping import MappingConfig
    from worker.model import Enriched, Notification, Operation

__all__ = ["HANDLERS", "Handler", "handler_for", "handles", "transform"]

for _module in ("orders", "payments", "customers", "categories", "products", "inventory"):
    import_module(f"worker.transform.{_module}")  # registers its handlers


def handler_for(notification: Notification, mapping: MappingConfig) -> Handler:
    """Return the handler of a notification.

    Raises Ignored if there is none, if the mapping disables it, or if the notification shows that there is nothing to
    send.
    """
    handler = HANDLERS.get((notification.resource_type, notification.type))
    if handler is None:
        raise Ignored("no handler for this type")
    if notification.type in mapping.disabled_types:
        raise Ignored("disabled in the mapping")
    if handler.precheck:
        handler.precheck(notification, mapping)
    return handler


def transform(
    enriched: Enriched, mapping: MappingConfig, is_first_delivery: Callable[[], bool] | None = None
) -> Sequence[Operation]:
    """Return the operations for a notification. Raises Ignored if there are none, Rejected if they can never succeed.

    `is_first_delivery` returns True as long as no worker can have handled the message before; None if one might have.
    """
    handler = handler_for(enriched.notification, mapping)
    operations = tuple(handler.function(enriched, mapping))
    if not operations:
        raise Ignored("nothing to send")
    if is_first_delivery and handler.once_per_resource:
        return tuple(replace(operation, is_first_delivery=is_first_delivery) for operation in operations)
    return operations
