"""The rule for states: what the versions in a reading of commercetools prove.

A version only grows. A reading with a lower version than one that is known to exist is therefore stale, whatever the
clock says. A state in Klaviyo is current if a reading after the write shows the versions that were written
(docs/decisions/0005-current-state-and-missing-resources.md).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from worker.errors import NotShownYet, StaleRead
from worker.json_access import as_int

if TYPE_CHECKING:
    from worker.model import Json, Message, Notification, ResourceKey

READ_LAG = 5.0  # seconds since the first receipt; what commercetools does not show by then counts as gone
READ_INTERVAL = 1.0  # seconds between two readings of something that commercetools does not show yet


def version_of(resource: Json) -> int:
    """Return the version of a resource; 0 if it has none."""
    return as_int(resource.get("version")) or 0


def check_reading(message: Message, now: float) -> None:
    """Record the versions that the message's reading shows. `now` is in monotonic seconds.

    Raises StaleRead if a newer version is known to exist. Raises NotShownYet if a resource is missing, and the message
    was first received less than READ_LAG seconds ago: possibly commercetools does not show its creation yet. That also
    applies to the message of its deletion, because another worker can still read and write it.
    """
    enriched = message.enriched
    assert enriched is not None
    known = dict(message.known_versions) or _notified_version(enriched.notification)
    for key, version in enriched.versions.items():
        if version is not None and version < known.get(key, 0):
            raise StaleRead(f"commercetools shows version {version} of the {key[0]}, but it has had a later one")
    message.known_versions = known | {key: version for key, version in enriched.versions.items() if version is not None}
    waited = now - message.received_at
    if enriched.missing and waited < READ_LAG:
        remaining = READ_LAG - waited
        if enriched.notification.type.endswith(("Deleted", "Unpublished")):
            raise NotShownYet(f"commercetools does not show the {enriched.missing}: it must be read again", remaining)
        raise NotShownYet(f"commercetools does not show the {enriched.missing} yet", min(READ_INTERVAL, remaining))


def _notified_version(notification: Notification) -> dict[ResourceKey, int]:
    """Return the lowest version that the notification's resource can have. After a deletion, it has none of them."""
    # A Message's own version is always 1; https://docs.commercetools.com/api/projects/messages
    name = "resourceVersion" if notification.payload.get("notificationType") == "Message" else "version"
    version = as_int(notification.payload.get(name))
    if version is None:
        return {}
    lowest = version + 1 if notification.type.endswith("Deleted") else version
    return {(notification.resource_type, notification.resource_id): lowest}
