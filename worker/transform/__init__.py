"""Enriched -> Operations. Pure: no I/O, no clock. One handler per kind of notification, one file per resource.

A new message type is one function with `@handles` in the file of its resource, and a golden folder.
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
    import_module(f"worker.transform.{_module}")  # fills HANDLERS


def handler_for(notification: Notification, mapping: MappingConfig) -> Handler:
    """Return the handler of a notification worth fetching data for.

    Raises Ignored: no handler, disabled, or the notification itself shows that there is nothing to do.
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
    enriched: Enriched, mapping: MappingConfig, fresh: Callable[[], bool] | None = None
) -> Sequence[Operation]:
    """Return what Klaviyo is to do. `fresh` tells whether nobody can have handled the message; None: somebody can.

    Raises Ignored (nothing) or Rejected (can never be done).
    """
    handler = handler_for(enriched.notification, mapping)
    operations = tuple(handler.function(enriched, mapping))
    if not operations:
        raise Ignored("nothing to send")
    if fresh and handler.once_per_resource:
        return tuple(replace(operation, is_first_delivery=fresh) for operation in operations)
    return operations
