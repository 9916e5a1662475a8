"""The data that travels through the stages: Delivery -> Notification -> Enriched -> Operation -> Outcome."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any, NamedTuple

from worker.errors import HELD, Disposition

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from datetime import datetime

    from adapters.base import Delivery
    from worker.errors import WorkerError

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Notification:
    """A commercetools notification, freed from its envelope.

    `type` is the message type (`OrderCreated`, also when the payload was not included) or the change
    (`ResourceUpdated`). `payload` is the whole notification; message fields stand at its top level.
    """

    type: str
    resource_type: str
    resource_id: str
    time: str | None  # RFC 3339, when it happened
    payload: Json = field(repr=False)


@dataclass(frozen=True, slots=True)
class Enriched:
    """A notification with the commercetools data its handler needs; None: commercetools has no such thing."""

    notification: Notification
    as_of: datetime  # when commercetools was read; prices are judged by it
    order: Json | None = field(default=None, repr=False)
    payment: Json | None = field(default=None, repr=False)
    customer: Json | None = field(default=None, repr=False)
    category: Json | None = field(default=None, repr=False)
    descendants: Sequence[Json] = field(default=(), repr=False)
    product: Json | None = field(default=None, repr=False)  # current projection
    inventory_entry: Json | None = field(default=None, repr=False)
    inventory: Mapping[str, Sequence[Json]] = field(default_factory=dict, repr=False)  # sku -> entries
    product_categories: Mapping[str, Sequence[str]] = field(default_factory=dict, repr=False)  # product -> ids
    categories: Mapping[str, Json] = field(default_factory=dict, repr=False)  # id -> category, ancestors too
    discount_codes: Mapping[str, str] = field(default_factory=dict, repr=False)  # id -> code


class OperationKind(Enum):
    """What can be asked of Klaviyo. The value is the name in logs and in `klaviyo-worker transform`."""

    CREATE_EVENT = "create_event"
    UPSERT_PROFILE = "upsert_profile"
    DELETE_PROFILE = "delete_profile"
    UPSERT_CATEGORY = "upsert_category"
    ENSURE_CATEGORY = "ensure_category"
    DELETE_CATEGORY = "delete_category"
    UPSERT_ITEM = "upsert_item"
    DELETE_ITEM = "delete_item"
    UPSERT_VARIANT = "upsert_variant"
    UPDATE_INVENTORY = "update_inventory"
    DELETE_STALE_VARIANTS = "delete_stale_variants"
    DELETE_VARIANT = "delete_variant"  # what DELETE_STALE_VARIANTS finds

    __hash__ = object.__hash__  # members are single; Enum's own is Python code, called some sixty times a message


@dataclass(frozen=True, slots=True)
class Operation:
    """One write to Klaviyo: idempotent and self-contained.

    If a batch has several operations with the same kind and `key`, only the last one counts. `resource` is the
    JSON:API object (`type`, `id`, `attributes`, `relationships`); None if the key is enough. `keep_skus` are the
    variants that DELETE_STALE_VARIANTS keeps. `fallback` returns the operations to send instead if Klaviyo does not
    have the object to update. `is_first_delivery` returns True as long as no worker can have sent this event before;
    None if one might have.
    """

    kind: OperationKind
    key: str
    resource: Json | None = field(default=None, repr=False)
    keep_skus: frozenset[str] = frozenset()
    fallback: Callable[[], Iterable[Operation]] | None = field(default=None, repr=False, compare=False)
    truncated: Sequence[str] = ()  # property paths shortened to Klaviyo's limits
    is_first_delivery: Callable[[], bool] | None = field(default=None, repr=False, compare=False)


class SendResult(NamedTuple):
    """What became of an operation; `error` None: its effect is in Klaviyo. `requests`: how many that took."""

    error: WorkerError | None
    requests: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a delivery ends, in which stage, and what caused it (None: its effect is in Klaviyo)."""

    disposition: Disposition
    stage: str
    cause: Exception | None = None
    delay: float = 0.0  # seconds, for NACK

    @property
    def reason(self) -> str:
        """Return one sentence for an operator, without personal data; "" for an effect."""
        return "" if self.cause is None else str(self.cause)

    @property
    def error(self) -> str:
        """Return the class of the cause."""
        return "" if self.cause is None else type(self.cause).__name__


@dataclass(slots=True)
class Lease:
    """How long a message is ours for sure, in monotonic seconds."""

    until: float = 0.0

    def is_valid(self) -> bool:
        """Tell whether nobody else can have had the message by now."""
        return time.monotonic() < self.until

    def extend(self, since: float, seconds: float) -> None:
        """Note an extension. A lease that may have ended before may have been somebody else's meanwhile."""
        if self.is_valid():
            self.until = since + seconds


@dataclass(slots=True, eq=False)
class Message:
    """One delivery's way through the pipeline; the only thing here that changes."""

    delivery: Delivery
    received_at: float  # monotonic seconds, as all times here
    notification: Notification | None = None
    enriched: Enriched | None = None
    operations: Sequence[Operation] = ()
    outcome: Outcome | None = None
    requests: int = 0  # made to Klaviyo for it; one that many messages share counts for each
    retries: int = 0  # times it was tried before in this process
    last_sent: Sequence[Operation] = ()  # done, but perhaps outdated by then
    events_may_be_sent: bool = False  # the first delivery, and its events may be in Klaviyo by now
    failed_at: float = 0.0  # when the first of them failed
    due_at: float = 0.0  # when to try again
    lease: Lease = field(default_factory=Lease)

    @property
    def key(self) -> tuple[str, str]:
        """Return what it is about; messages with the same key are handled in their order."""
        if self.notification is None:
            return "", self.delivery.id
        return self.notification.resource_type, self.notification.resource_id

    @property
    def is_held(self) -> bool:
        """Tell whether its last try ended with keeping it."""
        return self.outcome is not None and self.outcome.disposition in HELD
