"""The connections to Pub/Sub, or to its emulator."""

from __future__ import annotations

import os
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import grpc

if TYPE_CHECKING:
    from collections.abc import Iterable

# no limit, as in the client's own transport
_ANY_SIZE = (("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1))
_RECONNECT = ("grpc.max_reconnect_backoff_ms", 10_000)  # by default, reconnecting after a long outage takes minutes
_PROXYLESS = ("grpc.enable_http_proxy", 0)  # an emulator runs in the same network


def open_transport(kind: Any) -> Any:
    """Return a transport like the client's own, which pings every 30 s, but with a shorter backoff for reconnecting.

    The emulator gets no pings, because it closes the connection with `too_many_pings`.
    """
    if emulator := os.environ.get("PUBSUB_EMULATOR_HOST"):
        return kind(host=emulator, channel=grpc.insecure_channel(emulator, [*_ANY_SIZE, _RECONNECT, _PROXYLESS]))

    def channel(host: str, *, options: Iterable[tuple[str, int]], **arguments: Any) -> grpc.Channel:
        return cast("grpc.Channel", kind.create_channel(host, options=[*options, _RECONNECT], **arguments))

    return partial(kind, channel=channel)
