"""A plan: the difference between the existing subscriptions and the desired one. Pure functions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from worker.commands.subscriptions.destination import Destination, display_name
from worker.commands.subscriptions.health import CONFIGURATION_ERRORS
from worker.commands.subscriptions.spec import SubscriptionSpec, spec_of
from worker.errors import SettingsError
from worker.json_access import as_dict, as_text

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from worker.model import Json

KEY = "klaviyo-worker"
_INDENT = " " * 4


@dataclass(frozen=True, slots=True)
class DesiredSubscription:
    """The subscription as it should be. `format` "": the existing format, or Platform for a new subscription."""

    key: str
    destination: Destination
    spec: SubscriptionSpec
    format: str = ""

    def draft(self) -> Json:
        """Return the body that creates the subscription, with secrets."""
        kind = self.format or self.destination.format or "Platform"
        version = {"cloudEventsVersion": "1.0"} if kind == "CloudEvents" else {}
        return {
            "key": self.key,
            "destination": self.destination.fields,
            **self.spec.fields(),
            "format": {"type": kind} | version,
        }


@dataclass(frozen=True, slots=True)
class Plan:
    """The changes to make.

    `current`: the existing subscription, or None if it must be created. `old_destination`: the destination to
    replace, or "" to keep it. `added`: the messages and changes to request in addition. `removed`: those to request no
    longer. `stale`: other subscriptions with the same destination.
    """

    desired: DesiredSubscription
    current: Json | None
    added: SubscriptionSpec
    removed: SubscriptionSpec
    old_destination: str
    stale: tuple[Json, ...]

    @property
    def action(self) -> str:
        """Return create, change or none."""
        if self.current is None:
            return "create"
        return "change" if self.updates() else "none"

    def updates(self) -> list[Json]:
        """Return the update actions.

        Messages and changes are always set together, because commercetools rejects a subscription that has neither.
        """
        if self.current is None:
            return []
        actions: list[Json] = []
        if self.old_destination:
            actions.append({"action": "changeDestination", "destination": self.desired.destination.fields})
        if self.added or self.removed:
            fields = self.desired.spec.fields()
            actions += [
                {"action": "setMessages", "messages": fields["messages"]},
                {"action": "setChanges", "changes": fields["changes"]},
            ]
        return actions

    def lines(self) -> Iterator[str]:
        """Yield the plan as text for people."""
        key = self.desired.key
        if self.current is None:
            yield f"+ create subscription {key}"
        elif self.action == "change":
            yield f"~ change subscription {key}, version {self.current.get('version')}"
        else:
            yield f"= subscription {key} is up to date"
        yield from self._details()
        for subscription in self.stale:
            yield f"- stale: {name_of(subscription)} sends to the same destination; --delete-stale deletes it"

    def _details(self) -> Iterator[str]:
        if self.old_destination and self.current is not None:
            yield f"{_INDENT}- destination  {self.old_destination}"
        if self.old_destination:
            yield f"{_INDENT}+ destination  {self.desired.destination.name}"
        elif self.desired.destination.secrets:
            yield f"{_INDENT}? the secret cannot be compared because commercetools hides it; --renew sends it again"
        if self.current is None:
            yield f"{_INDENT}+ format       {self.desired.draft()['format']['type']}"
        for sign, difference in (("-", self.removed), ("+", self.added)):
            for resource, types in difference.messages.items():
                yield f"{_INDENT}{sign} messages     {resource}: {', '.join(types) or 'all others'}"
            if difference.changes:
                yield f"{_INDENT}{sign} changes      {', '.join(difference.changes)}"

    def document(self) -> Json:
        """Return the plan as JSON for scripts."""
        return {
            "key": self.desired.key,
            "action": self.action,
            "version": self.current and self.current.get("version"),
            "destination": {"now": self.old_destination or None, "wanted": self.desired.destination.name},
            "add": self.added.fields(),
            "remove": self.removed.fields(),
            "stale": [{"id": as_text(entry.get("id")), "key": as_text(entry.get("key"))} for entry in self.stale],
        }


def plan(desired: DesiredSubscription, existing: Sequence[Json], *, renew: bool = False) -> Plan:
    """Compare the desired subscription with all subscriptions of the project.

    A destination's secret cannot be compared. The destination is therefore also sent again if `renew` is set, or if the
    status is a configuration error. Raises SettingsError if the format would have to change.
    """
    current = next((entry for entry in existing if as_text(entry.get("key")) == desired.key), None)
    others = [entry for entry in existing if entry is not current]
    stale = tuple(entry for entry in others if _has_destination(entry, desired.destination))
    if current is None:
        return Plan(desired, None, desired.spec, SubscriptionSpec({}, ()), "none", stale)
    _check_format(desired, current)
    destination = display_name(as_dict(current.get("destination")))
    spec = spec_of(current)
    is_broken = as_text(current.get("status")) in CONFIGURATION_ERRORS
    moves = renew or is_broken or destination != desired.destination.name
    old_destination = destination if moves else ""
    return Plan(desired, current, desired.spec.minus(spec), spec.minus(desired.spec), old_destination, stale)


def name_of(subscription: Json) -> str:
    """Return the key of a subscription, or its id if it has none."""
    return (
        as_text(subscription.get("key")) or f"a subscription without a key, id {as_text(subscription.get('id'))[:64]}"
    )


def _has_destination(subscription: Json, destination: Destination) -> bool:
    """Return whether the subscription has this destination. False on EventBridge: each has its own event source."""
    fields = as_dict(subscription.get("destination"))
    return fields.get("type") != "EventBridge" and display_name(fields) == destination.name


def _check_format(desired: DesiredSubscription, current: Json) -> None:
    wanted = desired.format or desired.destination.format
    existing = as_text(as_dict(current.get("format")).get("type")) or "Platform"
    if wanted and wanted != existing:
        raise SettingsError(
            f"subscription {desired.key} has the format {existing}, which commercetools cannot change to {wanted}",
            todo="use another --key, and delete this subscription when the new one is healthy",
        )
