"""The transform stage: turns an enriched notification into operations. It does no I/O and reads no clock.

Each type of notification has a handler, and each resource type has a file. To add a message type, write a function with
`@handles` in the file of its resource type, and add a folder to tests/golden.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from worker.errors import Ignored
from worker.json_access import as_dict
from worker.transform.region import check_order, check_region
from worker.transform.registry import HANDLERS, Handler, enabled_handlers, handles
from worker.transform.related import related_operations

if TYPE_CHECKING:
    from collections.abc import Sequence

    from worker.mapping import MappingConfig
    from worker.model import Enriched, Notification, Operation

__all__ = ["HANDLERS", "Handler", "enabled_handlers", "handler_for", "handles", "transform"]

_ORDERS = ("orders", "fulfilment", "shipments", "returns", "payments")
for _module in (*_ORDERS, "carts", "customers", "categories", "products", "inventory"):
    import_module(f"worker.transform.{_module}")  # registers its handlers


def handler_for(notification: Notification, mapping: MappingConfig) -> Handler:
    """Return the handler of a notification.

    Raises Ignored if it has no handler, if the mapping disables its type or does not switch it on, if the handler's
    precheck finds that there is nothing to send, or if the order in it is of a store or country that the mapping
    excludes.
    """
    handler = HANDLERS.get((notification.resource_type, notification.type))
    if handler is None:
        raise Ignored("no handler for this type")
    if notification.type in mapping.disabled_types:
        raise Ignored("disabled in the mapping")
    if not handler.is_on(mapping):
        raise Ignored(f"off by default: see {', '.join(handler.switches)}")
    if handler.precheck:
        handler.precheck(notification, mapping)
    check_order(as_dict(notification.payload.get("order")), mapping)
    return handler


def transform(enriched: Enriched, mapping: MappingConfig) -> Sequence[Operation]:
    """Return the operations for a notification.

    Raises Ignored if there is nothing to send, and Rejected if the message can never succeed.
    """
    handler = handler_for(enriched.notification, mapping)
    check_region(enriched, mapping)
    operations = (*handler.function(enriched, mapping), *related_operations(enriched, mapping))
    if not operations:
        raise Ignored("nothing to send")
    return operations
