"""An estimate of this process's share of the calls to an endpoint."""

from __future__ import annotations

import math

INITIAL_SHARE = 1 / 4  # before responses show how many calls other processes make
MIN_SHARE = 1 / 16  # of one observation
FAIRNESS_EXPONENT = 0.8  # below 1, so that a process with a small share gains on one with a large share


class ShareEstimator:
    """This process's share of the account's calls, as a weighted average of observations."""

    def __init__(self) -> None:
        self._own_calls = 1.0
        self._account_calls = 1 / INITIAL_SHARE  # of all processes, while this one made its own

    def observe(self, account_calls: float, memory: float) -> None:
        """Count one own call, and the calls of all processes since the previous own call.

        `memory`: the number of own calls that the average covers. More than 1 / MIN_SHARE calls count as 1 / MIN_SHARE,
        because many calls can also mean that this process was idle.
        """
        kept = 1 - 1 / memory
        self._own_calls = self._own_calls * kept + 1
        self._account_calls = self._account_calls * kept + min(account_calls, 1 / MIN_SHARE)

    def share(self) -> float:
        """Return the part of the account's calls that this process can make, from 0 to 1."""
        return math.pow(self._own_calls / max(self._own_calls, self._account_calls), FAIRNESS_EXPONENT)
