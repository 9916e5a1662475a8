"""What is to be done to the subscriptions there are, so that the worker gets what it needs. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from worker.commands.subscriptions.destination import Destination, shown
from worker.commands.subscriptions.health import CONFIGURATION_ERRORS
from worker.commands.subscriptions.spec import Needs, asked_for
from worker.errors import SettingsError
from worker.json_access import as_dict, as_text

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from worker.model import Json

KEY = "klaviyo-worker"
_INDENT = " " * 4


@dataclass(frozen=True, slots=True)
class Wanted:
    """The subscription as it should be. `format` "": Platform where it is made, and whatever is there already."""

    key: str
    destination: Destination
    needs: Needs
    format: str = ""

    def draft(self) -> Json:
        """Return the body that creates it, secrets included."""
        kind = self.format or self.destination.format or "Platform"
        version = {"cloudEventsVersion": "1.0"} if kind == "CloudEvents" else {}
        return {
            "key": self.key,
            "destination": self.destination.fields,
            **self.needs.fields(),
            "format": {"type": kind} | version,
        }


@dataclass(frozen=True, slots=True)
class Plan:
    """What to do. `current` None: create it; `destination_now` "": the destination stays as it is."""

    wanted: Wanted
    current: Json | None
    added: Needs
    removed: Needs
    destination_now: str
    stale: tuple[Json, ...]

    @property
    def action(self) -> str:
        """Return create, change or none."""
        if self.current is None:
            return "create"
        return "change" if self.updates() else "none"

    def updates(self) -> list[Json]:
        """Return the update actions, for one update: a subscription must never be without any message or change."""
        if self.current is None:
            return []
        actions: list[Json] = []
        if self.destination_now:
            actions.append({"action": "changeDestination", "destination": self.wanted.destination.fields})
        if self.added or self.removed:
            fields = self.wanted.needs.fields()
            actions += [
                {"action": "setMessages", "messages": fields["messages"]},
                {"action": "setChanges", "changes": fields["changes"]},
            ]
        return actions

    def lines(self) -> Iterator[str]:
        """Yield it for people."""
        key = self.wanted.key
        if self.current is None:
            yield f"+ create subscription {key}"
        elif self.action == "change":
            yield f"~ change subscription {key}, version {self.current.get('version')}"
        else:
            yield f"= subscription {key} is as it should be"
        yield from self._details()
        for subscription in self.stale:
            yield f"- stale: {name_of(subscription)} sends to the same destination; --delete-stale deletes it"

    def _details(self) -> Iterator[str]:
        if self.destination_now and self.current is not None:
            yield f"{_INDENT}- destination  {self.destination_now}"
        if self.destination_now:
            yield f"{_INDENT}+ destination  {self.wanted.destination.name}"
        elif self.wanted.destination.secrets:
            yield f"{_INDENT}? its secret cannot be compared, as commercetools hides it; --renew sends it again"
        if self.current is None:
            yield f"{_INDENT}+ format       {self.wanted.draft()['format']['type']}"
        for sign, difference in (("-", self.removed), ("+", self.added)):
            for resource, types in difference.messages.items():
                yield f"{_INDENT}{sign} messages     {resource}: {', '.join(types) or 'all others'}"
            if difference.changes:
                yield f"{_INDENT}{sign} changes      {', '.join(difference.changes)}"

    def document(self) -> Json:
        """Return it for scripts."""
        return {
            "key": self.wanted.key,
            "action": self.action,
            "version": self.current and self.current.get("version"),
            "destination": {"now": self.destination_now or None, "wanted": self.wanted.destination.name},
            "add": self.added.fields(),
            "remove": self.removed.fields(),
            "stale": [{"id": as_text(entry.get("id")), "key": as_text(entry.get("key"))} for entry in self.stale],
        }


def plan(wanted: Wanted, existing: Sequence[Json], *, renew: bool = False) -> Plan:
    """Compare what is wanted with all subscriptions of the project.

    A destination's secret cannot be compared, as commercetools hides it: `renew` sends it again. So does a status
    that says that commercetools cannot deliver. Stale is another subscription to the same destination; not on
    EventBridge, where each has an event source of its own. Raises SettingsError for a format that cannot be had.
    """
    current = next((entry for entry in existing if as_text(entry.get("key")) == wanted.key), None)
    others = [entry for entry in existing if entry is not current]
    stale = tuple(entry for entry in others if _sends_there(entry, wanted.destination))
    if current is None:
        return Plan(wanted, None, wanted.needs, Needs({}, ()), "nowhere", stale)
    _check_format(wanted, current)
    now, asked = shown(as_dict(current.get("destination"))), asked_for(current)
    is_broken = as_text(current.get("status")) in CONFIGURATION_ERRORS
    moves = renew or is_broken or now != wanted.destination.name
    return Plan(wanted, current, wanted.needs.without(asked), asked.without(wanted.needs), now if moves else "", stale)


def name_of(subscription: Json) -> str:
    """Return what people find a subscription by."""
    return as_text(subscription.get("key")) or f"the one without a key, id {as_text(subscription.get('id'))[:64]}"


def _sends_there(subscription: Json, destination: Destination) -> bool:
    fields = as_dict(subscription.get("destination"))
    return fields.get("type") != "EventBridge" and shown(fields) == destination.name


def _check_format(wanted: Wanted, current: Json) -> None:
    asked = wanted.format or wanted.destination.format
    has = as_text(as_dict(current.get("format")).get("type")) or "Platform"
    if asked and asked != has:
        raise SettingsError(
            f"subscription {wanted.key} has the format {has}, which commercetools cannot change to {asked}: "
            "use another --key, and delete this one once that one is healthy"
        )
