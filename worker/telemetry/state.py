"""What a running worker reports of itself: read by metrics, probes, the status page and systemd."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


class RateLimitStatus(NamedTuple):
    """How an endpoint's limits are used now."""

    burst: float  # the account's calls per second, as its steady ones per minute
    steady: float
    pace: float  # calls per minute that this worker may make now
    burst_used: float  # share of the calls that it may make at once
    remaining: float | None  # calls of the account's window, as the last answer said; None: no window is known
    waiting: int  # calls


class WorkerState(Protocol):
    """What a running worker tells about itself, at every scrape and probe: from any thread, within a second."""

    def in_flight(self) -> int:
        """Count the messages received and not yet settled."""

    def held(self) -> int:
        """Count those of them that are held because they could not be handled yet."""

    def oldest_age(self) -> float | None:
        """Return how many seconds ago the oldest message in flight was published: 0 if none is, None if unknown."""

    def lanes(self) -> int:
        """Count the lanes."""

    def parked_reason(self) -> str:
        """Return why the worker is not allowed to work; "" when it is."""

    def outage_reasons(self) -> Mapping[str, str]:
        """Return for each of SERVICES why it cannot answer; "" when it can."""

    def backlog(self) -> int | None:
        """Count the messages in the queue; None when it cannot tell."""

    def dead_letters(self) -> int | None:
        """Count the dead letters; None when the queue cannot tell."""

    def is_alive(self) -> bool:
        """Tell whether the pull loop went round lately, whatever Klaviyo does."""

    def is_stopping(self) -> bool:
        """Tell whether the worker was asked to stop."""

    def has_polled(self) -> bool:
        """Tell whether the receive loop has come round."""

    def batch_sizes(self) -> Mapping[str, Sequence[int]]:
        """Count the messages that each lane handles now, by what lanes are for."""

    def rate_limit_status(self) -> Mapping[str, RateLimitStatus]:
        """Return how Klaviyo's limits stand, by endpoint."""
