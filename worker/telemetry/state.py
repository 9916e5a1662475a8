"""The interface to the state of a running worker. Metrics, probes, the status page and systemd notifications use it."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


class RateLimitStatus(NamedTuple):
    """The use of a Klaviyo endpoint's rate limits."""

    burst: float  # the account's limit in requests per second
    steady: float  # the account's limit in requests per minute
    pace: float  # requests per minute that this worker can send now
    burst_used: float  # used share of the tokens, which are the requests that this worker can send without waiting
    remaining: float | None  # requests left in the account's window according to the last response; None if unknown
    waiting: int  # requests that wait for a token


class BulkEventsStatus(NamedTuple):
    """Whether events are sent in bulk."""

    in_bulk: bool
    reason: str


class WorkerState(Protocol):
    """The state of a running worker. Every method is thread-safe and returns within a second."""

    def in_flight(self) -> int:
        """Return the number of messages in flight."""

    def held(self) -> int:
        """Return the number of messages in flight that are held."""

    def oldest_age(self) -> float | None:
        """Return the seconds since the oldest message in flight was published: 0 without messages, None if unknown."""

    def lanes(self) -> int:
        """Return the number of lanes."""

    def parked_reason(self) -> str:
        """Return why the worker is parked; "" if it is not."""

    def outage_reasons(self) -> Mapping[str, str]:
        """Return the reason for the outage of each of SERVICES; "" if a service has no outage."""

    def refused_endpoints(self) -> Sequence[str]:
        """Return the reason of each endpoint that refuses the worker, while its service accepts the credentials."""

    def backlog(self) -> int | None:
        """Return the number of messages on the queue that are not settled; None if unknown."""

    def dead_letters(self) -> int | None:
        """Return the number of dead letters; None if unknown."""

    def paused_reason(self) -> str:
        """Return why pulling pauses: a service is down. "" if it does not."""

    def stall_reason(self) -> str:
        """Return why the receive loop or a lane has stopped working; "" if it has not. Outages do not stall them."""

    def is_stopping(self) -> bool:
        """Return whether the worker is stopping or has stopped."""

    def has_received(self) -> bool:
        """Return whether the queue has answered at least once."""

    def batch_sizes(self) -> Mapping[str, Sequence[int]]:
        """Return the number of messages in the current batch of each lane, by effect."""

    def rate_limit_status(self) -> Mapping[str, RateLimitStatus]:
        """Return the use of Klaviyo's rate limits by endpoint."""

    def bulk_events(self) -> BulkEventsStatus:
        """Return whether events are sent in bulk, and why."""
