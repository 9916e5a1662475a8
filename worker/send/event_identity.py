"""The identifiers with which an event is sent, so that no event moves an email address from one profile to another.

Klaviyo updates the profile of an event with the identifiers in it. An event with the id of one customer and the email
address of another one would therefore give one person's address, or id, to the other one's profile. commercetools can
hold such a pair: two stores can have a customer with the same address, and a shopper can register with an address that
is not confirmed. So the profiles of a batch are read first (docs/decisions/0035-whose-event.md).
"""

from __future__ import annotations

from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field, replace
from threading import Lock
from typing import TYPE_CHECKING, NamedTuple

import cachetools

from worker.errors import EndpointRefused, Rejected, WorkerError
from worker.json_access import as_text
from worker.model import Operation, OperationKind
from worker.send.identifiers import drop_identifier
from worker.send.profile_directory import identifier, read_profiles

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from worker.klaviyo.client import KlaviyoClient
    from worker.send.profile_directory import Profile

_CACHE_SIZE = 50_000
_CACHE_SECONDS = 300.0


class Identified(NamedTuple):
    """An operation as it can be sent, or the error that prevents sending it."""

    operation: Operation
    error: WorkerError | None = None
    requests: int = 0  # sent to Klaviyo to identify the person


class EventIdentities:
    """Decides the identifiers of events that name a customer by id and email address. Safe for many threads.

    - If a profile has the customer's id, the id is sent alone. The customer's own messages write the address.
    - If the address belongs to the profile of another customer, the id is sent alone, too.
    - Otherwise both are sent. Klaviyo then creates the profile, or adds the id to the profile of a guest.

    It remembers for a while which customers have a profile, and which address was sent for which customer, in an event
    or by the customer's own message: Klaviyo shows a new profile some time after it accepted it.
    """

    def __init__(self, client: KlaviyoClient) -> None:
        self._client = client
        self._lock = Lock()
        self._known: cachetools.TTLCache[str, bool] = cachetools.TTLCache(_CACHE_SIZE, _CACHE_SECONDS)
        self._sent_emails: cachetools.TTLCache[str, str] = cachetools.TTLCache(_CACHE_SIZE, _CACHE_SECONDS)
        self._sent_customers: cachetools.TTLCache[str, str] = cachetools.TTLCache(_CACHE_SIZE, _CACHE_SECONDS)

    def identify(self, operations: Sequence[Operation]) -> list[Identified]:
        """Return the operations in the same order, each as it can be sent, or with an error.

        If Klaviyo does not let the worker read profiles (the scope profiles:read is missing), both identifiers are
        sent. They also are if Klaviyo does not accept one of them in a filter.
        """
        people = [_person_of(operation) for operation in operations]
        distinct = list(dict.fromkeys(filter(None, people)))
        reading = self._read(distinct)
        self._choose(distinct, reading)
        return [
            _identified(operation, person, reading) if person else Identified(operation)
            for operation, person in zip(operations, people, strict=True)
        ]

    def remember(self, written: Iterable[Operation]) -> None:
        """Remember the customers whose profiles were written, and their email addresses."""
        people = [(each.key, as_text(each.resource["attributes"].get("email"))) for each in written if each.resource]
        with self._lock:
            for customer, email in people:
                address = identifier("email", email)[1]
                self._sent_emails[customer] = address
                self._sent_customers.setdefault(address, customer)

    def _choose(self, people: Iterable[_Person], reading: _Reading) -> None:
        """Choose the people whose events have the email address, and remember them."""
        with self._lock:
            for person in people:
                if person.customer not in reading.errors and self._is_free(person, reading):
                    self._sent_emails[person.customer] = person.email
                    self._sent_customers[person.email] = person.customer
                    reading.with_email.add(person)

    def _is_free(self, person: _Person, reading: _Reading) -> bool:
        """Return whether the event can have the email address. The caller holds the lock."""
        return (
            person.customer not in self._known
            and reading.customers_of.get(person.email, person.customer) == person.customer
            and self._sent_customers.get(person.email, person.customer) == person.customer
            and self._sent_emails.get(person.customer, person.email) == person.email
        )

    def _read(self, people: Iterable[_Person]) -> _Reading:
        """Read the profiles of customers who are not known to have one, and of their email addresses."""
        reading = _Reading()
        with self._lock:
            unknown = [person for person in people if person.customer not in self._known]
        with suppress(EndpointRefused):
            own = self._look_up("external_id", {person.customer: person for person in unknown}, reading)
            with self._lock:
                self._known.update(dict.fromkeys((profile.get("external_id") for profile in own), True))
                unknown = [person for person in unknown if person.customer not in self._known]
            by_email = {person.email: person for person in unknown if person.customer not in reading.errors}
            for profile in self._look_up("email", by_email, reading):
                if customer := profile.get("external_id"):
                    reading.customers_of[identifier("email", profile.get("email"))[1]] = customer
        return reading

    def _look_up(self, name: str, people: Mapping[str, _Person], reading: _Reading) -> Sequence[Profile]:
        """Return the profiles with these identifiers. Add requests and errors to the reading.

        Raises EndpointRefused if the scope profiles:read is missing.
        """
        if not people:
            return ()
        try:
            profiles, failures = read_profiles(self._client, name, people, fields=("external_id", "email"))
        except EndpointRefused:
            raise
        except WorkerError as error:
            profiles, failures = [], {identifier(name, value): error for value in people}
        for value, person in people.items():
            reading.requests[person.customer] += 1
            failure = failures.get(identifier(name, value))
            if failure and not isinstance(failure, Rejected):
                reading.errors[person.customer] = failure
        return profiles


class _Person(NamedTuple):
    """The customer of an event."""

    customer: str  # commercetools' id: the external_id
    email: str  # in lower case


@dataclass(slots=True)
class _Reading:
    """The profiles of the people of a batch, as Klaviyo shows them."""

    customers_of: dict[str, str] = field(default_factory=dict)  # email -> external_id of the profile that has it
    requests: Counter[str] = field(default_factory=Counter)  # by customer
    errors: dict[str, WorkerError] = field(default_factory=dict)  # by customer
    with_email: set[_Person] = field(default_factory=set)  # people whose events have both identifiers


def _identified(operation: Operation, person: _Person, reading: _Reading) -> Identified:
    requests = reading.requests.pop(person.customer, 0)  # the first event of the person counts them
    if error := reading.errors.get(person.customer):
        return Identified(operation, error, requests)
    return Identified(operation if person in reading.with_email else _without_email(operation), None, requests)


def _person_of(operation: Operation) -> _Person | None:
    """Return the person of an event with the id and the email address of a customer; None for other operations."""
    if operation.kind is not OperationKind.CREATE_EVENT or operation.resource is None:
        return None
    attributes = operation.resource["attributes"]["profile"]["data"]["attributes"]
    customer, email = as_text(attributes.get("external_id")), as_text(attributes.get("email"))
    return _Person(customer, identifier("email", email)[1]) if customer and email else None


def _without_email(operation: Operation) -> Operation:
    assert operation.resource is not None
    return replace(operation, resource=drop_identifier(operation.resource, "email"))
