"""The table of guarantees in docs/adapters.md; the contract tests assert them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.rigs import RIGS, rig_type

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.rigs.base import Guarantees

_IMMEDIATE = {"always": "always", "direct mode": "with `KLAVIYO_WORKER_DEAD_LETTER_MODE=direct`"}
_ROWS: dict[str, Callable[[Guarantees], str]] = {
    "order": lambda queue: "oldest first" if queue.in_order else "none",
    "lease, extended while a message is held": lambda queue: (
        "the queue's own" if queue.lease_seconds is None else _seconds(queue.lease_seconds)
    ),
    "a nack without a failure (shutdown, dry run)": lambda queue: (
        "uses no attempt" if not queue.unhandled_counts_as_attempt else "uses an attempt"
    ),
    "maximum delay of a nack": lambda queue: _seconds(queue.max_delay),
    "immediate dead-lettering, with the reason": lambda queue: _IMMEDIATE[queue.dead_letter],
    "last reason of a message that the queue itself dead-letters": lambda queue: (
        "with the dead letter" if queue.keeps_last_reason else "only in the log"
    ),
    "reported backlog": lambda queue: {"returned": "only messages that this worker returned"}.get(
        queue.backlog, queue.backlog
    ),
    "maximum message size": lambda queue: _size(queue.max_message_bytes),
    "bodies": lambda queue: "any bytes" if queue.any_bytes else "text",
}


def lines() -> Iterator[str]:
    """Yield the table in Markdown."""
    yield f"| | {' | '.join(f'`{name}://`' for name in RIGS)} |"
    yield "|---" * (len(RIGS) + 1) + "|"
    for title, cell in _ROWS.items():
        yield f"| {title} | {' | '.join(cell(rig_type(name).guarantees) for name in RIGS)} |"


def _seconds(seconds: float) -> str:
    return "any" if seconds == float("inf") else f"{seconds:,.0f} s"


def _size(size: int) -> str:
    return f"{size / 1_000_000:g} MB" if size % 1_000_000 == 0 else f"{size / 1024:,.0f} KiB"
