"""Klaviyo's validation of request bodies: names, types and documented limits."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import orjson
import phonenumbers

MB, KB = 1_000_000, 1_000
MAX_PROPERTIES, MAX_ARRAY, MAX_DEPTH = 400, 4_000, 10
MAX_TEXT, MAX_PROFILE = 100 * KB, 100 * KB
MAX_METRIC_NAME = 128
MAX_EMAIL, MAX_EXTERNAL_ID = 100, 255

IDENTIFIERS = ("email", "phone_number", "external_id", "anonymous_id", "_kx")
_PROFILE: dict[str, type] = {
    **dict.fromkeys(("email", "phone_number", "external_id", "_kx", "first_name"), str),
    **dict.fromkeys(("last_name", "organization", "locale", "title", "image"), str),
    "location": dict,
    "properties": dict,
}
_EVENT_PROFILE = _PROFILE | {"anonymous_id": str, "meta": dict}
_LOCATION = frozenset(
    {"address1", "address2", "city", "country", "latitude", "longitude", "region", "zip", "timezone", "ip"}
)
_EVENT: dict[str, type] = {
    "properties": dict,
    "time": str,
    "value": float,
    "value_currency": str,
    "unique_id": str,
    "backfill": bool,
    "metric": dict,
    "profile": dict,
}
_BULK_EVENT = {name: kind for name, kind in _EVENT.items() if name != "profile"}
BULK_ENTRY: dict[str, type] = {"profile": dict, "events": dict, "backfill": bool}
_COMMON: dict[str, type] = {
    "external_id": str,
    "integration_type": str,
    "catalog_type": str,
    "title": str,
    "description": str,
    "url": str,
    "image_full_url": str,
    "image_thumbnail_url": str,
    "images": list,
    "price": float,
    "custom_metadata": dict,
    "published": bool,
}
CATALOG: dict[str, dict[str, type]] = {
    "catalog-item": _COMMON,
    "catalog-variant": _COMMON | {"sku": str, "inventory_policy": int, "inventory_quantity": float},
    "catalog-category": {"external_id": str, "name": str, "integration_type": str, "catalog_type": str},
}
REQUIRED = {
    "catalog-item": ("external_id", "title", "description", "url"),
    "catalog-variant": ("external_id", "title", "description", "sku", "inventory_quantity", "price", "url"),
    "catalog-category": ("external_id", "name"),
}
_CREATE_ONLY = ("external_id", "integration_type", "catalog_type")
_EMAIL = re.compile(r"[^@\s]+@[^@\s]+\.[^@\s]+")
_CURRENCY = re.compile(r"[A-Z]{3}")
_TIME = re.compile(r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d(\.\d+)?(Z|[+-]\d\d:\d\d)")


@dataclass
class ApiError(Exception):
    """An error response with Klaviyo's wording."""

    status: int
    code: str
    detail: str
    pointer: str = ""
    meta: dict[str, Any] | None = None

    def document(self) -> Any:
        """Return the error document."""
        source = {"pointer": self.pointer} if self.pointer else {}
        error = {"id": "sandbox", "status": self.status, "code": self.code, "title": _title(self.status)}
        return {"errors": [{**error, "detail": self.detail, "source": source, "meta": self.meta or {}}]}


def _title(status: int) -> str:
    titles = {400: "Invalid input.", 401: "Incorrect authentication credentials.", 404: "Not found."}
    return titles.get(status, "Conflict." if status == 409 else "Error.")  # noqa: PLR2004


def invalid_input(detail: str, pointer: str = "/data") -> ApiError:
    """Return an error with status 400."""
    return ApiError(400, "invalid", detail, pointer)


def require_resource(document: Any, kind: str, pointer: str = "/data", *, bare: bool = False) -> dict[str, Any]:
    """Return the JSON:API object of this type. `bare`: attributes are optional. Raises ApiError."""
    data = document.get("data") if isinstance(document, dict) else None
    if not isinstance(data, dict) or not isinstance(data.get("attributes", {} if bare else None), dict):
        raise invalid_input("'data' with 'attributes' is required.", pointer)
    for name, expected in (("id", str), ("relationships", dict)):
        if not isinstance(data.get(name, expected()), expected):
            raise invalid_input(f"'{name}' must be of type {expected.__name__}.", f"{pointer}/{name}")
    if data.get("type") != kind:
        raise invalid_input(f"'{data.get('type')}' is not a valid type; expected '{kind}'.", f"{pointer}/type")
    return data


def entries_of(
    attributes: dict[str, Any], name: str, limit: int | None = None, *, pointer: str = "/data/attributes"
) -> list[Any]:
    """Return the entries of a bulk body, in order. Raises ApiError."""
    holder = attributes.get(name)
    entries = holder.get("data") if isinstance(holder, dict) else None
    if not isinstance(entries, list) or not entries:
        raise invalid_input(f"'{name}' is required.", f"{pointer}/{name}")
    if limit is not None and len(entries) > limit:
        raise invalid_input(f"A bulk call takes at most {limit} entries.", f"{pointer}/{name}/data")
    return entries


def reference_ids(relation: Any, kind: str, pointer: str, *, many: bool = True) -> list[str]:
    """Return the ids in a JSON:API relationship. Raises ApiError."""
    data = relation.get("data") if isinstance(relation, dict) else None
    found = data if many and isinstance(data, list) else [data]
    ids = [entry.get("id") for entry in found if isinstance(entry, dict) and entry.get("type") == kind]
    if len(ids) < len(found) or not all(isinstance(each, str) for each in ids):
        raise invalid_input(f"'data' with 'type' {kind} and 'id' is required.", f"{pointer}/data")
    return list(map(str, ids))


def check_event(attributes: dict[str, Any], pointer: str = "/data/attributes", *, bulk: bool = False) -> None:
    """Check the attributes of an event, except its profile. Raises ApiError."""
    check_fields("event", attributes, _BULK_EVENT if bulk else _EVENT, pointer)
    for name in ("properties", "metric"):
        if not isinstance(attributes.get(name), dict):
            raise invalid_input(f"'{name}' is required for the resource 'event'.", f"{pointer}/{name}")
    metric = require_resource(attributes["metric"], "metric", f"{pointer}/metric")["attributes"].get("name")
    if not isinstance(metric, str) or not 0 < len(metric) < MAX_METRIC_NAME:
        raise invalid_input("'name' is required for the resource 'metric'.", f"{pointer}/metric")
    check_properties(attributes["properties"], f"{pointer}/properties")
    _check_time(attributes.get("time"), f"{pointer}/time")
    code = attributes.get("value_currency")
    if code is not None and not _CURRENCY.fullmatch(code):
        raise invalid_input("'value_currency' must be an ISO 4217 code.", f"{pointer}/value_currency")


def check_profile(attributes: dict[str, Any], pointer: str = "/data/attributes", *, of_event: bool = False) -> None:
    """Check the attributes of a profile. Raises ApiError."""
    check_fields("profile", attributes, _EVENT_PROFILE if of_event else _PROFILE, pointer)
    email, phone = attributes.get("email"), attributes.get("phone_number")
    if email is not None and (len(email) > MAX_EMAIL or not _EMAIL.fullmatch(email)):
        raise invalid_input("Invalid email address.", f"{pointer}/email")
    if phone is not None and not _is_e164(phone):
        raise invalid_input(
            "Invalid phone number format (Example of a valid format: +12345678901)", f"{pointer}/phone_number"
        )
    if len(attributes.get("external_id") or "") > MAX_EXTERNAL_ID:
        raise invalid_input("external_id is too long.", f"{pointer}/external_id")
    for name in (attributes.get("location") or {}).keys() - _LOCATION:
        raise invalid_input(f"'{name}' is not a valid field for the resource 'location'.", f"{pointer}/location")


def check_bulk_profile(entry: Any, pointer: str) -> None:
    """Check a profile of a bulk import. Raises ApiError."""
    attributes = require_resource({"data": entry}, "profile", pointer)["attributes"]
    check_profile(attributes, f"{pointer}/attributes")
    if not entry.get("id") and not any(attributes.get(name) for name in IDENTIFIERS):
        raise invalid_input("One or more identifiers is required.", pointer)
    if len(orjson.dumps(entry)) > MAX_PROFILE:
        raise invalid_input("A profile can have at most 100 KB.", pointer)


def check_catalog(kind: str, attributes: dict[str, Any], pointer: str = "/data/attributes", *, create: bool) -> None:
    """Check the attributes of a catalog entry. Raises ApiError."""
    allowed = {k: v for k, v in CATALOG[kind].items() if create or k not in _CREATE_ONLY}
    check_fields(kind, attributes, allowed, pointer)
    for name in REQUIRED[kind] if create else ():
        if attributes.get(name) is None:
            raise invalid_input(f"'{name}' is required for the resource '{kind}'.", f"{pointer}/{name}")
    if (
        attributes.get("integration_type", "$custom") != "$custom"
        or attributes.get("catalog_type", "$default") != "$default"
    ):
        raise invalid_input("Only $custom:::$default catalogs can be written.", f"{pointer}/integration_type")
    if attributes.get("inventory_policy", 0) not in {0, 1, 2}:
        raise invalid_input("'inventory_policy' must be 0, 1 or 2.", f"{pointer}/inventory_policy")
    metadata = attributes.get("custom_metadata") or {}
    if any(isinstance(value, dict | list) for value in metadata.values()) or len(orjson.dumps(metadata)) > MAX_TEXT:
        raise invalid_input("'custom_metadata' must be flat and at most 100 KB.", f"{pointer}/custom_metadata")


def check_fields(kind: str, attributes: dict[str, Any], allowed: dict[str, type], pointer: str) -> None:
    """Check names and types. Null is valid for every type. Raises ApiError."""
    for name, value in attributes.items():
        if name not in allowed:
            raise invalid_input(f"'{name}' is not a valid field for the resource '{kind}'.", f"{pointer}/{name}")
        if value is not None and not _has_type(value, allowed[name]):
            raise invalid_input(f"'{name}' must be of type {allowed[name].__name__}.", f"{pointer}/{name}")


def check_properties(properties: dict[str, Any], pointer: str) -> None:
    """Check event properties against Klaviyo's limits. Raises ApiError."""
    if len(properties) > MAX_PROPERTIES:
        raise invalid_input(f"An event can have at most {MAX_PROPERTIES} properties.", pointer)
    _check_value(properties, MAX_DEPTH, pointer)


def _check_value(value: Any, depth: int, pointer: str) -> None:
    if isinstance(value, str):
        if len(value) * 4 > MAX_TEXT and len(value.encode()) > MAX_TEXT:
            raise invalid_input("A text can have at most 100 KB.", pointer)
        return
    if depth == 0:
        raise invalid_input(f"Objects can be nested at most {MAX_DEPTH} levels.", pointer)
    if isinstance(value, list) and len(value) > MAX_ARRAY:
        raise invalid_input(f"An array can have at most {MAX_ARRAY} items.", pointer)
    for entry in value.values() if isinstance(value, dict) else value:
        if isinstance(entry, str | dict | list):
            _check_value(entry, depth - 1, pointer)


def _check_time(value: str | None, pointer: str) -> None:
    if value is None:
        return
    try:
        moment = datetime.fromisoformat(value) if _TIME.fullmatch(value) else None
    except ValueError:
        moment = None
    if moment is None:
        raise invalid_input("'time' must be an RFC 3339 date-time.", pointer)
    if not datetime(1990, 1, 1, tzinfo=UTC) < moment <= datetime.now(UTC) + timedelta(days=365):
        raise invalid_input("'time' must be after 1990 and at most a year from now.", pointer)


def _has_type(value: Any, kind: type) -> bool:
    if kind in {float, int}:
        return isinstance(value, int | float if kind is float else int) and not isinstance(value, bool)
    return isinstance(value, kind)


def _is_e164(text: str) -> bool:
    try:
        number = phonenumbers.parse(text, None)
    except phonenumbers.NumberParseException:
        return False
    return (
        phonenumbers.is_valid_number(number)
        and phonenumbers.format_number(number, phonenumbers.PhoneNumberFormat.E164) == text
    )
