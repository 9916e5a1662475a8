"""The health statuses of a subscription: what each means, and what to do about it.

https://docs.commercetools.com/api/projects/subscriptions#subscriptionhealthstatus
"""

from __future__ import annotations

HEALTHY = "Healthy"
DELIVERING = frozenset({HEALTHY, ""})  # "": commercetools does not report health
CONFIGURATION_ERRORS = frozenset({"ConfigurationError", "ConfigurationErrorDeliveryStopped"})
_FIX = "check the queue and commercetools' permission to send to it, then run klaviyo-worker subscriptions apply"
_MEANING = {
    HEALTHY: ("commercetools delivers notifications", ""),
    "TemporaryError": (
        "commercetools cannot reach the queue at the moment",
        "wait, delivery resumes when the queue is available again",
    ),
    "ConfigurationError": (
        "the queue, the permission or the key is missing; commercetools stores notifications for a limited time",
        _FIX,
    ),
    "ConfigurationErrorDeliveryStopped": (
        "the queue, the permission or the key was missing for too long; notifications are lost from now on",
        _FIX,
    ),
    "ManuallySuspended": (
        "commercetools suspended delivery because it failed and recovered repeatedly",
        "ask commercetools' support to lift the suspension",
    ),
}


def explain_status(status: str) -> tuple[str, str]:
    """Return what a status means and what to do about it; "" if there is nothing to do."""
    unknown = ("this version does not know the status", "look it up in commercetools' documentation of subscriptions")
    meaning, todo = _MEANING.get(status, unknown)
    return f"{status[:64] or 'no status'}: {meaning}", todo
