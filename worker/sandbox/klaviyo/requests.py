"""The parts that the endpoints of the Klaviyo emulator share: bodies, query parameters, filters and pages."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

import orjson

from worker.sandbox.klaviyo.rules import ApiError, invalid_input

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from worker.sandbox.http import ApiRequest, Json

MAX_PAGE = 100
MAX_FILTER_VALUES = 100
_TEXT = r"""(?:"(?:[^"\\]|\\.)*"|'[^'\\]*')"""
_FILTER = re.compile(rf"(equals|any|contains)\(([\w.]+),(\[?{_TEXT}(?:,{_TEXT})*\]?)\)")


def not_found() -> ApiError:
    """Return the error for an unknown path."""
    return ApiError(404, "not_found", "The requested path could not be found.")


def parse_body(request: ApiRequest) -> Any:
    """Return the body. Raises ApiError if it is not JSON."""
    try:
        return request.json()
    except ValueError:
        raise invalid_input("The body is not JSON.") from None


def check_parameters(request: ApiRequest, known: set[str]) -> None:
    """Raise ApiError if there is a query parameter that the endpoint does not know."""
    for name in request.query.keys() - known:
        if not name.startswith("fields["):
            raise invalid_input(f"'{name}' is not a valid query parameter here.", "")


def parse_filter(request: ApiRequest, names: Mapping[str, tuple[str, ...]]) -> tuple[str, list[str] | None]:
    """Return the field and the values of the filter, or ("", None). Raises ApiError.

    `names`: the operators that are allowed for each field.
    """
    text = request.query.get("filter", [""])[0]
    match = _FILTER.fullmatch(text)
    if not text:
        return "", None
    if match is None or match[1] not in names.get(match[2], ()) or (match[1] == "any") is not match[3].startswith("["):
        raise invalid_input(f"Unknown filter; expected one of {sorted(names)}.", "")
    texts = re.findall(_TEXT, match[3])
    if len(texts) > MAX_FILTER_VALUES:
        raise invalid_input(f"A filter takes at most {MAX_FILTER_VALUES} values.", "")
    return match[2], [orjson.loads(each) if each.startswith('"') else each[1:-1] for each in texts]


def selected_fields(request: ApiRequest, kind: str, resource: Json) -> Json:
    """Return a resource with the attributes that `fields[...]` names; all of them without this parameter."""
    names = request.query.get(f"fields[{kind}]", [""])[0]
    if not names:
        return resource
    return resource | {"attributes": {n: v for n, v in resource["attributes"].items() if n in names.split(",")}}


def paginate(
    entries: list[Any], request: ApiRequest, size: int, show: Callable[[Any], Json] = dict, largest: int = MAX_PAGE
) -> Json:
    """Return a page of entries, with the link to the next page. Raises ApiError."""
    try:
        start = int(request.query.get("page[cursor]", ["0"])[0])
        size = int(request.query.get("page[size]", [str(size)])[0])
    except ValueError:
        raise invalid_input("Malformed page[cursor] or page[size].", "") from None
    if not 1 <= size <= largest or start < 0:
        raise invalid_input(f"page[size] must be between 1 and {largest}.", "")
    next_url = None
    if start + size < len(entries):
        query = urlencode({**request.query, "page[cursor]": [str(start + size)]}, doseq=True)
        next_url = f"http://{request.headers.get('Host', '')}{request.target.partition('?')[0]}?{query}"
    return {"data": [show(entry) for entry in entries[start : start + size]], "links": {"next": next_url}}
