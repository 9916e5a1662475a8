"""The budget of one message: what is beyond it becomes a dead letter, at a cost that is proportional to its bytes.

The limits are above everything that commercetools and the queues allow: https://docs.commercetools.com/api/limits.
docs/decisions/0027-budget-per-message.md gives the reasons.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from worker.errors import Rejected

if TYPE_CHECKING:
    from collections.abc import Collection

    from worker.model import Json

MAX_BYTES = 10 * 1024 * 1024  # of a body; Pub/Sub has the highest limit of the queues, 10 MB
MAX_VALUES = 500_000  # JSON values in a body; each takes up to 250 bytes of memory
MAX_LINES = 1_000  # line items and custom line items of an order; commercetools allows 500 line items
MAX_CATEGORIES = 1_000  # of a product; each event of an order names the categories of its products
MAX_REFUNDS = 100  # refunds in one message; each becomes an event with all properties of the order
MAX_COPIES = 100  # parcels or returns in one message; each becomes an event with all properties of the order
MAX_PATHS = 20  # of truncated properties that an operation and a log line name
MAX_PATH_LENGTH = 200  # characters
MORE = "…"  # in place of the paths that are not named
MAX_LOOKUPS = 10_000  # ids of one query for one message; commercetools allows 10,000 categories in a project


def check_bytes(body: bytes) -> None:
    """Raise Rejected if a body has too many bytes."""
    _check(len(body), MAX_BYTES, "the message", "bytes")


def check_values(text: bytes) -> None:
    """Raise Rejected if a JSON text can have too many values.

    This counts the characters that can precede a value, also those in strings, without decoding the text.
    """
    if len(text) > MAX_VALUES:  # a value takes at least one byte
        _check(sum(map(text.count, (b",", b"[", b"{"))), MAX_VALUES, "the message", "values")


def check_lines(order: Json) -> None:
    """Raise Rejected if an order has too many lines."""
    lines = (order.get("lineItems"), order.get("customLineItems"))
    _check(sum(len(part) for part in lines if isinstance(part, list)), MAX_LINES, "the order", "lines")


def check_categories(categories: int) -> None:
    """Raise Rejected if a product has too many categories."""
    _check(categories, MAX_CATEGORIES, "the product", "categories")


def check_refunds(refunds: int) -> None:
    """Raise Rejected if a message has too many refunds."""
    _check(refunds, MAX_REFUNDS, "the payment", "refunds")


def check_copies(events: int) -> None:
    """Raise Rejected if a message has too many parcels or returns."""
    _check(events, MAX_COPIES, "the order", "parcels or returns")


def check_returned_items(items: int) -> None:
    """Raise Rejected if a return has too many items. It can have as many as an order has lines."""
    _check(items, MAX_LINES, "the return", "items")


def check_lookups(ids: int) -> None:
    """Raise Rejected if a message needs too many other resources."""
    _check(ids, MAX_LOOKUPS, "the message", "ids to look up")


def limit_paths(paths: Collection[str]) -> list[str]:
    """Return at most MAX_PATHS paths, and MORE after them if there are more."""
    shown = [path for path in paths if path != MORE][:MAX_PATHS]
    return shown + [MORE] * (len(shown) < len(paths))


def _check(found: int, limit: int, what: str, unit: str) -> None:
    if found > limit:
        raise Rejected(f"{what} has {found:,} {unit}: expected at most {limit:,} (the budget of a message)")
