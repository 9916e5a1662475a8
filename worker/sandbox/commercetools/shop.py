"""The resources of a commercetools project, and how to make them."""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from worker.sandbox.http import Json

_NAMESPACE = uuid.UUID("6f1f9b9e-5d0c-4f3e-9d3b-2b1f0c7a9e11")
CREATED = "2026-11-20T08:30:00.000Z"
_VERSION = 10  # of all resources; not lower than that of any sample notification


@dataclass
class Shop:
    """The resources in commercetools by id. `products` contains the published products only."""

    orders: dict[str, Json] = field(default_factory=dict)
    customers: dict[str, Json] = field(default_factory=dict)
    payments: dict[str, Json] = field(default_factory=dict)
    categories: dict[str, Json] = field(default_factory=dict)
    products: dict[str, Json] = field(default_factory=dict)
    inventory: dict[str, Json] = field(default_factory=dict)
    discount_codes: dict[str, Json] = field(default_factory=dict)
    standalone_prices: dict[str, Json] = field(default_factory=dict)
    carts: dict[str, Json] = field(default_factory=dict)
    states: dict[str, Json] = field(default_factory=dict)

    def collection(self, path: str) -> dict[str, Json] | None:
        """Return the resources behind a path of the HTTP API, or None."""
        names = {each.name.replace("_", "-"): each.name for each in fields(self)} | {"product-projections": "products"}
        return getattr(self, names[path]) if path in names and path != "products" else None

    def replace(self, resources: Mapping[str, Sequence[Json]]) -> None:
        """Replace the resources behind these paths of the HTTP API. Raises KeyError for an unknown path.

        A projection with `published: false` is left out, as commercetools shows it only as a staged one.
        """
        for path, shown in resources.items():
            collection = self.collection(path)
            if collection is None:
                raise KeyError(path)
            collection.clear()
            collection.update(by_id(*(each for each in shown if each.get("published", True))))

    def personal_data(self) -> set[str]:
        """Return every email, phone number, name and street, for tests that search output for them."""
        found: set[str] = set()
        for resource in [*self.customers.values(), *self.orders.values()]:
            _collect(resource, found)
        return found


_PERSONAL = {
    "email",
    "customerEmail",
    "phone",
    "mobile",
    "firstName",
    "lastName",
    "streetName",
    "companyName",
    "company",
}


def _collect(value: Any, found: set[str]) -> None:
    if isinstance(value, dict):
        found.update(v for k, v in value.items() if k in _PERSONAL and isinstance(v, str) and len(v) > 3)  # noqa: PLR2004
        for entry in value.values():
            _collect(entry, found)
    elif isinstance(value, list):
        for entry in value:
            _collect(entry, found)


def uid(name: str) -> str:
    """Return the id for a readable name such as `order:guest` or `product:jeans`."""
    return str(uuid.uuid5(_NAMESPACE, name))


def money(cents: int, currency: str = "EUR", digits: int = 2) -> Json:
    """Return an amount of the type centPrecision."""
    return {"type": "centPrecision", "currencyCode": currency, "centAmount": cents, "fractionDigits": digits}


def reference(kind: str, name: str) -> Json:
    """Return a reference to `kind:name`."""
    return {"typeId": kind, "id": uid(f"{kind}:{name}")}


def resource(kind: str, name: str, /, **fields: Any) -> Json:
    """Return a resource with the id of `kind:name`."""
    stamps = {"version": _VERSION, "createdAt": CREATED, "lastModifiedAt": CREATED}
    return {"id": uid(f"{kind}:{name}"), **stamps, **fields}


def by_id(*resources: Json) -> dict[str, Json]:
    """Return resources by their ids."""
    return {resource["id"]: resource for resource in resources}


def price(cents: int, currency: str = "EUR", digits: int = 2, **more: Any) -> Json:
    """Return a price of a variant."""
    return {"id": uid(f"price:{cents}{currency}{more}"), "value": money(cents, currency, digits), **more}


def address(name: str, first: str, last: str, street: str, city: str, country: str, **more: Any) -> Json:
    """Return an address. `name` is its id."""
    return {
        "id": name,
        "firstName": first,
        "lastName": last,
        "streetName": street,
        "streetNumber": "12",
        "postalCode": "10115",
        "city": city,
        "country": country,
        **more,
    }
