"""An estimate of this process's share of the requests to an endpoint."""

from __future__ import annotations

import math

INITIAL_SHARE = 1 / 4  # used until responses show how many requests other processes send
MIN_SHARE = 1 / 16  # the smallest share that a single observation can show
FAIRNESS_EXPONENT = 0.8  # below 1: shares converge, because it raises small shares more than large ones


class ShareEstimator:
    """This process's share of the account's requests, as a weighted average of observations."""

    def __init__(self) -> None:
        self._own_requests = 1.0
        self._account_requests = 1 / INITIAL_SHARE  # requests of all processes in the same time

    def observe(self, account_requests: float, memory: float) -> None:
        """Count one request of this process. `account_requests` is the number that all processes sent since the last.

        `memory` is the number of own requests that the average covers. More than 1 / MIN_SHARE account requests count
        as 1 / MIN_SHARE, because a high number can also mean that this process was idle.
        """
        kept = 1 - 1 / memory
        self._own_requests = self._own_requests * kept + 1
        self._account_requests = self._account_requests * kept + min(account_requests, 1 / MIN_SHARE)

    def share(self) -> float:
        """Return the share of the account's requests that this process can send, from 0 to 1."""
        return math.pow(self._own_requests / max(self._own_requests, self._account_requests), FAIRNESS_EXPONENT)
