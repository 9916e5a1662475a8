"""The data that travels through the stages: Delivery -> Notification -> Enriched -> Operation -> Outcome."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import Enum
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from worker.errors import HELD, Disposition

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from adapters.base import Delivery
    from worker.errors import WorkerError

Json = dict[str, Any]
ResourceKey = tuple[str, str]  # type and id of a commercetools resource
UNKNOWN_TIME = datetime.max.replace(tzinfo=UTC)  # of a reading by another worker, which possibly wrote the state


@dataclass(frozen=True, slots=True)
class Notification:
    """A commercetools notification without its envelope.

    `type` is the message type (`OrderCreated`, even if the payload is not included) or the change
    (`ResourceUpdated`). `payload` is the whole notification, with the fields of the Message at the top level. `seen`
    are the resources that earlier readings of commercetools for this message found, and the follow-ups of its writes
    (SendResult): ("sku", its text) for the product that has the SKU, ("category-products", id of the category).
    """

    type: str
    resource_type: str
    resource_id: str
    time: str | None  # of the change, RFC 3339
    payload: Json = field(repr=False)
    seen: Collection[ResourceKey] = ()
    written_since: datetime | None = None  # see Message


@dataclass(frozen=True, slots=True)
class Enriched:
    """A notification with the commercetools data that its handler needs.

    A resource is None if commercetools does not have it or the handler does not need it. `versions` has the version of
    every resource whose state the handler writes, None if commercetools does not show it. `missing` names the resource
    that should exist but that commercetools does not show; "" if there is none.
    """

    notification: Notification
    as_of: datetime  # when commercetools was read; prices valid at this time are used
    order: Json | None = field(default=None, repr=False)  # or the cart of a message about a cart
    workflow_state: Json | None = field(default=None, repr=False)  # that the order has entered
    payment: Json | None = field(default=None, repr=False)
    payments: Sequence[Json] = field(default=(), repr=False)  # of the order, in its order
    added_payments: Sequence[Json] = field(default=(), repr=False)  # those of `payments` that OrderPaymentAdded adds
    customer: Json | None = field(default=None, repr=False)
    category: Json | None = field(default=None, repr=False)
    descendants: Sequence[Json] = field(default=(), repr=False)
    product: Json | None = field(default=None, repr=False)  # current projection
    product_id: str = ""  # of the catalog entry that the notification concerns, even if `product` is None
    sku: str = ""  # that the notification concerns, if it is about stock or a standalone price
    standalone_prices: Mapping[str, Sequence[Json]] = field(default_factory=dict, repr=False)  # sku -> prices
    inventory: Mapping[str, Sequence[Json]] = field(default_factory=dict, repr=False)  # sku -> entries
    product_categories: Mapping[str, Sequence[str]] = field(default_factory=dict, repr=False)  # product -> ids
    categories: Mapping[str, Json] = field(default_factory=dict, repr=False)  # id -> category, including ancestors
    product_brands: Mapping[str, Any] = field(default_factory=dict, repr=False)  # product -> value of its attribute
    discount_codes: Mapping[str, str] = field(default_factory=dict, repr=False)  # id -> code
    related: Sequence[Enriched] = field(default=(), repr=False)  # products that the message has to write, too
    versions: Mapping[ResourceKey, int | None] = field(default_factory=dict, repr=False)
    missing: str = ""


class Effect(Enum):
    """The part of Klaviyo that a message changes. Each effect has its own lanes, threads and budget of messages.

    So no effect waits for the rate limits or the outage of another one. The value is the name in logs and metrics.
    """

    EVENTS = "events"
    PROFILES = "profiles"
    DELETIONS = "deletions"  # of profiles: Klaviyo accepts 60 a minute
    CATALOG = "catalog"
    CARTS = "carts"  # their events give way to those of orders


_EFFECT_OF_RESOURCE = {
    "customer": Effect.PROFILES,
    "category": Effect.CATALOG,
    "product": Effect.CATALOG,
    "inventory-entry": Effect.CATALOG,
    "standalone-price": Effect.CATALOG,
    "cart": Effect.CARTS,
}


class OperationKind(Enum):
    """The kinds of writes to Klaviyo. The value is the name in logs and in `klaviyo-worker transform`."""

    CREATE_EVENT = "create_event"
    UPSERT_PROFILE = "upsert_profile"  # of a customer
    UPSERT_GUEST = "upsert_guest"  # the profile of a person without a customer account
    DELETE_PROFILE = "delete_profile"
    UPSERT_CATEGORY = "upsert_category"
    ENSURE_CATEGORY = "ensure_category"
    MOVE_CATEGORY = "move_category"  # the update of a category that has other ancestors
    DELETE_CATEGORY = "delete_category"
    UPSERT_ITEM = "upsert_item"
    ENSURE_ITEM = "ensure_item"
    DELETE_ITEM = "delete_item"
    UPSERT_VARIANT = "upsert_variant"
    ENSURE_VARIANT = "ensure_variant"
    UPDATE_INVENTORY = "update_inventory"
    DELETE_STALE_VARIANTS = "delete_stale_variants"
    DELETE_VARIANT = "delete_variant"  # one for each variant that DELETE_STALE_VARIANTS finds

    __hash__ = object.__hash__  # Enum's own method is slow Python code, and a message needs about sixty hashes


@dataclass(frozen=True, slots=True)
class Consent:
    """The consent of a person to a channel ("email", "sms"), as commercetools has it.

    Only the value True is a consent. `property` is the property of the profile with the value that the worker wrote
    last. `consented_at` is a past time (RFC 3339); "" if unknown. `version` is that of the customer, who was read at
    `read_at`.
    """

    channel: str
    property: str
    value: Any = field(repr=False)
    consented_at: str
    version: int
    read_at: datetime


@dataclass(frozen=True, slots=True)
class Operation:
    """One write to Klaviyo: idempotent and self-contained.

    If a batch has several operations with the same kind and `key`, only the last one is sent. `resource` is the
    JSON:API object (`type`, `id`, `attributes`, `relationships`); None if the key is enough. An UPSERT_PROFILE has the
    customer's id as its key and the customer's whole state as its attributes, with None for what commercetools no
    longer has. An UPSERT_GUEST has the lower-cased email address as its key. DELETE_PROFILE deletes no profile that
    Klaviyo created before `created_since`. `background` events give way to other events, and a process sends each of
    them once.

    ENSURE_* creates a catalog entry and leaves an existing one unchanged. An item or variant without a price has the
    price None. A variant whose stock is not tracked has the inventory_quantity None. DELETE_STALE_VARIANTS keeps the
    variants `keep_skus`, and deletes others only if they are in `checked_skus`: commercetools was asked for these SKUs.
    UPSERT_CATEGORY with `watches_move` does not write a category that has other ancestors in Klaviyo: its products are
    written first.
    """

    kind: OperationKind
    key: str
    resource: Json | None = field(default=None, repr=False)
    keep_skus: frozenset[str] = frozenset()
    checked_skus: frozenset[str] = frozenset()
    watches_move: bool = False
    any_profile: bool = False  # UPSERT_GUEST: also write to the profile of a customer
    truncated: Sequence[str] = ()  # property paths shortened to Klaviyo's limits
    gaps: Sequence[str] = ()  # of a product: "price" per variant without a price, "sku" per variant without a sku
    created_since: datetime | None = None
    background: bool = False
    consents: Sequence[Consent] = ()  # of the person whose profile UPSERT_PROFILE writes


class SendResult(NamedTuple):
    """The result of an operation."""

    error: WorkerError | None  # None: the effect is in Klaviyo
    requests: int  # that were sent to Klaviyo for the operation
    erased: int = 0  # profiles whose deletion was requested
    follow_ups: frozenset[ResourceKey] = frozenset()  # what must be read from commercetools, and then written, too


class Ending(Enum):
    """The end of a delivery. The value is its name in logs and metrics."""

    SENT = "sent"  # the effect is in Klaviyo
    IGNORED = "ignored"  # the message has no effect
    RETRIED = "retried"  # nacked after a failure
    DEAD_LETTERED = "dead_lettered"
    RETURNED = "returned"  # given back to the queue; not a failure

    __hash__ = object.__hash__


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of processing a message: its disposition, the stage that determined it, and the cause."""

    disposition: Disposition
    stage: str
    cause: Exception | None = None  # None: the effect is in Klaviyo
    delay: float = 0.0  # seconds before the redelivery, if the disposition is NACK

    def __post_init__(self) -> None:
        """Remove the traceback of the cause. It would keep the data of a whole batch in memory while this is held."""
        if self.cause is not None:
            self.cause.__traceback__ = self.cause.__context__ = self.cause.__cause__ = None

    @property
    def reason(self) -> str:
        """Return the error text of the cause; "" if the effect is in Klaviyo."""
        return "" if self.cause is None else str(self.cause)

    @property
    def error(self) -> str:
        """Return the class name of the cause; "" if the effect is in Klaviyo."""
        return "" if self.cause is None else type(self.cause).__name__


@dataclass(slots=True, eq=False)
class Message:
    """A delivery on its way through the pipeline. Mutable. All times are monotonic seconds."""

    delivery: Delivery
    received_at: float
    notification: Notification | None = None
    enriched: Enriched | None = None
    operations: Sequence[Operation] = ()
    outcome: Outcome | None = None
    requests: int = 0  # sent to Klaviyo for this message; a bulk request counts for every message in it
    erased: int = 0  # profiles whose deletion was requested for this message
    written_since: datetime | None = None  # the reading of the first state that was written; None: nothing was
    retries: int = 0  # in this process
    times_blocked: int = 0  # in a row (see errors.RequestBlocked)
    known_versions: Mapping[ResourceKey, int] = field(default_factory=dict)  # the latest that are known to exist
    follow_ups: frozenset[ResourceKey] = frozenset()  # of its writes so far: see SendResult
    written_versions: Mapping[ResourceKey, int | None] | None = None  # of the state in Klaviyo; None if it is unknown
    not_before: float = 0.0  # when a worker can process the message again: see errors.JobUnfinished
    failed_at: float = 0.0  # when processing first failed in this process
    due_at: float = 0.0  # when to retry; 0 if the message was never held
    is_returned: bool = False  # nacked: a redelivery is a new message

    @property
    def key(self) -> tuple[str, str]:
        """Return the type and id of the resource. Messages with the same key are processed in order."""
        if self.notification is None:
            return "", self.delivery.id
        return self.notification.resource_type, self.notification.resource_id

    @property
    def effect(self) -> Effect:
        """Return what the message changes in Klaviyo. All resources without another effect have events."""
        kind, _ = self.key
        if kind == "customer" and self.notification is not None and self.notification.type == "ResourceDeleted":
            return Effect.DELETIONS
        return _EFFECT_OF_RESOURCE.get(kind, Effect.EVENTS)

    @property
    def is_held(self) -> bool:
        """Return whether the message is held or parked."""
        return self.outcome is not None and self.outcome.disposition in HELD


class Ended(NamedTuple):
    """A message whose delivery has ended."""

    message: Message
    ending: Ending


class EndingListener(Protocol):
    """The receiver of the endings of all deliveries. Called from several threads."""

    def on_endings(self, ended: Sequence[Ended]) -> None:
        """Process endings. An error that this method raises ends the run."""
