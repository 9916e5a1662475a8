"""The state of a running worker, as metrics, probes, the status page and systemd read it."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


class RateLimitStatus(NamedTuple):
    """The use of a Klaviyo endpoint's rate limits."""

    burst: float  # the account's limit in calls per second
    steady: float  # the account's limit in calls per minute
    pace: float  # calls per minute that this worker can make now
    burst_used: float  # used share of the calls that this worker can make at once
    remaining: float | None  # calls in the account's window according to the last response; None if unknown
    waiting: int  # calls that wait for a token


class WorkerState(Protocol):
    """The state of a running worker. Any thread can call every method; each returns within a second."""

    def in_flight(self) -> int:
        """Count the messages that are received and not settled."""

    def held(self) -> int:
        """Count the messages in flight that are held or parked."""

    def oldest_age(self) -> float | None:
        """Return the seconds since the oldest message in flight was published: 0 without messages, None if unknown."""

    def lanes(self) -> int:
        """Count the lanes."""

    def parked_reason(self) -> str:
        """Return why the worker is parked; "" if it is not."""

    def outage_reasons(self) -> Mapping[str, str]:
        """Return the reason of the outage of each of SERVICES; "" if there is none."""

    def backlog(self) -> int | None:
        """Count the messages in the queue; None if unknown."""

    def dead_letters(self) -> int | None:
        """Count the dead letters; None if unknown."""

    def is_alive(self) -> bool:
        """Return whether the receive loop runs. Outages of Klaviyo do not affect it."""

    def is_stopping(self) -> bool:
        """Return whether the worker stops."""

    def has_received(self) -> bool:
        """Return whether the queue has answered at least once."""

    def batch_sizes(self) -> Mapping[str, Sequence[int]]:
        """Return the number of messages in the current batch of each lane, by lane group."""

    def rate_limit_status(self) -> Mapping[str, RateLimitStatus]:
        """Return the use of Klaviyo's rate limits by endpoint."""
