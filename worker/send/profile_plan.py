"""The decision for each upsert of a batch: whose profile it is, and what to write. Pure functions of what was read.

A profile belongs to one person. A write never moves an email address, a phone number or an external_id from one person
to another (docs/decisions/0037-people.md).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from worker.json_access import as_dict, as_text
from worker.model import Json, Operation, OperationKind, SendResult
from worker.send.profile_directory import Identifier, identifier
from worker.transform.profiles import CUSTOM_FIELD_NAMES, without_clears

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from worker.errors import WorkerError
    from worker.send.profile_directory import Directory, Profile

PHONE_PROPERTY = "Phone"  # a phone number that is another profile's phone_number


@dataclass(slots=True, eq=False)
class Upsert:
    """An UPSERT_PROFILE or UPSERT_GUEST operation with the state of its sending. Mutable."""

    operation: Operation
    dropped: set[str] = field(default_factory=set)  # identifiers that Klaviyo does not accept
    conflicts: int = 0  # 409 responses
    named: set[str] = field(default_factory=set)  # Klaviyo's ids of the profiles that 409 responses named
    is_blind: bool = False  # Klaviyo does not let the worker read the profile
    is_created: bool = False  # a job has created the profile
    is_single: bool = False  # the result of a job for the profile is unknown
    requests: int = 0
    result: SendResult | None = None  # None: not finished
    has_new_consent: bool = False  # the profile does not have the customer's consents
    agreed: Json = field(default_factory=dict, repr=False)  # the consents that Klaviyo has accepted, by property

    @property
    def is_guest(self) -> bool:
        """Return whether the person has no customer account."""
        return self.operation.kind is OperationKind.UPSERT_GUEST

    @property
    def attributes(self) -> Json:
        """Return the attributes that commercetools holds, None for those that it no longer has."""
        attributes: Json = (self.operation.resource or {})["attributes"]
        if self.agreed:
            attributes = attributes | {"properties": as_dict(attributes.get("properties")) | self.agreed}
        return attributes

    def get(self, name: str) -> str:
        """Return an identifier that can be written, or ""."""
        return "" if name in self.dropped else as_text(self.attributes.get(name))

    def finish(self, error: WorkerError | None = None) -> None:
        """Set the result."""
        self.result = SendResult(error, self.requests)


@dataclass(frozen=True, slots=True)
class Plan:
    """The decision for an upsert."""

    profile_id: str = ""  # Klaviyo's id; "": the profile is new
    attributes: Json = field(default_factory=dict, repr=False)  # to write; {}: nothing
    merge_from: str = ""  # id of the guest's profile that is merged into the customer's first
    is_deferred: bool = False  # another upsert of the batch must be written first
    dropped: tuple[str, ...] = ()  # identifiers that belong to another person

    @property
    def adopts(self) -> bool:
        """Return whether a profile without an external_id becomes the customer's."""
        return bool(self.profile_id) and "external_id" in self.attributes


class Planner:
    """Plans the upserts of a batch in their order. An identifier belongs to the first upsert that wants it.

    `merges_guests`: merge the profile of a guest with the customer's present email address into the customer's.
    `can_defer`: an upsert can wait until the present owner of an identifier has been written.
    """

    def __init__(
        self, directory: Directory, upserts: Sequence[Upsert], *, merges_guests: bool, can_defer: bool
    ) -> None:
        self._directory = directory
        self._merges_guests = merges_guests
        self._former = set(self._former_identifiers(upserts)) if can_defer else set()
        self._taken: set[Identifier] = set()  # by earlier upserts of the batch

    def plan(self, upsert: Upsert) -> Plan:
        """Return the plan for an upsert."""
        if upsert.is_guest:
            return self._plan_guest(upsert)
        own = self._own_profile(upsert)
        email, dropped, merge_from, target = upsert.get("email"), [], "", own
        for holder in self._others("email", email, own):
            if self._is_former(holder, "email", email):
                return Plan(is_deferred=True)
            if holder.get("external_id") or (own and not self._merges_guests):
                dropped.append("email")
            elif own:
                merge_from = holder.id
            else:
                target = holder
        if not dropped and identifier("email", email) in self._taken:
            dropped.append("email")
        if dropped:
            target, merge_from = own, ""
        return self._complete(upsert, target, merge_from, dropped)

    def _plan_guest(self, upsert: Upsert) -> Plan:
        """Return the plan for the buyer of an order. Without `any_profile`, the profile of a customer is left alone."""
        found = self._directory.find("email", upsert.get("email"))
        target = found[0] if found else None
        if customer := upsert.get("external_id"):
            return self._plan_buyer(upsert, customer, target)
        if target and target.get("external_id") and not upsert.operation.any_profile:
            return Plan(target.id)
        return self._complete(upsert, target, "", [])

    def _plan_buyer(self, upsert: Upsert, customer: str, holder: Profile | None) -> Plan:
        """Return the plan for a customer who placed an order. It moves no identifier.

        `holder` has the email address. It is left alone if it is another customer's.
        """
        own = next(iter(self._directory.find("external_id", customer)), None)
        if own is None and holder and holder.get("external_id"):
            return Plan(holder.id)
        is_own_email = own is None or (holder is not None and holder.id == own.id)
        return self._complete(upsert, own or holder, "", [] if is_own_email else ["email"])

    def _complete(self, upsert: Upsert, target: Profile | None, merge_from: str, dropped: list[str]) -> Plan:
        """Return the plan for a known target. A phone number is written only if no other profile has it."""
        phone = upsert.get("phone_number")
        holders = self._others("phone_number", phone, target)
        if any(self._is_former(holder, "phone_number", phone) for holder in holders):
            return Plan(is_deferred=True)
        if phone and (holders or identifier("phone_number", phone) in self._taken):
            dropped = [*dropped, "phone_number"]
        self._taken |= {
            identifier(name, upsert.get(name))
            for name in ("email", "phone_number")
            if upsert.get(name) and name not in dropped
        }
        wanted = wanted_attributes(upsert, dropped)
        attributes = (
            differences(target.attributes, wanted) if target else without_clears({"attributes": wanted})["attributes"]
        )
        return Plan(target.id if target else "", attributes, merge_from, dropped=tuple(dropped))

    def _own_profile(self, upsert: Upsert) -> Profile | None:
        """Return the profile with the customer's external_id; of several, the one with the customer's email."""
        found = self._directory.find("external_id", upsert.operation.key)
        email = identifier("email", upsert.get("email"))
        found.sort(key=lambda profile: identifier("email", profile.get("email")) != email)
        return found[0] if found else None

    def _others(self, name: str, value: str, own: Profile | None) -> list[Profile]:
        return [profile for profile in self._directory.find(name, value) if own is None or profile.id != own.id]

    def _is_former(self, holder: Profile, name: str, value: str) -> bool:
        return (holder.id, *identifier(name, value)) in self._former

    def _former_identifiers(self, upserts: Iterable[Upsert]) -> Iterable[tuple[str, str, str]]:
        """Yield the identifiers that a profile has, but that its customer no longer has in commercetools."""
        for upsert in upserts:
            own = None if upsert.is_guest else self._own_profile(upsert)
            for name in ("email", "phone_number") if own else ():
                assert own is not None
                held = identifier(name, own.get(name))
                if name in upsert.attributes and identifier(name, as_text(upsert.attributes[name])) != held:
                    yield own.id, *held


def wanted_attributes(upsert: Upsert, dropped: Iterable[str]) -> Json:
    """Return the attributes of an upsert without the identifiers that cannot be written.

    The phone number of another profile is kept as a property.
    """
    excluded = {*dropped, *upsert.dropped}
    wanted = {name: value for name, value in upsert.attributes.items() if name not in excluded}
    phone = as_text(upsert.attributes.get("phone_number"))
    if "phone_number" in excluded and phone:
        properties = as_dict(wanted.get("properties"))
        names = [*(properties.get(CUSTOM_FIELD_NAMES) or []), PHONE_PROPERTY]
        has_names = CUSTOM_FIELD_NAMES in properties
        wanted["properties"] = properties | {PHONE_PROPERTY: phone} | ({CUSTOM_FIELD_NAMES: names} if has_names else {})
    return wanted


def differences(current: Json, wanted: Json) -> Json:
    """Return those attributes to write that differ from Klaviyo's. None clears what Klaviyo has.

    All parts of a location that has changed are written, as Klaviyo does not document what becomes of the others.
    """
    changes = {
        name: value
        for name, value in wanted.items()
        if name not in {"location", "properties"} and not _is_same(name, current.get(name), value)
    }
    has, location = as_dict(current.get("location")), as_dict(wanted.get("location"))
    if any(not _is_same(name, has.get(name), value) for name, value in location.items()):
        changes["location"] = {n: v for n, v in location.items() if v is not None or not _is_empty(has.get(n))}
    has, properties = as_dict(current.get("properties")), as_dict(wanted.get("properties"))
    if CUSTOM_FIELD_NAMES in properties:
        properties = dict.fromkeys(_own_names(has) - _own_names(properties)) | properties
    changed = {name: value for name, value in properties.items() if not _is_same(name, has.get(name), value)}
    return changes | ({"properties": changed} if changed else {})


def _own_names(properties: Json) -> set[str]:
    """Return the names of the custom properties that the worker wrote to a profile."""
    names = properties.get(CUSTOM_FIELD_NAMES)
    return {name for name in names if isinstance(name, str)} if isinstance(names, list) else set()


def has_nulls(attributes: Json) -> bool:
    """Return whether one of the attributes, or a part of the location or the properties, is None."""
    values = (*attributes.values(), *as_dict(attributes.get("location")).values())
    return any(value is None for value in (*values, *as_dict(attributes.get("properties")).values()))


def _is_same(name: str, current: Any, wanted: Any) -> bool:
    if type(current) is type(wanted) and current == wanted:  # the usual case
        return True
    if _is_empty(current) or _is_empty(wanted):
        return _is_empty(current) and _is_empty(wanted)
    if name == "email":
        return as_text(current).lower() == as_text(wanted).lower()
    return bool(current == wanted) and isinstance(current, bool) is isinstance(wanted, bool)


def _is_empty(value: Any) -> bool:
    return value is None or (not value and isinstance(value, str | list | dict))
