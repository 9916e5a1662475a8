"""The policies that a subscription needs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adapters.base import QueueWarning

if TYPE_CHECKING:
    from collections.abc import Iterator

    from google.pubsub_v1.types import Subscription

SET_DEAD_LETTER_TOPIC = "gcloud pubsub subscriptions update {} --dead-letter-topic=TOPIC --max-delivery-attempts=10"
_SET_RETRY = "gcloud pubsub subscriptions update {} --min-retry-delay=10s --max-retry-delay=600s"


def policy_warnings(subscription: Subscription, lease_seconds: int) -> Iterator[QueueWarning]:
    """Yield a warning for each deficiency of the subscription, with the command that fixes it."""
    name = subscription.name
    if not subscription.dead_letter_policy.dead_letter_topic:
        reason = f"{name} has no dead-letter policy, so Pub/Sub redelivers failed messages indefinitely"
        yield QueueWarning(reason, SET_DEAD_LETTER_TOPIC.format(name), is_missing_policy=True)
    if "retry_policy" not in subscription:
        reason = f"{name} has no retry policy, so Pub/Sub redelivers failed messages immediately"
        yield QueueWarning(reason, _SET_RETRY.format(name), is_missing_policy=True)
    if subscription.ack_deadline_seconds < lease_seconds:
        deadline = f"an ack deadline of {subscription.ack_deadline_seconds} s"
        reason = f"{name} has {deadline}, shorter than the {lease_seconds} s for which messages are leased"
        yield QueueWarning(reason, f"gcloud pubsub subscriptions update {name} --ack-deadline={lease_seconds}")
