"""Failures to receive: their backoff, their log event, and the detection of a lasting refusal."""

from __future__ import annotations

import logging
import time

MIN_BACKOFF, MAX_BACKOFF = 0.5, 10.0  # seconds before receiving is retried
REFUSAL_TIMEOUT = 60.0  # seconds for which a refusal counts as transient: new permissions take effect with a delay


class ReceiveFailures:
    """The consecutive failures of one receiver."""

    def __init__(self, adapter: str) -> None:
        self._adapter = adapter
        self._log = logging.getLogger(f"klaviyo_worker.{adapter}")
        self.reset()

    def reset(self) -> None:
        """Forget all failures, because the queue has answered."""
        self._backoff = MIN_BACKOFF
        self._refused_since: float | None = None  # monotonic seconds
        self._refusal = ""

    def add_refusal(self, reason: str) -> None:
        """Record that the queue refused to deliver."""
        self._refusal = reason
        self._refused_since = self._refused_since or time.monotonic()

    def lasting_refusal(self) -> str:
        """Return the last refusal if the queue has refused for more than `REFUSAL_TIMEOUT` seconds, else ""."""
        since = self._refused_since
        return self._refusal if since is not None and time.monotonic() - since > REFUSAL_TIMEOUT else ""

    def back_off(self, error: str, reason: str) -> float:
        """Log a failure and return the seconds to wait before the retry."""
        backoff = self._backoff
        fields = {"adapter": self._adapter, "error": error, "reason": reason, "retry_in_s": backoff}
        self._log.warning("receive_failed", extra=fields)
        self._backoff = min(backoff * 2, MAX_BACKOFF)
        return backoff
