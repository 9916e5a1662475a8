"""What the status of a subscription means, and what to do about it.

https://docs.commercetools.com/api/projects/subscriptions#subscriptionhealthstatus
"""

from __future__ import annotations

HEALTHY = "Healthy"
DELIVERS = frozenset({HEALTHY, ""})  # "": commercetools does not tell
CONFIGURATION_ERRORS = frozenset({"ConfigurationError", "ConfigurationErrorDeliveryStopped"})
_MEND = "look at the queue and at commercetools' right to send to it, then klaviyo-worker subscriptions apply"
_MEANING = {
    HEALTHY: ("it delivers", ""),
    "TemporaryError": ("the queue does not answer commercetools", "wait, it goes on by itself when the queue is back"),
    "ConfigurationError": (
        "queue, right or key are gone; what happens meanwhile is kept for a time and delivered later",
        _MEND,
    ),
    "ConfigurationErrorDeliveryStopped": (
        "queue, right or key were gone for too long; nothing is kept any more, what happens meanwhile is lost",
        _MEND,
    ),
    "ManuallySuspended": ("commercetools stopped it, as it went on and off", "ask commercetools' support to lift it"),
}


def explain(status: str) -> tuple[str, str]:
    """Return what a status means and what to do about it; "" where there is nothing to do."""
    unknown = ("not known to this version", "look it up in commercetools' documentation of subscriptions")
    meaning, todo = _MEANING.get(status, unknown)
    return f"{status[:64] or 'no status'}: {meaning}", todo
